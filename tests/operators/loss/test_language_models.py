"""The terms of a language model are its tokens, whatever the class is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.dense_losses import F64, dense, distance
from tests.support.models import columns


class Out(dict):
    """Like an output of transformers: entries are attributes."""

    __getattr__ = dict.__getitem__


class Base(nn.Module):
    """Computes scores for each position; the classes below add a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def scores(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Shifting(Base):
    """Like GPT-2: the scores at a position belong to the label of the next one."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Out:
        z = self.scores(input_ids)
        loss = F.cross_entropy(z[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
        return Out(loss=loss, logits=z)


class BertForCausalLM(Base):
    """Does not shift the labels, in spite of its name."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Out:
        z = self.scores(input_ids)
        return Out(loss=F.cross_entropy(z.reshape(-1, 11), labels.reshape(-1)), logits=z)


class XLNetLMHeadModel(BertForCausalLM):
    """Does not shift the labels either."""


class ForConditionalGeneration(Base):
    """Has positions of a picture before the text, which have no labels."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Out:
        z = self.scores(torch.cat([input_ids[:, :2] * 0, input_ids], 1))
        aligned = F.pad(labels, (1, 0), value=-100)
        loss = F.cross_entropy(z[:, 1:].reshape(-1, 11), aligned.reshape(-1))
        return Out(loss=loss, logits=z)


class Smoothed(Base):
    """Sums over tokens with label smoothing, and divides by their number itself."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        z, y = self.scores(input_ids)[:, :-1].transpose(1, 2), labels[:, 1:]
        total = F.cross_entropy(z, y, reduction="sum", label_smoothing=0.1)
        return total / (y != -100).sum()


class Masked(Base):
    """Counts tokens by the attention mask, not by labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Out:
        z, y = self.scores(input_ids)[:, :-1].transpose(1, 2), input_ids[:, 1:]
        w = attention_mask[:, 1:]
        return Out(loss=(F.cross_entropy(z, y, reduction="none") * w).sum() / w.sum())


class Wrapped(nn.Module):
    """Like PeftModel: passes the batch on to another model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model = inner

    def forward(self, **batch: Tensor) -> Any:
        return self.base_model(**batch)


def tokens(masked: bool = False) -> list[dict[str, Tensor]]:
    """Batches with different lengths and numbers of labels."""
    batches = []
    for rows, length, short in ((3, 6, 5), (1, 6, 2), (2, 4, 3)):
        ids = torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(rows))
        mask = torch.ones_like(ids)
        mask[-1, short:] = 0
        second = {"attention_mask": mask} if masked else {"labels": ids.where(mask > 0, -100)}
        batches.append({"input_ids": ids, **second})
    return batches


def padded(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All batches as one batch, padded."""
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    length = max(batch["input_ids"].shape[1] for batch in batches)
    return {
        key: torch.cat([F.pad(b[key], (0, length - b[key].shape[1]), value=value) for b in batches])
        for key, value in fill.items()
        if key in batches[0]
    }


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "wrapped"])
@pytest.mark.parametrize(
    "kind",
    [Shifting, BertForCausalLM, XLNetLMHeadModel, ForConditionalGeneration, Smoothed, Masked],
)
def test_tokens_count_whatever_the_model_is_called(kind: type[nn.Module], wrapped: bool) -> None:
    torch.manual_seed(1)
    model = kind().to(F64)
    model = Wrapped(model) if wrapped else model
    batches = tokens(masked=kind is Masked)
    whole = padded(batches)

    def loss(moved: nn.Module) -> Tensor:
        out = moved(**whole)
        return out if isinstance(out, Tensor) else out["loss"]

    want = dense(model, loss)
    H = fh.Hessian(model, None, batches)
    assert distance(H, want) < 1e-12 and H.check().ok, str(H.check())
    assert distance(fh.Hessian(model, None, whole, microbatch=2), want) < 1e-12
    if kind in (Shifting, BertForCausalLM, XLNetLMHeadModel):
        for curvature in (fh.EmpiricalFisher, fh.GaussNewton):
            one, cut_up = curvature(model, None, whole), curvature(model, None, batches)
            assert distance(cut_up, columns(one)) < 1e-12


class Shifted(nn.Module):
    """A language model that takes its labels from ``ids``, the next tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 3), nn.Linear(3, 8)

    def forward(self, ids):
        z = self.head(torch.tanh(self.embed(ids)))
        return {"loss": F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}


@pytest.mark.parametrize("microbatch", [None, 1])
def test_numbers_that_agree_by_chance_do_not_count(microbatch):
    """The batch has ten next tokens and, by chance, ten ids that are not 0; its halves do not."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [3, 0, 6, 2, 0, 7]])
    torch.manual_seed(0)
    A = fh.Hessian(Shifted().double(), None, {"ids": ids}, microbatch=microbatch)
    assert A.check().ok, A.check()
