"""The report of an analysis: ``result.json``, the figures as PNG, and ``report.html``."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fasthessian import kernels, page, plots
from fasthessian.__about__ import __version__
from fasthessian.records import (
    BlockSpectra,
    Density,
    Eigenpairs,
    Estimate,
    Landscape,
    Record,
    defaults,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fasthessian.study.analysis import Analysis, Plan
    from fasthessian.study.problems import Problem

FORMAT = "fasthessian result 1"
PARTS: dict[str, type[Record]] = {
    "top": Eigenpairs,
    "bottom": Eigenpairs,
    "trace": Estimate,
    "density": Density,
    "landscape": Landscape,
    "blocks": BlockSpectra,
}
FIGURES = ("eigenvalues.png", "trace.png", "density.png", "landscape.png", "blocks.png")


def document(
    problem: Problem, plan: Plan, analysis: Analysis, timing: Mapping[str, float]
) -> dict[str, Any]:
    """Everything in plain JSON; the same seed gives the same document but for ``timing``.

    Eigenvectors stay out: they are as long as the model.
    """
    parts = {name: plain(getattr(analysis, name)) for name in PARTS}
    for name in ("top", "bottom"):
        if parts[name] is not None:
            del parts[name]["vectors"]
    return {
        "format": FORMAT,
        "problem": {
            "name": problem.name,
            "parameters": analysis.parameters,
            "tensors": analysis.tensors,
            **plain(problem.info),
        },
        "settings": dataclasses.asdict(plan),
        "loss": plain(analysis.loss),
        "gradient_norm": plain(analysis.gradient_norm),
        **parts,
        "check": plain(analysis.check),
        "matvecs": analysis.matvecs,
        "notes": list(analysis.notes),
        "environment": {
            "fasthessian": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
            "kernels": kernels.select("cpu").NAME,
            # the rest of the words names the memory that was free, which differs by run
            "engine": analysis.engine.partition(":")[0],
        },
        "timing": {name: round(seconds, 3) for name, seconds in timing.items()},
    }


def plain(value: Any) -> Any:
    """Records, tensors and containers as JSON types; a number that is not finite becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode(content: Mapping[str, Any]) -> bytes:
    """The document as the bytes of ``result.json``."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A document read back from ``result.json``.

    Raises:
        ValueError: the file is no such document.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a result of this version; expected format {FORMAT!r}")
    return content


def records(content: Mapping[str, Any]) -> dict[str, Any]:
    """The records in a document by name, without eigenvectors.

    Raises:
        ValueError: a part lacks a field or holds something else than numbers.
    """
    found: dict[str, Any] = {}
    for name, kind in PARTS.items():
        part = content.get(name)
        if part is None:
            continue
        try:
            values: dict[str, Any] = {}
            part = defaults(kind) | part
            for field in dataclasses.fields(kind):
                if field.name == "vectors":
                    values["vectors"] = torch.empty(0, 0)
                elif field.type == "Tensor":
                    numbers = np.array(part[field.name], dtype=float)  # null reads as NaN
                    values[field.name] = torch.from_numpy(numbers)
                else:
                    values[field.name] = part[field.name]
            found[name] = kind(**values)
            _consistent(found[name])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the part {name!r} of the result is damaged ({error})") from error
    return found


def _consistent(record: Any) -> None:
    """Raise ValueError where lengths within a record do not belong together, or TypeError."""
    if isinstance(record, Eigenpairs):
        fits = len(record.values) > 0 and record.values.shape == record.residuals.shape
    elif isinstance(record, Estimate):
        low, high = (float(x) for x in record.interval)
        fits = len(record.samples) > 0 and low <= high
    elif isinstance(record, Density):
        curves = (record.values, record.lower, record.upper)
        fits = record.nodes.shape == record.weights.shape and record.nodes.numel() > 0
        fits = fits and all(curve.shape == record.grid.shape for curve in curves)
    elif isinstance(record, BlockSpectra):
        columns = (record.sizes, record.values, record.residuals, record.traces, record.errors)
        fits = len(record.names) > 0 and all(len(x) == len(record.names) for x in columns)
    else:
        shape = tuple(len(x) for x in (record.alphas, record.betas) if len(x))
        fits = tuple(record.losses.shape) == shape
    if not fits:
        raise ValueError("its lengths do not belong together")


def figures(content: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNG files that the document can fill, by file name."""
    parts = records(content)
    drawn: dict[str, Figure] = {}
    pairs = [name for name in ("top", "bottom") if name in parts]
    if pairs:
        sizes = [len(parts[name].values) for name in pairs]
        fig = drawn["eigenvalues.png"] = plots.figure(4.0 + 0.8 * min(sum(sizes), 10), 4.0)
        panels = fig.subplots(1, len(pairs), squeeze=False, width_ratios=[s + 2 for s in sizes])
        for name, ax in zip(pairs, panels[0], strict=True):
            plots.plot_eigenpairs(parts[name], ax)
            ax.set_title(f"{name.title()} {ax.get_title().lower()}", fontweight="bold")
    known = [value for name in pairs for value in parts[name].values.tolist()]
    if "trace" in parts:
        fig = drawn["trace.png"] = plots.figure()
        plots.plot_estimate(parts["trace"], fig.add_subplot())
    if "density" in parts:
        fig = drawn["density.png"] = plots.figure(8.4)
        plots.plot_density(parts["density"], fig.add_subplot(), eigenvalues=known)
    if "landscape" in parts:
        fig = drawn["landscape.png"] = plots.figure(6.4, 5.2)
        plots.plot_landscape(parts["landscape"], fig.add_subplot())
    if "blocks" in parts:
        fig = drawn["blocks.png"] = plots.figure(8.4, 1.6 + 0.24 * len(parts["blocks"].names))
        plots.plot_blocks(parts["blocks"], fig.add_subplot())
    return {name: png(fig) for name, fig in drawn.items()}


