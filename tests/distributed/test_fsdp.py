"""Operators of fully_shard models: products by both routes, and the model afterwards."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.multiprocessing.reductions import StorageWeakRef

import fasthessian as fh
from fasthessian.distributed.fsdp import Shards
from fasthessian.operators.torch_state.gathered import Gathered
from tests.support.fully_sharded import divided, problem, share, trained
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


def vector(A, seed=3):
    return torch.randn(A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(seed))


def evaluations(engine):
    """How often the model runs in each of three products."""
    model, criterion, batches = problem("norm")
    calls, wrapped = [], divided(model)
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    A = fh.Hessian(wrapped, criterion, share(batches, 2), engine=engine)
    found = []
    for _ in range(3):
        calls.clear()
        A @ vector(A)
        found.append(len(calls))
    return found


@pytest.mark.parametrize("engine", ROUTES)
def test_graphs_are_kept_from_product_to_product(two, engine):
    # the graph of the first batch is kept from the check of the loss
    assert two(evaluations, engine) == [[1, 0, 0], [0, 0, 0]]


def distances(kind, engine, dtype):
    """How far an operator of a divided model is from that of one process."""
    model, criterion, batches = problem(kind, dtype)
    whole = fh.Hessian(model, criterion, batches, weight_decay=0.1)
    A = fh.Hessian(divided(model), criterion, share(batches, 2), engine=engine, weight_decay=0.1)
    v = vector(A)
    step = v / v.norm()
    assert f"; {engine}: parameters of" in A.engine
    assert (A.layout.names, A.layout.shapes) == (whole.layout.names, whole.layout.shapes)
    assert torch.equal(A.theta(), whole.theta())
    return (
        distance(A @ v, whole @ v),
        distance(A @ v, whole @ v),  # by kept graphs
        distance(A.gradient(step), whole.gradient(step)),
        abs(A.loss(step) - whole.loss(step)) / whole.loss(step),
    )


@pytest.mark.parametrize("engine", ROUTES)
@pytest.mark.parametrize("kind", MODELS)
def test_products_are_those_of_one_process(two, kind, engine):
    for found in two(distances, kind, engine, torch.float64):
        assert max(found) < 1e-12
    for found in two(distances, kind, engine, torch.float32):
        assert max(found) < 1e-6


def distances_of_shares(kind, engine, cut):
    model, criterion, batches = problem(kind)
    wrapped = divided(model)
    found = []
    for name in CLASSES:
        A = getattr(fh, name)(wrapped, criterion, share(batches, cut), engine=engine)
        whole = getattr(fh, name)(model, criterion, batches)
        found.append(distance(A @ vector(A), whole @ vector(A)))
    return found


@pytest.mark.parametrize("engine", ROUTES)
@pytest.mark.parametrize(("kind", "cut"), [("norm", 0), ("uneven", 1)])
def test_shares_may_be_uneven_or_empty(two, kind, cut, engine):
    for found in two(distances_of_shares, kind, engine, cut):
        assert max(found) < 1e-12


def changed_on_one_rank(engine):
    """The distance from one process after only the first rank's shard of a parameter changed."""
    model, criterion, batches = problem("norm")
    wrapped = divided(model)
    A = fh.Hessian(wrapped, criterion, share(batches, 2), engine=engine)
    v = vector(A)
    before = A @ v
    with torch.no_grad():
        model[0].weight[0] += 0.5
        if dist.get_rank() == 0:
            wrapped[0].weight.to_local()[0] += 0.5
    whole = fh.Hessian(model, criterion, batches) @ v
    return distance(A @ v, whole), distance(before, whole)


@pytest.mark.parametrize("engine", ROUTES)
def test_a_change_of_one_shard_is_seen_by_all_ranks(two, engine):
    for now, before in two(changed_on_one_rank, engine):
        assert now < 1e-12 < 1e-3 < before


def blocks_and_spectrum(engine):
    model, criterion, batches = problem("norm")
    A = fh.Hessian(divided(model), criterion, share(batches, 1), engine=engine)
    whole = fh.Hessian(model, criterion, batches)
    found = fh.eigsh(A, 3, sharded=True).values - fh.eigsh(whole, 3).values
    mine, theirs = A.blocks("layer"), whole.blocks("layer")
    assert list(mine) == list(theirs)
    apart = [distance(mine[k] @ vector(mine[k]), theirs[k] @ vector(mine[k])) for k in mine]
    surfaces = [fh.landscape(each, vector(whole), 0.1, 3).losses for each in (A, whole)]
    other, _, _ = problem("norm")
    with torch.no_grad():
        other[0].weight += 1.0
    ends = fh.toward(A, divided(other)), fh.toward(whole, other)
    return float(found.abs().max()), max(apart), distance(*surfaces), distance(*ends)


@pytest.mark.parametrize("engine", ROUTES)
def test_blocks_eigenvalues_and_landscapes_are_those_of_one_process(two, engine):
    for found in two(blocks_and_spectrum, engine):
        assert max(found) < 1e-10


def analyse(model, criterion, batches, engine):
    A = fh.Hessian(model, criterion, batches, engine=engine)
    fh.density(A, steps=3)
    A.gradient()
    return A


