"""What the tests of PyHessian scripts share: its names, a small problem, vectors of its size."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import fasthessian.pyhessian
from tests.support.pyhessian_cases import batches, mean_loss_hessian, mlp

MARKS = [
    pytest.mark.usefixtures("installed"),
    pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:Using backward"),
]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The old names in this process, and an empty folder for what scripts write."""
    names = ("pyhessian", "density_plot")
    held = {name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] in names}
    for name in held:
        del sys.modules[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    fasthessian.pyhessian.install()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]
    sys.modules.update(held)


def problem(sizes=(12,)):
    """A model in eval mode, its batches, and the dense Hessian."""
    model, data = mlp().eval(), batches(sizes)
    return model, data, mean_loss_hessian(model, data)


def flat(group):
    return torch.cat([x.detach().reshape(-1) for x in group]).double()


def units(params):
    """The unit vectors as lists of tensors."""
    sizes = [p.numel() for p in params]
    for row in torch.eye(sum(sizes)):
        yield [x.view(p.shape) for x, p in zip(row.split(sizes), params, strict=True)]


def near(value, expected, rel=0.02):
    assert float(value) == pytest.approx(float(expected), rel=rel)


def about(samples, expected):
    """The mean of the samples is the expected value, to five standard errors."""
    samples = np.array(samples)
    assert len(samples) >= 200
    assert abs(samples.mean() - float(expected)) < 5 * samples.std() / len(samples) ** 0.5
