"""Carries out ``fasthessian analyze``: from its options to the report."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fasthessian.app import analysis
from fasthessian.app.delivery import Unfinished, deliver
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import BUILTIN, Settings, load
from fasthessian.app.progress import Stages, show_summary, stderr
from fasthessian.app.report.folder import check_folder
from fasthessian.app.report.result import result_of
from fasthessian.app.report.summary import steps
from fasthessian.app.report.templates import template
from fasthessian.app.saving import Saving
from fasthessian.distributed.launch import is_first, job
from fasthessian.distributed.ranks import ranks_of
from fasthessian.errors import Stopped
from fasthessian.results.plots import figure


def carry_out(options: dict[str, Any], out_is_given: bool) -> None:
    """Run the analysis that the options of the command name, show and write its result.

    ``out_is_given``: the user names the report folder, which is then written with --json too.
    """
    begin = time.perf_counter()

    def pick(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    asked = AnalysisOptions(
        **pick(
            "top", "bottom", "max_products", "trace", "trace_rtol", "density", "steps", "probes"
        ),
        **pick("basis", "landscape", "points", "span", "seed", "check", "blocks"),
        **pick("matrix", "engine", "mode", "params", "precision", "microbatch", "weight_decay"),
        **pick("sharded"),
    )
    saving = Saving(options["checkpoint"], options["resume"], options["time_limit"], begin)
    quiet = options["as_json"] and not out_is_given
    out = None if quiet else options["out"]
    if out is not None:
        figure()  # these two raise before the work if matplotlib or jinja2 is missing
        template("page.html")
        check_folder(out, overwrite=options["overwrite"])
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    settings = Settings(
        **pick("data", "epochs", "train_images", "lr", "samples", "batch_size", "seed")
    )
    console = stderr()
    with contextlib.ExitStack() as stack:
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        elif options["as_json"]:  # what the user's own code prints must not be mixed with the JSON
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stages, group = stack.enter_context(Stages(console)), stack.enter_context(job())
        start = time.perf_counter()
        name = options["problem"]
        progress = stages.stage(f"{'training' if name in BUILTIN else 'loading'} {name}")
        problem = load(name, settings, progress, ranks_of(group))
        timing = {"training": time.perf_counter() - start}
        try:
            found = analysis.analyze(problem, asked, stages.stage, group, saving)
        except Stopped:
            stages.say(f"go on with the same options and --resume {saving.folder}")
            raise
    if not is_first():
        return
    timing |= found.seconds | {"total": time.perf_counter() - begin}
    result = result_of(problem, asked, found, timing)
    stages.say(f"engine {found.engine}")
    if words := steps(result):
        stages.say(f"Lanczos steps {words}")
    unfinished = deliver(result, out, options["as_json"], options["overwrite"])
    where = None if out is None or unfinished else str(Path(out) / "report.html")
    show_summary(console, result, where)
    if unfinished is not None:
        raise unfinished
    if found.failed:
        raise Unfinished(f"{'; '.join(found.failed)}; the result holds everything else")