def different(kind, engine, moment=None):
    """How many records of training differ if operators are made, used, and interrupted inside."""
    model, criterion, batches = problem(kind)
    batches = share(batches * 2, 3)
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


def held(gathered):
    """The bytes of the leaves that have memory; others have one number for all entries."""
    leaves = gathered._leaves.values()
    return sum(p.untyped_storage().nbytes() for p in leaves if p.untyped_storage().nbytes() > 4)


def memory(engine):
    """The most bytes of full parameters that were alive, over those of all; and those at the end.

    Whatever keeps a gathered parameter alive counts: a graph, a module, or a leaf.
    """
    torch.manual_seed(0)
    layers = [each for _ in range(8) for each in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*layers)
    size = sum(p.numel() * 4 for p in model.parameters())
    alive, opened, most = [], [], [0]
    gather, begin = Shards.full, Gathered._begin

    def watched_begin(gathered):
        opened.append(gathered)
        begin(gathered)

    def watched_gather(shards, name):
        found = gather(shards, name)
        alive.append((StorageWeakRef(found.untyped_storage()), found.numel() * 4))
        bytes = sum(count for ref, count in alive if not ref.expired())
        most[0] = max(most[0], bytes + held(opened[-1]))
        return found

    with (
        mock.patch.object(Shards, "full", watched_gather),
        mock.patch.object(Gathered, "_begin", watched_begin),
    ):
        data = [(torch.randn(3, 16), torch.randn(3, 16))]
        A = fh.Hessian(divided(model), nn.MSELoss(), data, engine=engine)
        A @ vector(A)
    left = sum(count for ref, count in alive if not ref.expired()) + held(opened[-1])
    return most[0] / size, left


def test_regather_never_holds_all_parameters(two):
    for most, left in two(memory, "unshard"):
        assert most >= 1.0
        assert left == 0  # kept graphs share the memory that was freed
    for most, left in two(memory, "regather"):
        assert most < 0.35
        assert left == 0


def resumed(engine, folder):
    """Whether a run of another operator of the same model goes on from a checkpoint."""
    model, criterion, batches = problem("norm")
    mine = share(batches, 2)
    A = fh.Hessian(divided(model), criterion, mine, engine=engine)
    first = fh.density(A, steps=4, checkpoint=folder)
    again = fh.resume(folder, fh.Hessian(divided(model), criterion, mine, engine=engine))
    whole = fh.density(fh.Hessian(model, criterion, batches), steps=4)
    return torch.equal(first.nodes, again.nodes), distance(first.nodes, whole.nodes)


@pytest.mark.parametrize("engine", ROUTES)
def test_runs_are_saved_and_resumed(two, engine, tmp_path):
    for same, apart in two(resumed, engine, str(tmp_path / "run.fh")):
        assert same
        assert apart < 1e-10


def by_memory(budget):
    model, criterion, batches = problem("norm")
    size = sum(p.numel() * 8 for p in model.parameters())
    budget = size - (dist.get_rank() == 1) if budget == "less on one rank" else size
    A = fh.Hessian(divided(model), criterion, share(batches, 2), memory_budget=budget)
    return A.engine


def test_the_route_is_chosen_by_memory_for_all_ranks(two):
    for words in two(by_memory, "enough"):
        assert "; unshard: parameters of 856 B by fully_shard, within the budget of 856 B" in words
    for words in two(by_memory, "less on one rank"):
        assert "; regather: parameters of 856 B by fully_shard, above the budget of" in words


def mixed(engine):
    """How far a model in mixed precision is from what FSDP computes, and from a bfloat16 model."""
    model, criterion, batches = problem("norm", torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped, (x, y) = divided(model, mp_policy=policy).eval(), batches[0]
    A = fh.Hessian(wrapped, criterion, [(x, y)], engine=engine)
    low = fh.Hessian(model.bfloat16(), criterion, (x.bfloat16(), y))
    assert A._relative_error() == torch.finfo(torch.bfloat16).eps
    assert A.dtype == torch.float32
    with torch.no_grad():
        own = float(criterion(wrapped(x), y))
    return A.engine, A.loss() - own, distance(A @ vector(A), low @ vector(A))


@pytest.mark.parametrize("engine", ROUTES)
def test_mixed_precision_is_that_of_the_module(two, engine):
    for words, off, apart in two(mixed, engine):
        assert "; MixedPrecisionPolicy(param_dtype=bfloat16): relative error 7.8e-03" in words
        assert off == 0
        assert apart < 1e-6


def hybrid(shape, engine):
    model, criterion, batches = problem("norm")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    A = fh.Hessian(divided(model, mesh), criterion, share(batches, 1), engine=engine)
    whole = fh.Hessian(model, criterion, batches)
    return distance(A @ vector(A), whole @ vector(A))


@pytest.mark.parametrize("engine", ROUTES)
def test_a_mesh_may_replicate_and_shard(two, engine):
    for shape in ((1, 2), (2, 1)):
        assert max(two(hybrid, shape, engine)) < 1e-12