def png(fig: Figure) -> bytes:
    """The figure as the bytes of a PNG file, without dates or versions inside."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def files(content: Mapping[str, Any]) -> dict[str, bytes]:
    """All files of the report: ``result.json``, the figures, ``report.html``."""
    drawn = figures(content)
    html = page.html(content, drawn).encode()
    return {"result.json": encode(content), **drawn, "report.html": html}


def check_folder(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Find out before the work whether a report can be written to ``out``.

    Raises:
        FileExistsError: it is a folder with something in it and ``overwrite`` is False.
        OSError: it is a file, or its place cannot be written.
    """
    target = Path(out)
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; use --overwrite or another --out")
    place = target.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file, not a folder; choose another --out")
    try:
        os.rmdir(tempfile.mkdtemp(dir=place))
    except OSError as error:
        raise OSError(f"{target} cannot be written: {error.strerror} in {place}") from error


def write(
    out: str | os.PathLike[str], content: Mapping[str, bytes], *, overwrite: bool = False
) -> None:
    """Put the files into the folder ``out``: a new folder appears whole or not at all.

    In a folder that exists each file is replaced whole, figures of an earlier report that this
    one lacks are removed, and every other file is left alone.

    Raises:
        OSError: as `check_folder`, or the disk does not take the files; the folder is as before.
    """
    check_folder(out, overwrite=overwrite)
    target = Path(out).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for name, payload in content.items():
            (staging / name).write_bytes(payload)
        if target.is_dir():
            for name in content:
                if (target / name).is_dir():
                    raise IsADirectoryError(f"{target / name} is a folder; choose another --out")
            for name in content:
                os.replace(staging / name, target / name)
            for name in set(FIGURES) - set(content):
                (target / name).unlink(missing_ok=True)
        else:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(staging, 0o777 & ~umask)  # mkdtemp makes 0700
            os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
