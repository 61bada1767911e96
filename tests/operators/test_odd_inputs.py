"""Unusual inputs that users have, where a simple implementation is wrong or fails."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fasthessian as fh
from fasthessian.app.report import result as report
from fasthessian.results.plots import plot_landscape

pytestmark = pytest.mark.slow


def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2), [(torch.randn(5, 3), torch.arange(5) % 2) for _ in range(2)]


V = torch.linspace(-1.0, 2.0, 8)  # not constant, because softmax ignores equal shifts


class Loader:
    """Yields the same batches at each pass, as new tensors."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([tuple(t.clone() for t in batch) for batch in self.batches])


def test_products_use_class_weights_changed_in_place():
    model, batches = classifier()
    for engine in ("retained", "recompute"):
        criterion = nn.CrossEntropyLoss(weight=torch.ones(2))
        A, v = fh.Hessian(model, criterion, batches, engine=engine), V
        before = A @ v
        criterion.weight.copy_(torch.tensor([1.0, 10.0]))
        after = A @ v
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, fh.Hessian(model, criterion, batches) @ v)
        criterion.reduction = "sum"
        torch.testing.assert_close(A @ v, fh.Hessian(model, criterion, batches) @ v)


def masked_mse(outputs, targets):
    known = ~torch.isnan(targets)
    return (outputs[known] - targets[known]).square().mean()


def test_a_loader_may_yield_missing_values_and_empty_tensors():
    model, batches = classifier()
    targets = torch.tensor([[1.0, float("nan")]] * 5)
    A = fh.Hessian(model, masked_mse, Loader([(x, targets) for x, _ in batches]))
    torch.testing.assert_close(A @ V, A @ V)

    class Ignoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, boxes):
            return self.inner(x)

    with_empty = Loader([(x, torch.zeros(0, 4), y) for x, y in batches])
    B = fh.Hessian(Ignoring(), nn.CrossEntropyLoss(), with_empty)
    want = fh.Hessian(model, nn.CrossEntropyLoss(), batches) @ V
    torch.testing.assert_close(B @ V, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "set its max_norm to None"),
        ({"sparse": True}, "set its sparse to False"),
    ],
)
def test_unsupported_embeddings_are_refused_and_not_changed(options, message):
    model = nn.Sequential(nn.Embedding(4, 3, **options), nn.Flatten(), nn.Linear(6, 2))
    before = model[0].weight.clone()
    data = torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        fh.Hessian(model, nn.CrossEntropyLoss(), data)
    assert torch.equal(model[0].weight, before)


def test_data_that_do_not_fit_are_refused_in_one_line():
    model, _ = classifier()
    for data in (
        (torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)),
        (torch.randn(8, 3), torch.full((8,), 7)),
    ):
        with pytest.raises(ValueError, match="data does not fit the model and criterion") as caught:
            fh.Hessian(model, nn.CrossEntropyLoss(), data)
        assert "\n" not in str(caught.value)


def test_a_landscape_without_a_finite_loss_is_drawn():
    nowhere = torch.full((2, 2), float("inf"), dtype=torch.float64)
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    axes = plot_landscape(fh.Landscape(alphas=ends, betas=ends, losses=nowhere))
    assert "no finite loss" in axes.get_title()


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("density", "grid", [1.0, 2.0]),
        ("density", "nodes", []),
        ("landscape", "losses", [1.0]),
        ("top", "values", []),
        ("trace", "interval", "x"),
    ],
)
def test_results_with_inconsistent_parts_are_refused_as_damaged(part, field, value):
    content = {
        "top": {"values": [1.0], "residuals": [0.1], "converged": True, "matvecs": 1},
        "trace": {
            "value": 1.0, "stderr": 0.1, "interval": [0.0, 2.0], "confidence": 0.95,
            "samples": [1.0], "matvecs": 1, "converged": True,
        },
        "density": {
            "nodes": [[1.0]], "weights": [[1.0]], "grid": [0.0, 1.0, 2.0], "sigma": 1.0,
            "values": [1.0] * 3, "lower": [0.0] * 3, "upper": [2.0] * 3, "matvecs": 1,
        },
        "landscape": {"alphas": [-1.0, 1.0], "betas": [], "losses": [1.0, 2.0]},
    }  # fmt: skip
    assert set(report.records(content)) == set(content)
    content[part][field] = value
    with pytest.raises(ValueError, match=f"the part '{part}' of the result is damaged"):
        report.records(content)


def command(tmp_path, *arguments, **env):
    """Exit code and stderr of the command ``fasthessian`` in a folder with a problem file."""
    (tmp_path / "p.py").write_text(
        "import torch\n"
        "def ok():\n"
        "    x = torch.randn(8, 3), torch.randn(8, 1)\n"
        "    return torch.nn.Linear(3, 1), torch.nn.MSELoss(), x\n"
        "def arg(x):\n"
        "    return ok()\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "fasthessian", *arguments],
        cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip
    return run.returncode, run.stderr.strip()


def test_a_file_name_or_a_function_with_arguments_is_explained(tmp_path):
    for spec, hint in (("./p.py:ok", "write p:ok"), ("p:arg", "callable without arguments")):
        code, errors = command(tmp_path, "analyze", spec)
        assert code == 2 and errors.count("\n") == 0 and hint in errors, errors


def test_a_span_that_overflows_does_not_lose_results(tmp_path):
    options = [
        "--top",
        "2",
        "--bottom",
        "1",
        "--steps",
        "3",
        "--points",
        "2",
        "--span",
        "1e30",
        "--out",
        "out",
    ]
    code, errors = command(tmp_path, "analyze", "p:ok", *options)
    assert code == 0, errors
    assert (tmp_path / "out" / "result.json").exists()


def test_an_unknown_instruction_set_is_an_error_and_not_a_slow_fallback(tmp_path):
    if fh.kernels.native.unavailable() is not None:
        pytest.skip(f"no native backend: {fh.kernels.native.unavailable()}")
    code, errors = command(tmp_path, "analyze", "p:ok", "--top", "2", FASTHESSIAN_ISA="mmx")
    assert code == 2 and "FASTHESSIAN_ISA=mmx cannot serve" in errors
    code, _ = command(tmp_path, "doctor", FASTHESSIAN_ISA="mmx")
    assert code == 0


@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_a_default_device_of_the_user_has_no_effect(basis):
    """No tensor is created on torch's default device, which is one without memory here."""
    d = torch.arange(1.0, 21.0)
    A = fh.SymmetricOperator(lambda v: d * v, 20)
    with torch.device("meta"):
        found = fh.spectrum(A, 12, steps=15, probes=2, basis=basis)
        pairs = fh.eigsh(A, 4, "BE", tol=1e-2, basis=basis)
        density = fh.density(A, steps=5, basis="none")
        total = fh.trace(A, deflate=pairs)
    torch.testing.assert_close(found.bottom.values, d[:12].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(pairs.values, d[[19, 18, 1, 0]].double(), rtol=1e-4, atol=0)
    assert total.value == pytest.approx(210, abs=0.1) and density.nodes.max() <= 20 * (1 + 1e-6)
