"""Unmodified Hugging Face models, built from a configuration: mapping batches, built-in losses."""

import json
import sys
import types

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import fasthessian as fh
from fasthessian.app import main as cli
from tests.support.huggingface import bert, gpt2, llama, made
from tests.support.models import columns, error, refused

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
HALF_SINGLE = 1e-6  # language models always compute the loss in float32


def dense(model, batch):
    """H, G = J'MJ and E = sum of g g' over the terms, each (n, n), by torch's functional API."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(model.parameters())

    def outputs(*given):
        return functional_call(model, dict(zip(names, given, strict=True)), (), dict(batch))

    def terms(z):
        labels = batch["labels"]
        if labels.dim() == 2:
            z, labels = z[:, :-1], labels[:, 1:]
        rows, labels = z.reshape(-1, z.shape[-1]), labels.reshape(-1)
        return nn.functional.cross_entropy(rows, labels, ignore_index=-100, reduction="none")

    count = int((batch["labels"][..., 1:] if batch["labels"].dim() == 2 else batch["labels"])
                .ne(-100).sum())  # fmt: skip

    def loss(z):
        return terms(z).sum() / count

    def flat(blocks, rows):
        return torch.cat([block.reshape(rows, -1) for block in blocks], dim=1)

    with sdpa_kernel(SDPBackend.MATH):
        H = torch.autograd.functional.hessian(lambda *p: loss(outputs(*p).logits), values)
        H = torch.cat([flat(row, p.numel()) for row, p in zip(H, values, strict=True)])
        z = outputs(*values).logits.detach()
        J = flat(
            torch.autograd.functional.jacobian(lambda *p: outputs(*p).logits, values), z.numel()
        )
    M = torch.autograd.functional.hessian(loss, z).reshape(z.numel(), -1)
    S = torch.autograd.functional.jacobian(terms, z).reshape(-1, z.numel()) @ J
    return H, J.T @ M @ J, S.T @ S / count


def some(A):
    """Three random vectors (3, n)."""
    return torch.randn(3, A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", [gpt2, llama, bert])
def test_every_matrix_equals_its_dense_one(build):
    model, batch = made(build)
    H, G, E = dense(model, batch)
    for matrix, kind in ((H, fh.Hessian), (G, fh.GaussNewton), (E, fh.EmpiricalFisher)):
        engines = ("retained", "recompute") if build is bert else ("retained", "forward")
        for engine in engines:
            A = kind(model, None, batch, engine=engine)
            V = some(A)
            assert error(A @ V, V @ matrix) < HALF_SINGLE, (kind, engine)
    F = fh.Fisher(model, None, batch, samples=1000)
    assert (F @ V - V @ G).norm() < 0.2 * (V @ G).norm()


@pytest.mark.parametrize("build", [gpt2, bert])
def test_batches_and_microbatches_are_weighted_by_valid_labels(build):
    model, batch = made(build)
    parts = [{key: value[:1] for key, value in batch.items()},
             {key: value[1:] for key, value in batch.items()}]  # fmt: skip
    A = fh.Hessian(model, None, batch)
    V = some(A)
    assert error(fh.Hessian(model, None, parts) @ V, A @ V) < HALF_SINGLE
    assert error(fh.Hessian(model, None, batch, microbatch=1) @ V, A @ V) < HALF_SINGLE


def test_a_padding_row_has_no_gradient_by_any_engine():
    model, batch = made(bert)
    A = fh.Hessian(model, None, batch)
    V = some(A)
    assert error(fh.Hessian(model, None, batch, engine="forward") @ V, A @ V) < HALF_SINGLE
    assert error(fh.Hessian(model, None, batch, engine="difference") @ V, A @ V) < 1e-4
    row = A.unflatten(V[0])["bert.embeddings.word_embeddings.weight"][0]
    Hv = A @ V[0]
    row.zero_()
    assert torch.equal(A @ V[0], Hv)
    assert A.check().ok


def test_a_tied_padding_row_is_refused_by_engines_without_graphs():
    config = made(bert)[0].config
    model = transformers.BertForMaskedLM(config).double()
    tokens = torch.tensor([[1, 2, 3, 0]])
    batch = {"input_ids": tokens, "labels": tokens}
    for engine in ("forward", "difference"):
        refused(
            lambda engine=engine: fh.Hessian(model, None, batch, engine=engine), ValueError,
            "'bert.embeddings.word_embeddings' is tied, and its row padding_idx=0",
        )  # fmt: skip
        fh.Hessian(model, None, batch, engine=engine, params=["cls.predictions.bias"])
    assert fh.Hessian(model, None, batch).check().ok


def test_blocks_of_only_the_adapters_and_of_stages():
    model, batch = made(gpt2)
    H, _, _ = dense(model, batch)
    for p in model.parameters():
        p.requires_grad_(False)
    adapter = model.transformer.h[1].attn.c_proj.weight.requires_grad_(True)
    A = fh.Hessian(model, None, batch)
    assert A.layout.names == ("transformer.h.1.attn.c_proj.weight",)
    start = 0
    for p in model.parameters():
        if p is adapter:
            break
        start += p.numel()
    part = slice(start, start + adapter.numel())
    assert error(columns(A), H[part, part]) < HALF_SINGLE
    model, batch = made(gpt2)
    assert list(fh.Hessian(model, None, batch).blocks("stage")) == [
        "transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1",
        "transformer.ln_f",
    ]  # fmt: skip


def test_analyze_accepts_a_language_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = types.ModuleType("mine")
    model, batch = made(gpt2)
    module.problem = lambda: (model.float(), None, batch)
    monkeypatch.setitem(sys.modules, "mine", module)
    with pytest.raises(SystemExit) as ended:
        cli.main(["analyze", "mine:problem", "--check", "--json", "--top", "1", "--bottom", "0",
                  "--no-trace", "--steps", "10", "--no-landscape"])  # fmt: skip
    content = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and content["check"]["ok"] and content["top"]["converged"]
