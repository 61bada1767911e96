"""Operators of fully_shard models: products by both routes, and the model afterwards."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import fasthessian as fh
from tests.support.divided import divided, problem, share, trained
from tests.support.ranks import pool

pytestmark = pytest.mark.distributed
MODELS = ("norm", "convolutions", "gpt", "uneven")
ROUTES = ("unshard", "regather")
CLASSES = ("Hessian", "GaussNewton", "Fisher", "EmpiricalFisher")


@pytest.fixture(scope="module")
def two():
    yield from pool(2)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def distances(kind, engine, name, cut=2, dtype=torch.float64, **options):
    """How far an operator of a divided model is from that of one process."""
    model, criterion, batches = problem(kind, dtype)
    whole = getattr(fh, name)(model, criterion, batches, **options)
    with warnings.catch_warnings(action="error"):
        A = getattr(fh, name)(
            divided(model), criterion, share(batches, cut), engine=engine, **options
        )
        v = torch.randn(2, A.n, dtype=dtype, generator=torch.Generator().manual_seed(3))
        assert f"; {engine}: parameters of" in A.engine
        assert A.layout.names == whole.layout.names
        assert A.layout.shapes == whole.layout.shapes
        step = v[0] / v[0].norm()
        return (
            distance(A @ v, whole @ v),
            distance(A @ v, whole @ v),  # by kept graphs
            distance(A.gradient(), whole.gradient()),
            distance(A.gradient(step), whole.gradient(step)),
            abs(A.loss() - whole.loss()),
            abs(A.loss(step) - whole.loss(step)),
            distance(A.theta(), whole.theta()),
        )


@pytest.mark.parametrize("engine", ROUTES)
@pytest.mark.parametrize("kind", MODELS)
def test_products_are_those_of_one_process(two, kind, engine):
    for found in two(distances, kind, engine, "Hessian", 2, torch.float64):
        assert max(found) < 1e-12
    for found in two(distances, kind, engine, "Hessian", 2, torch.float32):
        assert max(found) < 1e-6


@pytest.mark.parametrize("engine", ROUTES)
@pytest.mark.parametrize("cut", [0, 1])
def test_shares_may_be_uneven_or_empty(two, cut, engine):
    for name in CLASSES:
        kind = "uneven" if name == "Hessian" else "gpt"
        for found in two(distances, kind, engine, name, cut):
            assert max(found) < 1e-12


def analyse(model, criterion, batches, engine):
    A = fh.Hessian(model, criterion, batches, engine=engine)
    fh.eigsh(A, 1, max_matvecs=2, tol=10.0)
    A.gradient()
    return A


def different(kind, engine, moment=None):
    """How many records of training differ if operators are made, used, and interrupted inside."""
    model, criterion, batches = problem(kind)
    batches = share(batches * 2, 4)
    made = []

    def interrupted(model):
        A = analyse(model, criterion, batches[:2], engine)
        calls = []

        def stop(module, inputs, outputs):
            calls.append(module)
            if len(calls) == 2:
                raise moment("stop")

        handle = list(model.modules())[-1].register_forward_hook(stop)  # also drops the graphs
        with pytest.raises(moment, match="stop"):
            A @ torch.ones(A.n, dtype=A.dtype)
        handle.remove()
        made.append(len(calls))

    def used(model):
        made.append(analyse(model, criterion, batches[:2], engine))

    before = trained(divided(model), criterion, batches)
    after = trained(divided(model), criterion, batches, used if moment is None else interrupted)
    assert len(made) == 3
    return sum(a != b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("engine", ROUTES)
@pytest.mark.parametrize("kind", ["convolutions", "gpt"])
def test_training_goes_on_bit_for_bit(two, kind, engine):
    assert two(different, kind, engine) == [0, 0]


@pytest.mark.parametrize("moment", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("engine", ROUTES)
def test_training_goes_on_after_an_interrupted_product(two, engine, moment):
    assert two(different, "norm", engine, moment) == [0, 0]
