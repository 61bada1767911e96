"""Frozen result records: what every algorithm returns, saved and loaded as one ``.npz`` file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.results import npz
from fasthessian.results.fields import FLOATING, fields_of, fits, obey, parse, scalar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

R = TypeVar("R", bound="Record")


def write_whole(path: str | os.PathLike[str], payload: bytes, *, overwrite: bool = False) -> None:
    """Write ``payload`` to ``path`` entirely or not at all (temporary file, then rename).

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False.
        OSError: the folder is missing or cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"folder {target.parent} does not exist; make it first")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True or choose another path")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def defaults(kind: type[Record]) -> dict[str, Any]:
    """The fields that a file of an earlier version may lack, with their values."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Base of the results: immutable fields, ``save`` and ``load``."""

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the record to ``path`` as NumPy ``.npz``, whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is False.
        """
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        header = json.dumps(self._packed("", arrays))
        buffer = io.BytesIO()
        arrays["__record__"] = np.array(header)
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its keywords are not all arrays
        write_whole(path, buffer.getvalue(), overwrite=overwrite)

    def _packed(self, prefix: str, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """Name and scalars; tensors go to ``arrays``, those of a record within under its name."""
        scalars: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                arrays[prefix + field.name] = value.detach().cpu().numpy()
            elif isinstance(value, Record):
                scalars[field.name] = value._packed(f"{prefix}{field.name}.", arrays)
            else:
                scalars[field.name] = value
        return {"record": type(self).__name__, "scalars": scalars}

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a record of this class back, on the CPU.

        Names, types, shapes and sizes are compared with the fields' annotations before an array
        is read.

        Raises:
            ValueError: the file is not a record, is cut short, is a record of another class, or a
                field holds what the class does not accept.
        """
        name = cls.__name__
        try:
            with open(path, "rb") as stream:
                archive = npz.Archive(stream)
                header = parse(archive.text())
                found = header.get("record") if isinstance(header, dict) else None
                if found not in [kind.__name__ for kind in Record.__subclasses__()]:
                    raise InputError(f"it holds no record that is known here, but {found!r:.60}")
                record = None
                if found == name:
                    cls._scalars("", header)
                    if odd := set(archive.infos) - {npz.TEXT, *cls._members()}:
                        raise InputError(f"another version's fields: {', '.join(sorted(odd))}")
                    record = cls._unpacked("", header, archive)
        except FileNotFoundError:
            raise
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{path} is not a saved {name} ({words})") from error
        if record is None:
            raise InputError(f"{path} holds a {found}, not a {name}; use {found}.load")
        return record

    @classmethod
    def _members(cls, prefix: str = "") -> Iterator[str]:
        """Names of the arrays in a file, those of a record within under its name."""
        for name, field in fields_of(cls).items():
            if field.kind is Tensor:
                yield prefix + name
            elif issubclass(field.kind, Record):
                yield from field.kind._members(f"{prefix}{name}.")

    @classmethod
    def _scalars(cls, prefix: str, header: Any) -> dict[str, Any]:
        """The scalars of a record, if it and those within are of their classes."""
        known = header if isinstance(header, dict) else {}
        found, given = known.get("record"), known.get("scalars")
        if found != cls.__name__ or not isinstance(given, dict):
            other = isinstance(found, str) and found != cls.__name__
            kind = f"a {found:.40}" if other else f"{header!r:.40}"
            raise InputError(f"{prefix.rstrip('.')} is {kind}, not a {cls.__name__}")
        for name, field in fields_of(cls).items():
            if isinstance(field.kind, type) and issubclass(field.kind, Record) and name in given:
                field.kind._scalars(f"{prefix}{name}.", given[name])
        return given

    @classmethod
    def _unpacked(cls: type[R], prefix: str, header: Any, archive: npz.Archive) -> R:
        """The record whose arrays have names that begin with ``prefix``."""
        given = cls._scalars(prefix, header)
        values, arrays, sizes = defaults(cls), [], dict[str, int]()
        for name, field in fields_of(cls).items():
            where = prefix + name
            if field.kind is Tensor and where in archive.infos:
                fits(where, field, *archive.header(where), sizes)
                arrays.append(name)
            elif field.kind is not Tensor and name in given:
                values[name] = (
                    field.kind._unpacked(f"{where}.", given.pop(name), archive)
                    if issubclass(field.kind, Record)
                    else scalar(where, field, given.pop(name), sizes, null=False)
                )
        if odd := set(fields_of(cls)) - {*values, *arrays} | set(given):
            raise InputError(f"another version's fields: {', '.join(sorted(odd))}")
        for name in arrays:
            array = archive.read(prefix + name)
            obey(prefix + name, fields_of(cls)[name], array)
            values[name] = torch.from_numpy(array)
        return cls(**values)


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenpairs(Record):
    """Eigenvalues, eigenvectors and how far each pair is from exact."""

    values: Annotated[Tensor, "k"]  # float64, in the order that `which` asks for
    vectors: Annotated[Tensor, "k n", FLOATING]  # rows of unit norm, the operator's dtype
    residuals: Annotated[Tensor, "k", ">= 0"]  # float64, bounds on ||H v - theta v||
    converged: bool
    matvecs: Annotated[int, ">= 0"]
    graph: str = ""  # "captured" as a CUDA graph, or "eager: " and why

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues with their residuals as error bars (needs matplotlib)."""
        from fasthessian.results.plots import plot_eigenpairs

        return plot_eigenpairs(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate(Record):
    """A Monte-Carlo mean with its standard error and confidence interval."""

    value: float
    stderr: Annotated[float, ">= 0"]
    interval: Annotated[tuple[float, float], "ascending"]  # (low, high) at `confidence`
    confidence: Annotated[float, "between 0 and 1"]
    samples: Annotated[Tensor, "s"]  # float64, the quadratic forms v'Hv
    matvecs: Annotated[int, ">= 0"]
    converged: bool

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the running mean with its confidence band (needs matplotlib)."""
        from fasthessian.results.plots import plot_estimate

        return plot_estimate(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Density(Record):
    """Spectral density by stochastic Lanczos quadrature."""

    # float64, each row ascending; after a breakdown the last node repeats
    nodes: Annotated[Tensor, "probes steps", "ascending"]
    # float64, each row sums to 1; repeated nodes have weight 0
    weights: Annotated[Tensor, "probes steps", ">= 0"]
    grid: Annotated[Tensor, "g", "ascending"]  # float64, eigenvalue axis
    values: Annotated[Tensor, "g", ">= 0"]  # float64, density on the grid; sum(values) * step = 1
    lower: Annotated[Tensor, "g"]  # float64, pointwise band over the probes
    upper: Annotated[Tensor, "g"]  # float64
    sigma: Annotated[float, "> 0"]  # width of the Gaussian kernel, in units of the eigenvalues
    matvecs: Annotated[int, ">= 0"]
    graph: str = ""  # "captured" as a CUDA graph, or "eager: " and why

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density on a logarithmic axis with its band (needs matplotlib)."""
        from fasthessian.results.plots import plot_density

        return plot_density(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum(Record):
    """Both ends, the trace and the density of one operator."""

    top: Eigenpairs  # the largest, descending
    bottom: Eigenpairs  # the smallest, ascending
    trace: Estimate
    density: Density
    matvecs: Annotated[int, ">= 0"]  # of all together

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density with the eigenvalues of both ends marked (needs matplotlib)."""
        from fasthessian.results.plots import plot_density

        known = [*self.top.values.tolist(), *self.bottom.values.tolist()]
        return plot_density(self.density, ax, eigenvalues=known)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSpectra(Record):
    """The outermost eigenvalue and the trace of each diagonal block, in the order of the model."""

    names: Annotated[tuple[str, ...], "b"]
    sizes: Annotated[Tensor, "b", ">= 0"]  # float64, parameters
    values: Annotated[Tensor, "b"]  # float64, the eigenvalue of largest magnitude
    residuals: Annotated[Tensor, "b", ">= 0"]  # float64, bounds on ||H v - theta v||
    traces: Annotated[Tensor, "b"]  # float64
    errors: Annotated[Tensor, "b", ">= 0"]  # float64, half-width of the trace's confidence interval

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues as bars, with the traces in figures (needs matplotlib)."""
        from fasthessian.results.plots import plot_blocks

        return plot_blocks(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape(Record):
    """Loss along one or two directions; ``losses[i, j]`` at ``alphas[i] d0 + betas[j] d1``."""

    alphas: Annotated[Tensor, "p", "ascending"]  # float64
    betas: Annotated[Tensor, "q", "ascending"]  # float64, empty for one direction
    losses: Annotated[Tensor, "p q?"]  # float64, (p,) for one direction

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve or the contour map of the loss (needs matplotlib)."""
        from fasthessian.results.plots import plot_landscape

        return plot_landscape(self, ax)
