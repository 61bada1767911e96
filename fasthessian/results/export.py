"""Loss landscapes in the formats of other programs: CSV, and VTK PolyData for ParaView."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

from fasthessian.results.drawable import Losses

TYPES = {"<f8": "Float64", "<i8": "Int64"}  # of VTK


def csv(landscape: Losses) -> bytes:
    """One row per grid point: alpha, beta (for two directions), loss."""
    names, columns = "alpha,beta,loss", _points(landscape)
    if not len(landscape.betas):
        names, columns = "alpha,loss", columns[:, [0, 2]]
    lines = [names, *(",".join(map(repr, row)) for row in columns.tolist())]
    return ("\n".join(lines) + "\n").encode()


def vtp(landscape: Losses) -> bytes:
    """VTK's XML PolyData with inline binary data: quadrilaterals, or lines for one direction."""
    points = _points(landscape)
    finite = np.isfinite(points[:, 2])
    number = np.cumsum(finite) - 1  # of each finite point among these
    grid = np.arange(len(points)).reshape(landscape.losses.shape)
    if grid.ndim == 1:
        cells = np.stack([grid[:-1], grid[1:]], axis=1)
    else:
        corners = (grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:])  # around the cell
        cells = np.stack([corner.ravel() for corner in corners], axis=1)
    cells = number[cells[finite[cells].all(axis=1)]]
    points = points[finite]
    positive = np.where(points[:, 2] > 0, points[:, 2], np.nan)
    kind, other = ("Lines", "Polys") if grid.ndim == 1 else ("Polys", "Lines")
    return f"""<?xml version="1.0"?>
<VTKFile type="PolyData" version="1.0" byte_order="LittleEndian" header_type="UInt64">
<PolyData>
<Piece NumberOfPoints="{len(points)}" NumberOfVerts="0" NumberOf{kind}="{len(cells)}"
 NumberOf{other}="0" NumberOfStrips="0">
<PointData Scalars="loss">
{_array("loss", points[:, 2])}
{_array("log10_loss", np.log10(positive))}
</PointData>
<Points>
{_array("Points", points)}
</Points>
<{kind}>
{_array("connectivity", cells)}
{_array("offsets", cells.shape[1] * np.arange(1, len(cells) + 1))}
</{kind}>
</Piece>
</PolyData>
</VTKFile>
""".encode()


def _points(landscape: Losses) -> npt.NDArray[np.float64]:
    """(alpha, beta, loss) of each grid point (p, 3) or (p * q, 3); beta is 0 for one direction."""
    alphas, betas = landscape.alphas.numpy(), landscape.betas.numpy()
    grid = np.meshgrid(alphas, betas if len(betas) else np.zeros(1), indexing="ij")
    return np.stack([*(axis.ravel() for axis in grid), landscape.losses.numpy().ravel()], axis=1)


def _array(name: str, values: npt.NDArray[Any]) -> str:
    """An element DataArray: the number of bytes and the bytes, in base64."""
    data = np.ascontiguousarray(values, dtype="<i8" if values.dtype.kind == "i" else "<f8")
    width = 3 if name == "Points" else 1
    text = base64.b64encode(np.array(data.nbytes, "<u8").tobytes() + data.tobytes()).decode()
    return (
        f'<DataArray type="{TYPES[data.dtype.str]}" Name="{name}" NumberOfComponents="{width}" '
        f'format="binary">{text}</DataArray>'
    )
