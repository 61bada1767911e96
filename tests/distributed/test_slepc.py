"""Sharded eigenvalues against SLEPc, an independent library for distributed eigenproblems."""

import glob
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

import fasthessian as fh

pytestmark = pytest.mark.distributed
PYTHON = "/usr/bin/python3"
PATHS = [
    path
    for kind in ("slepcdir/slepc*", "petscdir/petsc*")
    for path in sorted(glob.glob(f"/usr/lib/{kind}/*real*/lib/python3*/dist-packages"))
]
PROGRAM = Path(__file__).parents[1] / "support" / "slepc.py"
missing = pytest.mark.skipif(
    len(PATHS) < 2 or not os.path.exists(PYTHON),
    reason="SLEPc is not installed (Debian: apt install python3-slepc4py-real)",
)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    return model, nn.CrossEntropyLoss(), (torch.randn(30, 6).double(), torch.arange(30) % 4)


def ours(count):
    model, criterion, (x, y) = problem()
    rank, size = dist.get_rank(), dist.get_world_size()
    A = fh.Hessian(model, criterion, (x[rank::size], y[rank::size]), group=dist.group.WORLD)
    return fh.eigsh(A, count, "LA", tol=1e-9, sharded=True).values.tolist()


def dense():
    """The Hessian as a matrix, made by torch."""
    model, criterion, (x, y) = problem()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(theta):
        pieces = zip(shapes.items(), theta.split(sizes), strict=True)
        params = {name: piece.view(shape) for (name, shape), piece in pieces}
        return criterion(functional_call(model, params, (x,)), y)

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hessian(loss, theta).numpy()


@missing
def test_eigenvalues_are_those_of_slepc(two, tmp_path):
    path = tmp_path / "matrix.npy"
    np.save(path, dense())
    command = [PYTHON, str(PROGRAM), str(path), "5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    for values in two(ours, 5):
        found = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
