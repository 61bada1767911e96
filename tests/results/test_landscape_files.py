"""Landscapes as CSV, as VTK's XML, as JSON of older versions, and as figures."""

import base64
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

import fasthessian as fh

F64 = torch.float64


def surface(losses=None):
    alphas, betas = torch.tensor([-1.0, 0.1, 2.0]).double(), torch.linspace(-1, 1, 4).double()
    values = 0.1 + alphas[:, None] ** 2 + 3 * betas**2 if losses is None else losses
    return fh.Landscape(alphas=alphas, betas=betas, losses=values)


def line(losses):
    losses = torch.tensor(losses, dtype=F64)
    alphas = torch.linspace(-1, 1, len(losses), dtype=F64)
    return fh.Landscape(alphas=alphas, betas=alphas[:0], losses=losses)


def read(path):
    """The arrays of a PolyData file by name, and the attributes of its piece."""
    root = ET.parse(path).getroot()
    assert root.attrib["type"] == "PolyData" and root.attrib["byte_order"] == "LittleEndian"
    arrays = {}
    for each in root.iter("DataArray"):
        data = base64.b64decode(each.text)
        size = int(np.frombuffer(data[:8], "<u8")[0])
        kind = {"Float64": "<f8", "Int64": "<i8"}[each.attrib["type"]]
        values = np.frombuffer(data[8:], kind)
        assert size == values.nbytes
        arrays[each.attrib["Name"]] = values.reshape(-1, int(each.attrib["NumberOfComponents"]))
    (piece,) = root.iter("Piece")
    return arrays, {name: int(value) for name, value in piece.attrib.items()}


def test_csv_has_a_row_per_point_with_all_digits(tmp_path):
    made = surface()
    made.losses[1, 2], made.losses[0, 0] = math.nan, math.inf
    made.to_csv(tmp_path / "a.csv")
    names, *rows = (tmp_path / "a.csv").read_text().splitlines()
    assert names == "alpha,beta,loss" and len(rows) == 12
    values = np.array([[float(word) for word in row.split(",")] for row in rows])
    np.testing.assert_array_equal(values[:, 2].reshape(3, 4), made.losses)
    np.testing.assert_array_equal(values[:, 0], made.alphas.repeat_interleave(4))
    np.testing.assert_array_equal(values[:, 1], made.betas.repeat(3))


def test_csv_of_a_curve_has_no_beta(tmp_path):
    line([2.0, 1.5]).to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "alpha,loss\n-1.0,2.0\n1.0,1.5\n"


def test_a_surface_is_quadrilaterals_of_finite_points(tmp_path):
    made = surface()
    made.losses[0, 1], made.losses[2, 3] = math.inf, -0.5
    made.to_vtp(tmp_path / "a.vtp")
    arrays, piece = read(tmp_path / "a.vtp")
    assert (piece["NumberOfPoints"], piece["NumberOfPolys"], piece["NumberOfLines"]) == (11, 4, 0)
    points, cells = arrays["Points"], arrays["connectivity"].reshape(-1, 4)
    assert arrays["offsets"].ravel().tolist() == [4, 8, 12, 16]
    np.testing.assert_array_equal(points[:, 2:], arrays["loss"])
    known = {(a, b): c for a, b, c in points.tolist()}
    for i, a in enumerate(made.alphas.tolist()):
        for j, b in enumerate(made.betas.tolist()):
            assert (i, j) == (0, 1) or known[a, b] == made.losses[i, j]
    for cell in cells:
        corners = points[cell, :2]
        edges = np.roll(corners, -1, 0) - corners  # around: each edge is along one axis
        assert ((edges == 0).sum(1) == 1).all() and not edges.sum(0).any()
    log = arrays["log10_loss"].ravel()
    assert np.isnan(log).sum() == 1
    np.testing.assert_allclose(10 ** log[:-1], arrays["loss"].ravel()[:-1])


def test_a_curve_is_lines_between_finite_points(tmp_path):
    line([4.0, 1.0, math.nan, 2.0, 3.0, math.inf]).to_vtp(tmp_path / "a.vtp")
    arrays, piece = read(tmp_path / "a.vtp")
    assert (piece["NumberOfPoints"], piece["NumberOfLines"], piece["NumberOfPolys"]) == (4, 2, 0)
    assert arrays["connectivity"].ravel().tolist() == [0, 1, 2, 3]
    assert arrays["Points"][:, 1].tolist() == [0] * 4
    line([math.nan] * 3).to_vtp(tmp_path / "b.vtp")
    arrays, piece = read(tmp_path / "b.vtp")
    assert piece["NumberOfPoints"] == piece["NumberOfLines"] == 0


@pytest.mark.parametrize("name", ["to_csv", "to_vtp"])
def test_an_existing_file_stays_unless_overwritten(name, tmp_path):
    path, write = tmp_path / "a", getattr(surface(), name)
    write(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists; pass overwrite=True"):
        getattr(line([1.0, 2.0]), name)(path)
    assert path.read_bytes() == before
    getattr(line([1.0, 2.0]), name)(path, overwrite=True)
    assert path.read_bytes() != before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        write(tmp_path / "absent" / "a")


def test_landscapes_of_earlier_versions_are_read(tmp_path):
    made = surface()
    content = made.to_json()
    assert content["trajectory"] == [[], []]
    del content["trajectory"]
    back = fh.Landscape.from_json(content)
    assert torch.equal(back.losses, made.losses) and back.trajectory.shape == (2, 0)
    header = '{"record": "Landscape", "scalars": {}}'
    arrays = {name: np.asarray(content[name]) for name in ("alphas", "betas", "losses")}
    np.savez(tmp_path / "a.npz", __record__=np.array(header), **arrays)
    assert fh.Landscape.load(tmp_path / "a.npz").trajectory.shape == (2, 0)


def lines(ax):
    return {each.get_label(): each for each in ax.lines}


def test_the_trajectory_is_drawn_on_the_contours():
    pytest.importorskip("matplotlib")
    made = surface()
    path = torch.tensor([[2.0, 1.0, 0.0], [0.5, 0.2, 0.0]], dtype=F64)
    drawn = fh.Landscape(made.alphas, made.betas, made.losses, path).plot()
    np.testing.assert_array_equal(lines(drawn)["trajectory"].get_xydata(), path.T)
    assert "trajectory" not in lines(made.plot()) and "the model" in lines(drawn)


def test_scales_are_logarithmic_above_two_decades():
    pytest.importorskip("matplotlib")
    for top, scale in ((50.0, "linear"), (1e4, "log")):
        ax = line([top, 1.0, 2.0, math.inf, 3.0]).plot()
        assert ax.get_yscale() == scale and ("log" in ax.get_ylabel()) == (scale == "log")
        ax.figure.canvas.draw()
        values = ax.lines[0].get_ydata()
        assert np.isnan(values[3]) and np.isfinite(np.delete(values, 3)).all()
        losses = torch.full((3, 4), 2.0, dtype=F64)
        losses[0, 0], losses[1, 1], losses[2, 2] = 1.0, top, math.nan
        _, bar = (ax := surface(losses).plot()).figure.axes
        assert ("log" in bar.get_ylabel()) == (scale == "log")


def test_the_model_is_marked_only_inside_the_grid():
    pytest.importorskip("matplotlib")
    made = line([1.0, 2.0, 3.0])
    moved = fh.Landscape(made.alphas + 2, made.betas, made.losses)
    assert "the model" in lines(made.plot()) and "the model" not in lines(moved.plot())
