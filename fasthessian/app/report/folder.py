"""The folder of a report: checked before the work, and filled without leaving half a report."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fasthessian.app.report.figures import FIGURES, figures
from fasthessian.app.report.html import html
from fasthessian.app.report.result import Result, encode

SPACE = 2 << 20  # bytes of free disk that are required; a report takes about one MiB


def files(result: Result) -> dict[str, bytes]:
    """All files of a report by name: ``result.json``, the figures, ``report.html``."""
    drawn = figures(result)
    page = html(result, drawn).encode(errors="backslashreplace")
    return {"result.json": encode(result), **drawn, "report.html": page}


def check_folder(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise before the work if a report cannot be written to ``out``.

    Raises:
        FileExistsError: ``out`` is a folder that is not empty and ``overwrite`` is False.
        OSError: ``out`` is a file, or its disk cannot be written or has no space for a report.
    """
    target = Path(out)
    place = _place(target, overwrite)
    try:
        probe = tempfile.mkdtemp(dir=place)
        try:
            (Path(probe) / "probe").write_bytes(bytes(SPACE))
        finally:
            shutil.rmtree(probe, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"{target} cannot be written: {error.strerror} in {place}; choose another --out"
        ) from error


def _place(target: Path, overwrite: bool) -> Path:
    """The nearest existing folder at or above ``target``; raises as `check_folder`."""
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
    """Put the files into the folder ``out``; a new folder appears complete or not at all.

    In an existing folder each file is replaced as a whole. Figures of an earlier report that this
    one lacks are removed; a new result.json removes an earlier report.html too. All other files
    stay.

    Raises:
        OSError: as `check_folder`, or the disk refuses the files; the folder stays as it was.
    """
    target = Path(out).resolve()
    _place(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    # inside an existing folder, which may be a disk of its own or the only writable place
    parent = target if target.is_dir() else target.parent
    staging = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}."))
    try:
        for name, payload in content.items():
            (staging / name).write_bytes(payload)
        if target.is_dir():
            for name in content:
                os.replace(staging / name, target / name)
            stale = {*FIGURES, *(["report.html"] if "result.json" in content else [])}
            for name in stale - set(content):
                (target / name).unlink(missing_ok=True)
        else:
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(staging, 0o777 & ~umask)  # mkdtemp makes 0700
            os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
