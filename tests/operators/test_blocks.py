"""Diagonal blocks: their parameters, their matrices, and products of all blocks in one pass."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fasthessian as fh
from tests.support.models import EACH_ENGINE, PROBLEMS, columns, gauss_newton, mismatch, refused

F32, F64 = torch.float32, torch.float64


class Net(nn.Module):
    """A parameter of the model, a list of stages, and blocks of sizes 1, 8, 15, 24 and 24."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) for _ in range(2)
        )
        self.head = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor([1.3]))
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.stem(x) * self.scale
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def made(dtype: torch.dtype = F64) -> tuple[Net, nn.Module, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(10, 4).to(dtype), torch.randint(2, (10,))
    return (
        Net().to(dtype),
        nn.CrossEntropyLoss(),
        [(x[:4], y[:4]), (x[4:9], y[4:9]), (x[9:], y[9:])],
    )


def operator(dtype: torch.dtype = F64, **options: Any) -> fh.Hessian:
    return fh.Hessian(*made(dtype), **options)


def names(blocks: Any) -> dict[str, list[str]]:
    """The parameters of each block."""
    return {
        key: list(B.unflatten(torch.zeros(B.n, dtype=B.dtype))) for key, B in blocks.items()
    }  # fmt: skip


def places(A: Any, B: Any) -> Tensor:
    """The indices of the parameters of the block B in a vector of A."""
    index = A.unflatten(torch.arange(A.n, dtype=F64))
    return torch.cat([index[name].flatten() for name in names({"": B})[""]]).long()


def test_layers_are_the_modules_that_own_parameters() -> None:
    found = names(operator().blocks("layer"))
    roots = [key for key, inside in found.items() if inside == ["scale"]]
    assert len(roots) == 1
    own = {"stem", "layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2", "head"}
    assert set(found) == {*own, *roots}
    assert all(set(found[key]) == {f"{key}.weight", f"{key}.bias"} for key in own)
    model, criterion, data = PROBLEMS["transformer"].make()  # the head is tied to the embedding
    layers = names(fh.Hessian(model, criterion, data).blocks("layer"))
    assert set(layers) == {"embed", "norm", "qkv", "out"} and layers["embed"] == ["embed.weight"]


@pytest.mark.parametrize("wraps", [0, 1, 2])
def test_stages_are_the_children_after_the_common_prefix(wraps: int) -> None:
    model, criterion, data = made()
    prefix = "inner." * wraps
    outer: nn.Module = model
    for _ in range(wraps):
        outer = Wrapped(outer)
    found = names(fh.Hessian(outer, criterion, data).blocks("stage"))
    groups = {frozenset(name.removeprefix(prefix) for name in inside) for inside in found.values()}
    inside = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert groups == {
        frozenset({"stem.weight", "stem.bias"}),
        frozenset(f"layers.0.{name}" for name in inside),
        frozenset(f"layers.1.{name}" for name in inside),
        frozenset({"head.weight", "head.bias"}),
        frozenset({"scale"}),
    }
    for key in ("stem", "layers.0", "layers.1", "head"):
        assert any(found_key.endswith(key) for found_key in found)


def test_expressions_mappings_and_callables_name_the_blocks() -> None:
    A = operator()
    assert {key: B.n for key, B in A.blocks(r"layers\.(\d)").items()} == {"0": 24, "1": 24}
    assert {key: B.n for key, B in A.blocks(re.compile("weight|bias")).items()} == {
        "weight": 12 + 4 * 9 + 6, "bias": 3 + 4 * 3 + 2,
    }  # fmt: skip
    both = A.blocks({"ends": "^(stem|head)", "norms": "scale"})
    assert list(both) == ["ends", "norms"] and [B.n for B in both.values()] == [23, 1]
    chosen = A.blocks(lambda name: name[-4:] if name.startswith("head") else None)
    assert names(chosen) == {"ight": ["head.weight"], "bias": ["head.bias"]}


@pytest.mark.parametrize("engine", EACH_ENGINE)
@pytest.mark.parametrize("curvature", [fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_block_is_the_diagonal_block_of_the_dense_matrix(
    name: str, curvature: Any, engine: str
) -> None:
    problem = PROBLEMS[name]
    model, criterion, data = problem.make()
    A = curvature(model, criterion, data, engine=engine)
    if curvature is fh.EmpiricalFisher:
        H = columns(fh.EmpiricalFisher(model, criterion, data))  # see test_empirical_fisher.py
    else:
        H = (problem.dense if curvature is fh.Hessian else gauss_newton)(model, criterion, data)
    matvecs = A.matvecs
    for key, B in A.blocks("layer").items():
        at = places(A, B)
        assert mismatch(B, H[at][:, at]) < (1e-6 if engine == "difference" else 1e-10), key
        assert B.matvecs == 4 and A.matvecs == matvecs


def test_a_block_is_an_operator() -> None:
    A = operator()
    blocks = A.blocks("stage")
    B, other = blocks["layers.1"], blocks["head"]
    assert B.n == 24 and B.dtype is F64 and B.device == A.device and B.matvecs == 0
    assert isinstance(B, fh.SymmetricOperator)
    v = torch.linspace(-1, 1, 24, dtype=F64)
    parts = B.unflatten(v)
    assert parts["layers.1.2.weight"].shape == (3, 3)
    assert torch.equal(B.flatten(parts), v)
    assert len(B.layout.names) == 4
    at = places(A, B)
    whole = torch.zeros(A.n, dtype=F64)
    whole[at] = v
    torch.testing.assert_close(B @ v, (A @ whole)[at], rtol=1e-12, atol=1e-14)
    assert B.matvecs == 1 and other.matvecs == 0 and A.matvecs == 1
    assert np.allclose(B.to_scipy() @ v.numpy(), (B @ v).numpy(), rtol=1e-12)
    found = fh.eigsh(B, 2, tol=1e-9)
    want = torch.linalg.eigvalsh(columns(B))
    top = want[want.abs().argsort(descending=True)[:2]]
    torch.testing.assert_close(found.values.sort().values, top.sort().values, rtol=1e-8, atol=0)
    refused(lambda: B @ torch.ones(A.n, dtype=F64), ValueError, r"v must have shape \(24,\)")


def equal(a: Any, b: Any) -> bool:
    """Whether all fields of two records are equal, bit for bit."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


ALGORITHMS: dict[str, Any] = {
    "eigsh": lambda A, **o: fh.eigsh(A, 3 if isinstance(A, dict) else min(3, A.n), "BE", **o),
    "trace": lambda A, **o: fh.trace(A, rtol=0.3, max_matvecs=40, **o),
    "density": lambda A, **o: fh.density(A, steps=8, probes=2, seed=5, **o),
    "density without a basis": lambda A, **o: fh.density(A, steps=5, basis="none", **o),
}


@pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
@pytest.mark.parametrize(
    ("name", "engine", "dtype"),
    [
        *((name, "retained", F32) for name in ALGORITHMS),
        *((name, "recompute", F64) for name in ALGORITHMS),
        ("density without a basis", "forward", F64),
        ("density without a basis", "difference", F64),
    ],
)
@pytest.mark.slow
def test_blocks_together_have_the_bits_of_separate_runs(
    name: str, engine: str, dtype: torch.dtype
) -> None:
    run, options = ALGORITHMS[name], {"engine": engine}
    for curvature in (fh.Hessian, fh.GaussNewton) if name == "eigsh" else (fh.Hessian,):
        blocks = curvature(*made(dtype), **options).blocks("layer")
        together = run(blocks)
        assert list(together) == list(blocks) and isinstance(together, dict)
        for key, found in together.items():
            fresh = curvature(*made(dtype), **options).blocks("layer")[key]
            alone = run(fresh)
            assert equal(found, alone), key
            assert blocks[key].matvecs == fresh.matvecs == found.matvecs


def test_a_small_block_returns_fewer_than_k_pairs() -> None:
    blocks = operator().blocks("layer")
    found = fh.eigsh(blocks, 9, tol=1e-6)
    assert {key: len(pairs.values) for key, pairs in found.items()} == {
        key: min(9, B.n) for key, B in blocks.items()
    }
    assert all(
        pairs.vectors.shape == (min(9, blocks[k].n), blocks[k].n) for k, pairs in found.items()
    )
    refused(lambda: fh.eigsh(blocks["head"], 9), ValueError, "k must be")


@pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_all_blocks_advance_in_one_pass_over_the_data(name: str) -> None:
    run, passes = ALGORITHMS[name], {}
    for key in operator().blocks("layer"):
        model = made()
        B = fh.Hessian(*model, engine="recompute").blocks("layer")[key]
        B @ torch.ones(B.n, dtype=F64)
        model[0].forwards = 0
        run(B)
        passes[key] = model[0].forwards / 3
    model = made()
    blocks = fh.Hessian(*model, engine="recompute").blocks("layer")
    for B in blocks.values():
        B @ torch.ones(B.n, dtype=F64)
    model[0].forwards = 0
    run(blocks)
    assert model[0].forwards / 3 == max(passes.values()) < sum(passes.values()) / 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_progress_ends_at_the_products_of_all_blocks(name: str) -> None:
    calls: list[tuple[int, int | None]] = []
    blocks = operator().blocks("stage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fh.ConvergenceWarning)
        found = ALGORITHMS[name](blocks, progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(set(done))
    assert done[-1] == sum(B.matvecs for B in blocks.values())
    assert done[-1] == sum(result.matvecs for result in found.values())
    assert all(total is None or total >= now for now, total in calls)


def test_a_warning_names_its_block() -> None:
    for run in (
        lambda blocks: fh.eigsh(blocks, 2, tol=1e-12, max_matvecs=3),
        lambda blocks: fh.trace(blocks, rtol=1e-9, max_matvecs=16),
    ):
        blocks = operator().blocks("stage")
        with pytest.warns(fh.ConvergenceWarning) as caught:
            found = run(blocks)
        lines = [str(warning.message) for warning in caught]
        for key, result in found.items():
            assert sum(key in line for line in lines) == (not result.converged), (key, lines)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "pattern": ("nothing", ValueError, "'nothing' matches no parameter"),
    "pattern of a block": (
        {"a": "stem", "b": "nothing"}, ValueError, "'nothing' of 'b' matches no parameter",
    ),
    "overlap": ({"a": "stem", "b": "weight"}, ValueError, "'a' and 'b' overlap"),
    "empty": ({}, ValueError, "empty"),
    "no expression": ("(", ValueError, "no regular expression"),
    "no expression of a block": ({"a": "("}, ValueError, "no regular expression"),
    "number": (3, TypeError, "by must be"),
    "None": (None, TypeError, "by must be"),
    "callable of nothing": (lambda name: None, ValueError, "matches no parameter"),
    "callable of numbers": (lambda name: 3, TypeError, "by must return"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_bad_groupings_are_refused_in_one_line(how: str) -> None:
    by, kind, words = BAD[how]
    A = operator()
    refused(lambda: A.blocks(by), kind, words)


def test_bad_dictionaries_are_refused_in_one_line() -> None:
    for algorithm in (fh.eigsh, fh.trace, fh.density):
        refused(lambda f=algorithm: f({}), ValueError, "empty dictionary")
        refused(lambda f=algorithm: f({"a": 3}), TypeError, "must be an operator, got int")
