"""Problems whose data are divided over ranks, and the answers that must not depend on it.

``whole(case, kind)`` are the answers of one process with all data, ``on_ranks`` those of one rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.models import ConvNet, Transformer, dense

ALL = ("Hessian", "GaussNewton", "Fisher", "EmpiricalFisher")
UNDRAWN = ("Hessian", "GaussNewton", "EmpiricalFisher")  # criteria without a known distribution
SIZES = (5, 7, 3, 8, 2, 4)
BOUND = 1e-10  # float64: rounding of sums in another order, about 1e-15, and of a Lanczos run
Batches = list[Any]


@dataclass(frozen=True)
class Case:
    """``build`` makes model, criterion and batches; ``options`` are made for each share."""

    build: Callable[[], tuple[nn.Module, Any, Batches]]
    kinds: tuple[str, ...] = ALL
    options: Callable[[Batches], dict[str, Any]] = lambda share: {}
    dense: bool = False  # whether plain torch takes all batches as one, with this criterion
    bound: float = BOUND
    cuts: tuple[tuple[int, ...], ...] = ((4,),)  # the first batches of ranks 1, 2, ...

    def make(self) -> tuple[nn.Module, Any, Batches]:
        """The same numbers at each call and on each rank; leaves the RNG alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return self.build()


def share(batches: Batches, cuts: tuple[int, ...], rank: int) -> Batches:
    """The batches of a rank: those between its cut and the next."""
    bounds = (0, *cuts, len(batches))
    return batches[bounds[rank] : bounds[rank + 1]]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def labelled(classes: int = 3) -> Batches:
    return [(torch.randn(k, 6).double(), torch.randint(classes, (k,))) for k in SIZES]


def regressed() -> Batches:
    return [(torch.randn(k, 6).double(), torch.randn(k, 3).double()) for k in SIZES]


def mlp() -> Any:
    return network(), nn.CrossEntropyLoss(), labelled()


def cnn() -> Any:
    batches = [(torch.randn(k, 1, 8, 8).double(), torch.randint(4, (k,))) for k in SIZES]
    return ConvNet().double().train(), nn.CrossEntropyLoss(), batches


def ragged() -> Batches:
    """Token ids and targets; each batch has another number of valid targets."""
    batches = []
    for k in SIZES:
        tokens, targets = torch.randint(7, (k, 5)), torch.randint(7, (k, 5))
        valid = torch.arange(5) < torch.randint(1, 6, (k, 1))
        batches.append((tokens, targets.where(valid, -100)))
    return batches


def gpt() -> Any:
    return Transformer().double(), nn.CrossEntropyLoss(), ragged()


def gpt_with_an_ignored_batch() -> Any:
    model, criterion, batches = gpt()
    tokens, targets = batches[1]
    return model, criterion, [batches[0], (tokens, torch.full_like(targets, -100)), *batches[2:]]


class LanguageModel(nn.Module):
    """Called with a mapping; shifts the labels and returns an output with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Transformer()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.inner(input_ids).transpose(1, 2)
        if labels is None:
            return SimpleNamespace(loss=None, logits=logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def mappings() -> Any:
    batches = []
    for tokens, targets in ragged():
        labels = tokens.where(targets >= 0, -100)
        labels[:, :2] = tokens[:, :2]  # at least one target is valid after the shift
        batches.append({"input_ids": tokens, "labels": labels})
    return LanguageModel().double(), None, batches


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).pow(4).mean()


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).pow(4).sum()


def masked_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the samples whose first target is positive."""
    chosen = (targets[:, 0] > 0).to(outputs.dtype)
    return ((outputs - targets).pow(2).sum(1) * chosen).sum() / chosen.sum()


def chosen(batch: Any) -> float:
    return float((batch[1][:, 0] > 0).sum())


