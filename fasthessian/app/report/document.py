"""The report of an analysis: ``result.json``, the figures as PNG, and ``report.html``."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.__about__ import __version__
from fasthessian.app.report import html as page
from fasthessian.errors import InputError
from fasthessian.results import plots
from fasthessian.results.fields import fields_of, fits, numbers, obey, parse, scalar
from fasthessian.results.records import (
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

    from fasthessian.app.analysis import Analysis, Plan
    from fasthessian.app.problems import Problem

FORMAT = "fasthessian result 1"
PARTS: dict[str, type[Record]] = {
    "top": Eigenpairs,
    "bottom": Eigenpairs,
    "trace": Estimate,
    "density": Density,
    "landscape": Landscape,
    "blocks": BlockSpectra,
}
ROOM = 2 << 20  # bytes of free disk to begin with; a report takes about one
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
        ValueError: the file is no such document, or a part is damaged; one line.
        OSError: it cannot be read.
    """
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; give {Path(path) / 'result.json'}")
    try:
        content: dict[str, Any] = parse(Path(path).read_bytes().decode(), finite=True)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    form = content.get("format") if isinstance(content, dict) else None
    if form != FORMAT:
        why = f"found {form!r:.60}"
        if isinstance(form, str) and re.fullmatch(r"fasthessian result \d+", form):
            why = f"a newer version wrote {form!r}, update fasthessian"
        raise InputError(
            f"{path} is not a result of this version; expected format {FORMAT!r}, {why}"
        )
    try:
        records(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return content


def records(content: Mapping[str, Any]) -> dict[str, Any]:
    """The records in a document by name, without eigenvectors.

    Raises:
        ValueError: a part lacks a field, or holds what the field does not accept.
    """
    found: dict[str, Any] = {}
    for name, kind in PARTS.items():
        part = content.get(name)
        if part is None:
            continue
        try:
            if not isinstance(part, Mapping):
                raise InputError(f"expected an object of JSON, got a {type(part).__name__}")
            found[name] = _record(kind, {**defaults(kind), **part})
        except ValueError as error:
            raise InputError(f"the part {name!r} of the result is damaged ({error})") from error
    return found


def _record(kind: type[Record], part: Mapping[str, Any]) -> Record:
    """One record; raises ValueError where the part is not what the fields of ``kind`` declare."""
    values: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, field in fields_of(kind).items():
        if name == "vectors":
            values[name] = torch.empty(0, 0)
        elif name not in part:
            raise InputError(f"{name} is missing")
        elif field.kind is Tensor:
            array = numbers(name, part[name])
            fits(name, field, array.dtype, array.shape, sizes)
            obey(name, field, array)
            values[name] = torch.from_numpy(array)
        else:
            values[name] = scalar(name, field, part[name], sizes, null=True)
    if empty := [axis for axis, length in sizes.items() if length == 0 and axis != "q"]:
        raise InputError(f"it is empty: {', '.join(empty)} = 0")
    return kind(**values)


def figures(content: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNG files that the document can fill, by file name.

    Raises:
        ValueError: a part is damaged, or matplotlib cannot draw it.
        ImportError: matplotlib is missing.
    """
    drawn = {}
    for name, draw in _drawings(records(content)).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a font without a name's letters, and overflow
                drawn[name] = png(_named(draw(), page.matrix(content)))
        except ImportError:
            raise
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{name} cannot be drawn ({words:.300})") from error
    return drawn


def _named(fig: Figure, matrix: str) -> Figure:
    """The figure with the name of the matrix, which a record does not know."""
    for ax in fig.axes:
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_text(text.get_text().replace("Hessian", matrix))
    return fig


def _drawings(parts: Mapping[str, Any]) -> dict[str, Callable[[], Figure]]:
    """What draws each figure, by file name."""
    pairs = [name for name in ("top", "bottom") if name in parts]
    known = [value for name in pairs for value in parts[name].values.tolist()]

    def eigenvalues() -> Figure:
        sizes = [len(parts[name].values) for name in pairs]
        fig = plots.figure(4.0 + 0.8 * min(sum(sizes), 10), 4.0)
        panels = fig.subplots(1, len(pairs), squeeze=False, width_ratios=[s + 2 for s in sizes])
        for name, ax in zip(pairs, panels[0], strict=True):
            plots.plot_eigenpairs(parts[name], ax)
            ax.set_title(f"{name.title()} {ax.get_title().lower()}", fontweight="bold")
        return fig

    def density() -> Figure:
        fig = plots.figure(8.4)
        plots.plot_density(parts["density"], fig.add_subplot(), eigenvalues=known)
        return fig

    found: dict[str, Callable[[], Figure]] = {"eigenvalues.png": eigenvalues} if pairs else {}
    for name in ("trace", "density", "landscape", "blocks"):
        if name in parts:
            found[f"{name}.png"] = density if name == "density" else _figure_of(parts[name])
    return found


def _figure_of(record: Any) -> Callable[[], Figure]:
    return lambda: record.plot().figure


def png(fig: Figure) -> bytes:
    """The figure as the bytes of a PNG file, without dates or versions inside."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def files(content: Mapping[str, Any]) -> dict[str, bytes]:
    """All files of the report: ``result.json``, the figures, ``report.html``."""
    drawn = figures(content)
    html = page.html(content, drawn).encode(errors="backslashreplace")
    return {"result.json": encode(content), **drawn, "report.html": html}


def check_folder(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Find out before the work whether a report can be written to ``out``.

    Raises:
        FileExistsError: it is a folder with something in it and ``overwrite`` is False.
        OSError: it is a file, its place cannot be written, or the disk has no room for a report.
    """
    target = Path(out)
    place = _place(target, overwrite)
    try:
        probe = tempfile.mkdtemp(dir=place)
        try:
            (Path(probe) / "probe").write_bytes(bytes(ROOM))
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"{target} cannot be written: {error.strerror} in {place}; choose another --out"
        ) from error


def _place(target: Path, overwrite: bool) -> Path:
    """The folder that exists in which ``target`` is, or is to be made; raises as `check_folder`."""
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty; use --overwrite or another --out")
    for name in ("result.json", "report.html", *FIGURES):
        if (target / name).is_dir():
            raise IsADirectoryError(f"{target / name} is a folder; choose another --out")
    place = target.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file, not a folder; choose another --out")
    return place


def write(
    out: str | os.PathLike[str], content: Mapping[str, bytes], *, overwrite: bool = False
) -> None:
    """Put the files into the folder ``out``: a new folder appears whole or not at all.

    In a folder that exists each file is replaced whole, figures (with a new result.json the page
    too) of an earlier report that this one lacks are removed, and every other file is left alone.

    Raises:
        OSError: as `check_folder`, or the disk does not take the files; the folder is as before.
    """
    target = Path(out).resolve()
    _place(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    # within a folder that exists: it may be a disk of its own, or the only one that can be written
    room = target if target.is_dir() else target.parent
    staging = Path(tempfile.mkdtemp(dir=room, prefix=f".{target.name}."))
    try:
        for name, payload in content.items():
            (staging / name).write_bytes(payload)
        if target.is_dir():
            for name in content:
                os.replace(staging / name, target / name)
            page_too = {"report.html"} if "result.json" in content else set[str]()
            for name in {*FIGURES, *page_too} - set(content):
                (target / name).unlink(missing_ok=True)
        else:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(staging, 0o777 & ~umask)  # mkdtemp makes 0700
            os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
