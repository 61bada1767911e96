"""The commands of ``fasthessian``: ``analyze``, ``plot``, ``doctor``."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from fasthessian.__about__ import __version__
from fasthessian.app.problems import BUILTIN, Settings, load
from fasthessian.errors import InputError
from fasthessian.krylov.basis import FORMATS
from fasthessian.operators.products.engines import ENGINES
from fasthessian.operators.products.options import PRECISIONS

PROBLEMS = "\n".join(f"  {name:<16} {recipe.about}" for name, recipe in BUILTIN.items())

EXAMPLES = """\b
Examples:
  fasthessian analyze resnet20
  fasthessian analyze resnet20 --data path/to/cifar-10-batches-bin --out report-cifar
  fasthessian analyze mlp-digits --top 10 --no-landscape --json > spectrum.json
  fasthessian analyze my_script:problem --steps 100 --probes 4
  fasthessian analyze resnet20 --blocks layer --no-density --no-landscape
  fasthessian analyze my_script:problem --matrix ggn --params "^head" --microbatch 32
"""


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    }
)
@click.version_option(__version__, prog_name="fasthessian")
def cli() -> None:
    """Hessian spectra of PyTorch models: eigenvalues, trace, density, loss landscape.

    Start with `fasthessian analyze mlp-digits`, which takes seconds, and open the report that it
    writes.
    """


@cli.command(
    help=f"""Compute the Hessian spectrum of PROBLEM and write a report.

\b
PROBLEM is a built-in one:
{PROBLEMS}
or module:function of your own, searched in this folder first. The function takes no arguments and
returns model, criterion, data, where data is one batch (inputs, targets), a mapping (with criterion
None for Hugging Face models, which return their loss), a list of batches, or a DataLoader.

The report folder holds report.html (open this), result.json (every number) and the figures. The
same seed gives the same numbers.

