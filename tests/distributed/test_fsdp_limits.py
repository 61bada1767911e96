"""fully_shard: unusual models that are right, those that are refused, and what torch cannot do."""

import copy
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import fasthessian as fh
from fasthessian.distributed import fsdp
from tests.support.fully_sharded import divided, problem, share
from tests.support.ranks import pool

pytestmark = pytest.mark.distributed
ROUTES = ("unshard", "regather")


@pytest.fixture(scope="module")
def two():
    yield from pool(2)


class Inner(nn.Module):
    """Is called by another method than ``forward``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def features(self, x):
        return self.layer(x)


class Outer(nn.Module):
    """Recomputes its first layers in the backward pass."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.LayerNorm(8))
        self.inner = Inner()

    def forward(self, x):
        return self.inner.features(checkpoint(self.block, x, use_reentrant=False))


class Exporting(nn.Module):
    """Shows NumPy the memory of its weight, which torch can then not free."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x):
        return self.layer(x) * float(self.layer.weight.detach().numpy().max() > 0)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x[..., None])[0][:, -1])


def mesh_of(*names):
    shape = {1: (2,), 2: (1, 2)}[len(names)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def special(name):
    """A model, and the same model divided in an unusual way."""
    torch.manual_seed(0)
    model, mesh = problem("norm")[0], mesh_of("shard")
    if name == "checkpoint and forward method":
        model = Outer().double()
    if name == "recurrent":
        model = Recurrent().double()
    if name == "exporting":
        model = Exporting().double()
    if name == "frozen":
        model[0].weight.requires_grad_(False)
    wrapped = copy.deepcopy(model)
    if name == "grouped":
        fully_shard([wrapped[1], wrapped[3]], mesh=mesh)
    if name == "checkpoint and forward method":
        fully_shard(wrapped.block, mesh=mesh)
        register_fsdp_forward_method(fully_shard(wrapped.inner, mesh=mesh), "features")
    ignored = {wrapped[1].weight} if name == "ignored" else None
    fully_shard(wrapped, mesh=mesh, **({"ignored_params": ignored} if ignored else {}))
    return model, torch.compile(wrapped, backend="eager") if name == "compiled" else wrapped


def apart(name, engine, options):
    model, wrapped = special(name)
    _, criterion, batches = problem("norm")
    A = fh.Hessian(wrapped, criterion, share(batches, 1), engine=engine, **options)
    whole = fh.Hessian(model, criterion, batches, **options)
    v = torch.randn(A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(3))
    return float((A @ v - whole @ v).norm() / (whole @ v).norm())


SPECIAL = ("checkpoint and forward method", "frozen", "ignored", "grouped", "compiled", "exporting")


@pytest.mark.parametrize("name", SPECIAL)
def test_unusual_models_are_those_of_one_process(two, name):
    for engine in ROUTES:
        assert max(two(apart, name, engine, {})) < 1e-12


@pytest.mark.parametrize(
    "options", [{"params": ["3.weight", "0.bias"]}, {"microbatch": 2}, {"mode": "train"}]
)
def test_options_act_as_with_one_process(two, options):
    for engine in ROUTES:
        assert max(two(apart, "whole", engine, options)) < 1e-12


@pytest.mark.parametrize("engine", ["forward", "difference"])
def test_engines_without_graphs_act_as_with_one_process(two, engine):
    assert max(two(apart, "whole", engine, {})) < 1e-6


def test_recurrent_layers_are_unsharded(two):
    assert max(two(apart, "recurrent", "auto", {"memory_budget": 10})) < 1e-12


def samples_counted_by_halves(engine):
    """A criterion whose terms are counted by gradients at moved parameters."""
    model, _, batches = problem("norm")

    def criterion(outputs, targets):
        return (outputs - nn.functional.one_hot(targets, 3)).square().mean(1).sum() / len(targets)

    A = fh.Hessian(divided(model), criterion, share(batches, 1), engine=engine)
    whole = fh.Hessian(model, criterion, batches)
    v = torch.ones(A.n, dtype=A.dtype)
    assert A.check().ok
    return float((A @ v - whole @ v).norm() / (whole @ v).norm())


@pytest.mark.parametrize("engine", ROUTES)
def test_terms_are_counted_and_checks_pass(two, engine):
    assert max(two(samples_counted_by_halves, engine)) < 1e-12


def refusal(case):
    """The error for a model or a group that is not supported; its advice is followed."""
    model, criterion, batches = problem("norm")
    options = {}
    if case == "tensor parallel":
        wrapped = copy.deepcopy(model)
        parallelize_module(
            wrapped, mesh_of("tensor"), {"0": ColwiseParallel(), "3": RowwiseParallel()}
        )
        full = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
        plain = copy.deepcopy(model)
        plain.load_state_dict(full)
        assert fh.Hessian(plain, criterion, batches).n == 107
    elif case == "both":
        wrapped, mesh = copy.deepcopy(model), mesh_of("data", "tensor")
        parallelize_module(
            wrapped, mesh["tensor"], {"0": ColwiseParallel(), "3": RowwiseParallel()}
        )
        fully_shard(wrapped, mesh=mesh["data"])
    elif case == "two meshes":
        wrapped = copy.deepcopy(model)
        fully_shard(
            wrapped[0], mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
        )
        fully_shard(wrapped, mesh=mesh_of("shard"))
        fh.Hessian(divided(model, mesh_of("shard")), criterion, batches)
    elif case == "recurrent":
        model, wrapped = special("recurrent")
        options = {"engine": "regather"}
        fh.Hessian(wrapped, criterion, batches, engine="unshard")
    elif case == "group":
        wrapped = divided(model)
        options = {"group": [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]}
        fh.Hessian(wrapped, criterion, batches, group=None)
        fh.Hessian(wrapped, criterion, batches, group=dist.group.WORLD)
    elif case == "not divided":
        wrapped, options = model, {"engine": "unshard"}
    elif case == "closure":
        wrapped = divided(model)
        with pytest.raises(TypeError, match="must be a plain tensor, got a DTensor") as found:
            fh.Hessian.from_closure(lambda: wrapped(batches[0][0]).sum(), wrapped.parameters())
        return str(found.value)
    with pytest.raises((ValueError, RuntimeError)) as found:
        fh.Hessian(wrapped, criterion, share(batches, 1), **options)
    return str(found.value)


REFUSED = {
    "tensor parallel": "'0.weight' is a DTensor with placements .* tensor parallelism is not supp",
    "both": "'0.weight' is a DTensor with placements .* tensor parallelism is not supported",
    "two meshes": "model is divided over 2 meshes of different ranks",
    "recurrent": "engine must be 'unshard' for this model, got 'regather': .* layer 'lstm'",
    "group": r"group must hold the ranks of the mesh .*, \[0, 1\], got \[[01]\]; use group=None",
    "not divided": "engine must be one of .*, got 'unshard', which is for fully_shard models",
    "closure": r"use Hessian\(model, criterion, data\)",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_in_one_line(two, case):
    for words in two(refusal, case):
        assert "\n" not in words
        assert re.search(REFUSED[case], words)


def parameter(device="cpu", mesh_device="cpu", local=None):
    placement = SimpleNamespace(is_shard=lambda: True)
    return SimpleNamespace(
        placements=(placement,),
        device=torch.device(device),
        device_mesh=SimpleNamespace(device_type=mesh_device),
        to_local=lambda: torch.zeros(2) if local is None else local,
    )


def test_offloaded_and_extended_parameters_are_refused():
    fsdp._check("w", parameter())
    with pytest.raises(RuntimeError, match="on cpu for a mesh of cuda devices: CPUOffloadPolicy"):
        fsdp._check("w", parameter(mesh_device="cuda"))
    extended = SimpleNamespace(fsdp_pre_all_gather=None)
    with pytest.raises(RuntimeError, match="which changes what FSDP gathers"):
        fsdp._check("w", parameter(local=extended))


def group_of_a_part():
    model, criterion, batches = problem("norm")
    mesh = mesh_of("replicate", "shard")
    wrapped = divided(model, mesh)
    with mock.patch.object(dist, "get_world_size", lambda *_: 4), pytest.raises(ValueError) as no:
        fh.Hessian(wrapped, criterion, batches)
    fh.Hessian(wrapped, criterion, batches, group=dist.new_group([0, 1]))
    return str(no.value)


def test_a_mesh_of_two_dimensions_over_some_ranks_needs_a_group(two):
    for words in two(group_of_a_part):
        assert "pass group=torch.distributed.new_group([0, 1])" in words


def outcomes():
    """What torch says to second derivatives through FSDP's own hooks."""
    model, criterion, batches = problem("norm")
    x, y = batches[0]
    found = {}
    wrapped = divided(model)
    loss = criterion(wrapped(x), y)
    try:
        torch.autograd.grad(loss, list(wrapped.parameters()), create_graph=True)
        found["grad"] = "a gradient"
    except RuntimeError as error:
        found["grad"] = str(error)
    wrapped = divided(model)
    with pytest.warns(UserWarning, match="create a reference cycle"):
        criterion(wrapped(x), y).backward(create_graph=True)
    graphs = [p.grad is not None and p.grad.requires_grad for p in wrapped.parameters()]
    found["backward"] = "a graph" if any(graphs) else "no graph"
    wrapped = divided(model)
    params = dict(wrapped.named_parameters())

    def loss_of(params):
        return criterion(torch.func.functional_call(wrapped, params, (x,)), y)

    try:
        torch.func.jvp(torch.func.grad(loss_of), (params,), (params,))
        found["forward"] = "a derivative"
    except Exception as error:
        found["forward"] = type(error).__name__
    return found


def test_torch_has_no_second_derivatives_through_the_hooks_of_fsdp(two):
    """If this fails, torch has learnt it: products could then leave FSDP's hooks in place."""
    for found in two(outcomes):
        assert found["grad"] != "a gradient"
        assert found["backward"] == "no graph"
        assert found["forward"] != "a derivative"