def of_model(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def masked() -> Any:
    batches = regressed()
    for _, targets in batches:
        targets[0, 0] = 1.0
    return network(), masked_loss, batches


def binary() -> Any:
    batches = [(x, (y > 0).to(x.dtype)) for x, y in regressed()]
    return network(), nn.BCEWithLogitsLoss(), batches


def class_weighted() -> Any:
    weight = torch.tensor([0.2, 1.0, 3.0]).double()
    return network(), nn.CrossEntropyLoss(weight=weight), labelled()


def always(**options: Any) -> Callable[[Batches], dict[str, Any]]:
    return lambda share: options


EMPTY_FIRST, FOUR = ((0,), (4,)), ((4,), (1, 3, 3))
CASES = {
    "mlp": Case(mlp, dense=True, cuts=((2,), (0,), (6,), (1, 3, 3), (0, 3, 6), (0, 0, 5))),
    "one batch per rank": Case(
        lambda: (*mlp()[:2], labelled()[:4]), ALL[:2], cuts=((1, 2, 3), (0, 0, 3))
    ),
    "cnn": Case(cnn, dense=True, cuts=FOUR),
    "cnn in training mode": Case(cnn, ("Hessian", "GaussNewton"), always(mode="train")),
    "gpt": Case(gpt, dense=True, cuts=FOUR),
    "gpt with an ignored batch": Case(
        gpt_with_an_ignored_batch, ("Hessian", "Fisher"), dense=True, cuts=((1,), (1, 2, 4))
    ),
    "mappings": Case(mappings, ("Hessian",), cuts=EMPTY_FIRST),
    "mean function": Case(
        lambda: (network(), mean_loss, regressed()), UNDRAWN, dense=True, cuts=EMPTY_FIRST
    ),
    "sum function": Case(
        lambda: (network(), sum_loss, regressed()), UNDRAWN, dense=True, cuts=EMPTY_FIRST
    ),
    "sum function, one batch per rank": Case(
        lambda: (network(), sum_loss, regressed()[:4]),
        dense=True,
        kinds=UNDRAWN[:2],
        cuts=((1, 2, 3), (0, 0, 3)),
    ),
    "mse": Case(lambda: (network(), nn.MSELoss(), regressed()), dense=True),
    "mse, sum": Case(
        lambda: (network(), nn.MSELoss(reduction="sum"), regressed()), dense=True, cuts=EMPTY_FIRST
    ),
    "binary": Case(binary, dense=True),
    "class weights": Case(class_weighted, dense=True, cuts=((4,), (1, 3, 3))),
    "criterion of the model": Case(lambda: (network(), of_model, labelled()), ("Hessian",)),
    "weights as a callable": Case(
        masked, ("Hessian", "GaussNewton"), always(weights=chosen), True, cuts=FOUR
    ),
    "weights as a list": Case(
        masked,
        ("Hessian", "GaussNewton"),
        lambda share: {"weights": [chosen(batch) for batch in share]},
        dense=True,
        cuts=FOUR,
    ),
    "microbatch": Case(mlp, options=always(microbatch=3), dense=True),
    "weight decay": Case(mlp, options=always(weight_decay=0.3), cuts=((0,), (0, 3, 6))),
    "subset": Case(mlp, options=always(params=["2.bias", "0.weight"])),
    "recompute": Case(gpt, ("Hessian", "GaussNewton"), always(engine="recompute"), True),
    "forward": Case(cnn, ("Hessian", "GaussNewton"), always(engine="forward"), True),
    "difference": Case(mlp, ("Hessian",), always(engine="difference"), True, bound=1e-6),
    "no memory for graphs": Case(mlp, ("Hessian", "Fisher"), always(memory_budget=0)),
}


def answers(A: Any) -> dict[str, np.ndarray]:
    """Products, gradients and losses, as arrays."""
    V = torch.randn(3, A.n, dtype=A.dtype, generator=torch.Generator().manual_seed(3))
    offset = 0.1 * V[2]
    return {
        "A @ v": (A @ V[0]).numpy(),
        "A @ V": (A @ V).numpy(),
        "gradient": A.gradient().numpy(),
        "gradient with offset": A.gradient(offset).numpy(),
        "loss": np.array(A.loss()),
        "loss with offset": np.array(A.loss(offset)),
    }


@functools.cache
def whole(name: str, kind: str) -> dict[str, np.ndarray]:
    """The answers of one process."""
    case = CASES[name]
    model, criterion, batches = case.make()
    return answers(getattr(fh, kind)(model, criterion, batches, **case.options(batches)))


def product_of_dense(name: str) -> np.ndarray:
    """``A @ V`` of ``answers`` by the dense Hessian of plain torch, over all data in one batch."""
    model, criterion, batches = CASES[name].make()
    together = tuple(torch.cat(column) for column in zip(*batches, strict=True))
    H = dense(model, criterion, together)
    V = torch.randn(3, len(H), dtype=H.dtype, generator=torch.Generator().manual_seed(3))
    return (V @ H).numpy()


def on_ranks(name: str, cuts: tuple[int, ...]) -> dict[str, dict[str, np.ndarray]]:
    """The answers of this rank by kind of matrix."""
    case, made = CASES[name], {}
    for kind in case.kinds:
        model, criterion, batches = case.make()
        mine = share(batches, cuts, dist.get_rank())
        options = case.options(mine)
        A = getattr(fh, kind)(model, criterion, mine, group=dist.group.WORLD, **options)
        made[kind] = answers(A)
    same_bits(made[kind], answers(A))  # also at the second call
    return made


def same_bits(*records: dict[str, np.ndarray]) -> None:
    """Every record holds the bits of the first."""
    for record in records[1:]:
        assert record.keys() == records[0].keys()
        for key, value in records[0].items():
            assert value.tobytes() == record[key].tobytes(), f"{key} has other bits"


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference relative to that of ``wanted``; infinite if shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(found - wanted)) / (size if size > 0 else 1.0)


def agree(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], bound: float) -> None:
    """Every entry of ``wanted`` is in ``found``, to the relative ``bound``."""
    far = {key: distance(found[key], value) for key, value in wanted.items()}
    assert all(x <= bound for x in far.values()), f"relative differences {far}"
