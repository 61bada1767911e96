"""Random vectors divided over the dimension "probe" of a mesh: the numbers of one process."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fasthessian as fh

pytestmark = pytest.mark.distributed


def operators(shape, batches=1):
    """The Hessian on a mesh (probe, data), and that of one process; its batches on each rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x, y = torch.randn(20, 6).double(), torch.randint(4, (20,))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("probe", "data"))
    rank, size = mesh.get_local_rank("data"), shape[1]
    criterion = nn.CrossEntropyLoss()
    shares = [
        [*zip(x[rank::size].chunk(batches), y[rank::size].chunk(batches), strict=True)]
        for rank in range(size)
    ]
    A = fh.Hessian(model, criterion, shares[rank], group=mesh)
    return A, fh.Hessian(model, criterion, (x, y) if batches == 1 else [*itertools.chain(*shares)])


def numbers(shape):
    """How far results on the mesh are from those of one process, and their bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fh.ConvergenceWarning)
        return distances(shape)


def distances(shape):
    A, whole = operators(shape)
    found, bits = {}, []
    before = A.matvecs
    for probes in (1, 3):
        a, b = (fh.density(each, steps=9, probes=probes) for each in (A, whole))
        found[f"density {probes}"] = float((a.values - b.values).abs().max() / b.values.max())
        assert a.matvecs == b.matvecs == 9 * probes
        bits.append(a.nodes.tolist())
    for options in ({"rtol": 0.2}, {"rtol": 0.01, "max_matvecs": 43}):
        options["method"] = "hutchinson"
        a, b = (fh.trace(each, **options) for each in (A, whole))
        assert len(a.samples) == len(b.samples)
        found[f"trace {options}"] = float((a.samples - b.samples).abs().max())
        found[f"interval {options}"] = abs(a.interval[0] - b.interval[0])
        bits.append(a.samples.tolist())
    for options in ({"rtol": 0.3}, {"rtol": 0.01, "max_matvecs": 7}):
        options |= {"method": "hutchinson", "sampling": "per-batch"}
        a, b = (fh.trace(each, **options) for each in operators(shape, batches=5))
        assert len(a.samples) == len(b.samples) and a.matvecs >= b.matvecs
        found[f"trace {options}"] = float((a.samples - b.samples).abs().max())
        found[f"interval {options}"] = abs(a.interval[0] - b.interval[0])
        bits.append(a.samples.tolist())
    a, b = (fh.spectrum(each, 2, steps=9, probes=4, rtol=0.1) for each in (A, whole))
    found["top"] = float((a.top.values - b.top.values).abs().max())
    found["spectrum"] = float((a.density.nodes - b.density.nodes).abs().max())
    found["its trace"] = abs(a.trace.value - b.trace.value)
    return found, bits, A.matvecs - before, whole.matvecs


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)])
def test_results_are_those_of_one_process(four, shape):
    results = four(numbers, shape)
    for found, bits, made, alone in results:
        assert max(found.values()) < 1e-9, found
        assert bits == results[0][1]  # the same bits on all ranks
        assert made < 0.9 * alone if shape[0] > 1 else made == alone


def refused():
    """What is said of a checkpoint on a mesh of probes, and of other meshes."""
    said = []
    A, _ = operators((2, 2))
    try:
        fh.density(A, checkpoint="never.fh")
    except fh.InputError as error:
        said.append(str(error))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "data"))
    try:
        fh.Hessian(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 1)), group=mesh)
    except fh.InputError as error:
        said.append(str(error))
    return said


def test_what_a_mesh_cannot_do_is_refused(four):
    for checkpoint, other in four(refused):
        assert "mesh['data']" in checkpoint and "'probe'" in checkpoint
        assert "named 'probe' and 'data', got 2 named ('a', 'data')" in other
