"""Frozen result records: what every algorithm returns, saved and loaded as one ``.npz`` file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

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

        Raises:
            ValueError: the file is not a record, is cut short, or is a record of another class.
        """
        name = cls.__name__
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
                header = json.loads(str(archive["__record__"]))
                arrays = {key: archive[key] for key in archive.files if key != "__record__"}
                found = header["record"]
                record = None if found != name else cls._unpacked(header, "", arrays)
                if record is not None and arrays:
                    raise ValueError(f"another version's fields: {', '.join(sorted(arrays))}")
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is not a saved {name} ({error})") from error
        if record is None:
            raise ValueError(f"{path} holds a {found}, not a {name}; use {found}.load")
        return record

    @classmethod
    def _unpacked(
        cls: type[R], header: dict[str, Any], prefix: str, arrays: dict[str, np.ndarray[Any, Any]]
    ) -> R:
        kinds = {kind.__name__: kind for kind in Record.__subclasses__()}
        fields = defaults(cls) | dict(header["scalars"])
        for key in list(arrays):
            start, _, name = key.rpartition(".")
            if start == prefix.rstrip("."):
                fields[name] = torch.from_numpy(arrays.pop(key))
        expected = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(expected) != set(fields):
            odd = ", ".join(sorted(set(expected) ^ set(fields)))
            raise ValueError(f"another version's fields: {odd}")
        for name, value in fields.items():
            kind = kinds.get(str(expected[name]))
            if kind is not None:
                if value["record"] != kind.__name__:
                    raise ValueError(f"{name} is a {value['record']}, not a {kind.__name__}")
                fields[name] = kind._unpacked(value, f"{prefix}{name}.", arrays)
            elif isinstance(value, list):
                fields[name] = tuple(value)
        return cls(**fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenpairs(Record):
    """Eigenvalues, eigenvectors and how far each pair is from exact."""

    values: Tensor  # (k,) float64, in the order that `which` asks for
    vectors: Tensor  # (k, n) rows of unit norm, the operator's dtype
    residuals: Tensor  # (k,) float64, bounds on ||H v - theta v||
    converged: bool
    matvecs: int
    graph: str = ""  # "captured" as a CUDA graph, or "eager: " and why

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues with their residuals as error bars (needs matplotlib)."""
        from fasthessian.plots import plot_eigenpairs

        return plot_eigenpairs(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate(Record):
    """A Monte-Carlo mean with its standard error and confidence interval."""

    value: float
    stderr: float
    interval: tuple[float, float]  # (low, high) at `confidence`
    confidence: float
    samples: Tensor  # (s,) float64, the quadratic forms v'Hv
    matvecs: int
    converged: bool

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the running mean with its confidence band (needs matplotlib)."""
        from fasthessian.plots import plot_estimate

        return plot_estimate(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Density(Record):
    """Spectral density by stochastic Lanczos quadrature."""

    nodes: Tensor  # (probes, steps) float64, ascending per row; after a breakdown the last repeats
    weights: Tensor  # (probes, steps) float64, each row sums to 1; repeated nodes have weight 0
    grid: Tensor  # (g,) float64, eigenvalue axis
    values: Tensor  # (g,) float64, density on the grid; sum(values) * step = 1
    lower: Tensor  # (g,) float64, pointwise band over the probes
    upper: Tensor  # (g,) float64
    sigma: float  # standard deviation of the Gaussian kernel, in units of the eigenvalues
    matvecs: int
    graph: str = ""  # "captured" as a CUDA graph, or "eager: " and why

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density on a logarithmic axis with its band (needs matplotlib)."""
        from fasthessian.plots import plot_density

        return plot_density(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum(Record):
    """Both ends, the trace and the density of one operator."""

    top: Eigenpairs  # the largest, descending
    bottom: Eigenpairs  # the smallest, ascending
    trace: Estimate
    density: Density
    matvecs: int  # of all together

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density with the eigenvalues of both ends marked (needs matplotlib)."""
        from fasthessian.plots import plot_density

        known = [*self.top.values.tolist(), *self.bottom.values.tolist()]
        return plot_density(self.density, ax, eigenvalues=known)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSpectra(Record):
    """The outermost eigenvalue and the trace of each diagonal block, in the order of the model."""

    names: tuple[str, ...]  # (b,)
    sizes: Tensor  # (b,) float64, parameters
    values: Tensor  # (b,) float64, the eigenvalue of largest magnitude
    residuals: Tensor  # (b,) float64, bounds on ||H v - theta v||
    traces: Tensor  # (b,) float64
    errors: Tensor  # (b,) float64, half-width of the trace's confidence interval

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues as bars, with the traces in figures (needs matplotlib)."""
        from fasthessian.plots import plot_blocks

        return plot_blocks(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape(Record):
    """Loss along one or two directions; ``losses[i, j]`` at ``alphas[i] d0 + betas[j] d1``."""

    alphas: Tensor  # (p,) float64
    betas: Tensor  # (q,) float64, empty for one direction
    losses: Tensor  # (p,) or (p, q) float64

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve or the contour map of the loss (needs matplotlib)."""
        from fasthessian.plots import plot_landscape

        return plot_landscape(self, ax)