{EXAMPLES}"""
)
@click.argument("problem")
@click.option("--data", metavar="FOLDER", help="CIFAR-10 or CIFAR-100, unpacked; else digits.")
@click.option("--epochs", type=click.IntRange(0), help="Passes over the training images.")
@click.option("--train-images", type=click.IntRange(1), help="At most so many images an epoch.")
@click.option("--lr", type=float, help="Learning rate of the training.")
@click.option("--samples", type=click.IntRange(1), help="Training images in the analysed loss.")
@click.option("--batch-size", type=click.IntRange(1), help="Images a batch of the analysis.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Same seed, same numbers."
)
@click.option(
    "--matrix",
    type=click.Choice(["hessian", "ggn", "fisher"]),
    default="hessian",
    help="Second derivative of the loss; its Gauss-Newton part, which has no negative eigenvalue "
    "where the criterion is convex; or the Fisher matrix, by one target drawn for each of the "
    "model's predictions.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    help="How products are made: retained keeps graphs in memory, recompute builds them each time, "
    "auto takes what fits. forward is for models that torch differentiates forward. difference "
    "needs first derivatives only: good to 1e-4, useless for ReLU networks.",
)
@click.option(
    "--mode",
    type=click.Choice(["eval", "train"]),
    default="eval",
    help="Of the model: dropout off and running statistics, or as in training.",
)
@click.option(
    "--params",
    metavar="REGEX",
    help="Only the parameters in whose name this is found, such as ^head; else all trainable ones.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Faster products of fewer digits; else in the model's dtype.",
)
@click.option(
    "--microbatch", type=click.IntRange(1), help="Samples at a time, to save memory; else a batch."
)
@click.option("--weight-decay", type=float, default=0.0, help="Adds this multiple of the identity.")
@click.option("--top", type=click.IntRange(0), default=5, help="Largest eigenvalues to find.")
@click.option("--bottom", type=click.IntRange(0), default=2, help="Smallest eigenvalues to find.")
@click.option(
    "--max-products",
    type=click.IntRange(1),
    default=300,
    help="Hessian-vector products at most for each end.",
)
@click.option("--trace/--no-trace", default=True, help="Estimate the sum of all eigenvalues.")
@click.option("--trace-rtol", type=float, default=0.05, help="Half the interval over the trace.")
@click.option("--density/--no-density", default=True, help="How the eigenvalues are distributed.")
@click.option("--steps", type=click.IntRange(1), default=60, help="Lanczos steps of the density.")
@click.option("--probes", type=click.IntRange(1), default=1, help="Random vectors of the density.")
@click.option(
    "--basis",
    type=click.Choice(FORMATS),
    default="full",
    help="Vectors kept by Lanczos: compressed takes half the memory of float32 at accuracy 2e-4 of "
    "the largest eigenvalue, offload puts those of a GPU into host memory.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Check products on this model first: symmetry, repetition, central differences, weights.",
)
@click.option(
    "--blocks",
    metavar="BY",
    help="Also the top eigenvalue and trace of each block: layer, stage, or a regular expression "
    "whose match in a parameter's name is its block.",
)
@click.option("--landscape/--no-landscape", default=True, help="Loss along the top eigenvectors.")
@click.option("--points", type=click.IntRange(2), default=15, help="Grid points a direction.")
@click.option("--span", type=float, help="Grid from -span to +span; else set by the curvature.")
@click.option("--out", metavar="DIR", default="report", help="Report folder, new or empty.")
@click.option("--overwrite", is_flag=True, help="Replace the report in a folder that has one.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print result.json; a report only with --out."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; else torch's choice.")
@click.pass_context
def analyze(ctx: click.Context, /, **options: Any) -> None:
    """Read the options, do the job, show and write the result."""
    begin = time.perf_counter()
    import torch

    from fasthessian.app import analysis
    from fasthessian.app.progress import Stages, show_summary, stderr
    from fasthessian.app.report import document as report
    from fasthessian.app.report import html as page
    from fasthessian.results.plots import figure

    def pick(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    plan = analysis.Plan(
        **pick(
            "top", "bottom", "max_products", "trace", "trace_rtol", "density", "steps", "probes"
        ),
        **pick("basis", "landscape", "points", "span", "seed", "check", "blocks"),
        **pick("matrix", "engine", "mode", "params", "precision", "microbatch", "weight_decay"),
    )
    quiet = options["as_json"] and ctx.get_parameter_source("out") is ParameterSource.DEFAULT
    out = None if quiet else options["out"]
    if out is not None:
        figure()  # a missing matplotlib is better known before the work than after
        report.check_folder(out, overwrite=options["overwrite"])
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    settings = Settings(
        **pick("data", "epochs", "train_images", "lr", "samples", "batch_size", "seed")
    )
    console = stderr()
    # what the user's own code prints must not stand among the JSON
    aside = contextlib.redirect_stdout(sys.stderr if options["as_json"] else sys.stdout)
    with Stages(console) as stages, aside:
        start = time.perf_counter()
        name = options["problem"]
        progress = stages.stage(f"{'training' if name in BUILTIN else 'loading'} {name}")
        problem = load(name, settings, progress)
        timing = {"training": time.perf_counter() - start}
        result = analysis.analyze(problem, plan, stages.stage)
    timing |= result.seconds | {"total": time.perf_counter() - begin}
    content = report.document(problem, plan, result, timing)
    stages.say(f"engine {result.engine}")
    if words := page.steps(content):
        stages.say(f"Lanczos steps {words}")
    unfinished = deliver(content, out, options["as_json"], options["overwrite"])
    where = None if out is None or unfinished else str(Path(out) / "report.html")
    show_summary(console, content, where)
    if unfinished is not None:
        raise unfinished


class Unfinished(click.ClickException):
    """The work is done and its numbers are kept, but something failed after it."""


class Interrupted(Unfinished):
    """The same by Ctrl-C."""

    exit_code = 130


def deliver(
    content: Mapping[str, Any], out: str | None, as_json: bool, overwrite: bool
) -> Unfinished | None:
    """Print and write a result, the numbers before anything is drawn.

    Numbers that find no place there go to a file for temporary files, or to standard output.

    Returns:
        What failed, where the numbers are and how to draw them; None if nothing failed.
    """
    from fasthessian.app.report import document as report

    numbers = report.encode(content)
    failed: list[BaseException] = []

    def attempt(job: Callable[[], None]) -> bool:
        try:
            job()
        except (Exception, KeyboardInterrupt) as error:
            failed.append(error)
            return False
        return True

    def show() -> None:
        try:
            sys.stdout.write(numbers.decode())
            sys.stdout.flush()
        except OSError:
            sys.stdout = io.StringIO()  # what it still holds would fail once more at the end
            raise

    printed = as_json and attempt(show)
    kept: str | None = None
    if out is not None:
        first = {"result.json": numbers}
        if attempt(lambda: report.write(out, first, overwrite=overwrite)):
            kept = str(Path(out) / "result.json")
            if not any(isinstance(error, KeyboardInterrupt) for error in failed):
                attempt(lambda: report.write(out, report.files(content), overwrite=True))
    if not failed:
        return None
    if kept is None and not printed:

        def keep() -> None:
            nonlocal kept
            handle, name = tempfile.mkstemp(prefix="fasthessian-", suffix=".json")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(numbers)
            except BaseException:
                os.unlink(name)
                raise
            kept = name

        printed = not attempt(keep) and not as_json and attempt(show)
    stopped = isinstance(failed[0], KeyboardInterrupt)
    what = "interrupted" if stopped else str(failed[0]) or type(failed[0]).__name__
    place = "the numbers could not be kept"
    if kept or printed:
        source = kept or "the JSON on standard output, to be saved as result.json"
        draw = f"fasthessian plot {shlex.quote(kept or 'result.json')} --out DIR"
        place = f"the numbers are in {source}; draw them with: {draw}"
    return (Interrupted if stopped else Unfinished)(
        f"the work is done, but its report is not complete ({what}); {place}"
    )


@cli.command()
@click.argument("result", metavar="RESULT.JSON")
@click.option("--out", metavar="DIR", default="figures", help="Folder to fill.")
@click.option("--overwrite", is_flag=True, help="Replace figures in a folder that has some.")
def plot(result: str, out: str, overwrite: bool) -> None:
    r"""Draw the figures of a RESULT.JSON again.

    \b
    Example:
      fasthessian plot report/result.json --out figures
    """
    from fasthessian.app.report import document as report

    report.check_folder(out, overwrite=overwrite)
    drawn = report.figures(report.read(result))
    if not drawn:
        raise InputError(f"{result} has nothing to draw")
    report.write(out, drawn, overwrite=overwrite)
    for name in drawn:
        click.echo(Path(out) / name)


@cli.command()
def doctor() -> None:
    """Say which kernels serve here, and why the others do not."""
    from fasthessian import kernels

    click.echo(kernels.doctor())
