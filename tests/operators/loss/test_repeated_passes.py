"""Data are read again at each product: what may change between passes, and what may not."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fasthessian as fh
from tests.support.models import ENGINES, PROBLEMS, columns, error

each_engine = pytest.mark.parametrize("engine", ENGINES)


@each_engine
def test_products_follow_data_written_in_place(engine: str) -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    batches = [(x[:4].clone(), y[:4].clone()), (x[4:].clone(), y[4:].clone())]
    A = fh.Hessian(model, criterion, batches, engine=engine)
    columns(A)
    batches[1][0].mul_(2.0)
    batches[0][1][:2] = -100  # changes the number of terms too
    fresh = columns(fh.Hessian(model, criterion, batches))
    assert error(columns(A), fresh) < 1e-14


class Noisy(Dataset):  # type: ignore[type-arg]
    """Adds noise to a sample at each access, drawn from one of the three global generators."""

    def __init__(self, x: Tensor, y: Tensor, draw: Any) -> None:
        self.x, self.y, self.draw = x, y, draw

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 1e-3 * self.draw(), self.y[i]


DRAWS = {
    "torch": lambda: torch.randn(()).item(),
    "numpy": lambda: np.random.randn(),
    "python": lambda: random.gauss(0.0, 1.0),
}


@each_engine
@pytest.mark.parametrize("draw", DRAWS)
def test_random_augmentation_is_refused_at_the_first_product(draw: str, engine: str) -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    loader = DataLoader(Noisy(x, y, DRAWS[draw]), batch_size=4)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    A = fh.Hessian(model, criterion, loader, engine=engine)
    v = torch.ones(A.n, dtype=A.dtype)
    for _ in range(2):  # the second product is refused too
        with pytest.raises(RuntimeError, match=r"different batches at each pass.*list\(loader\)"):
            A @ v
    with pytest.raises(RuntimeError, match="different batches"):
        A.loss()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert torch.isfinite(fh.Hessian(model, criterion, list(loader), engine=engine) @ v).all()


@each_engine
def test_shuffled_samples_are_accepted_and_changed_samples_are_refused(engine: str) -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    data, exact = TensorDataset(x, y), PROBLEMS["mlp"].dense(model, criterion, (x, y))
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    for loader in (DataLoader(data, 4, shuffle=True),
                   DataLoader(data, 4, shuffle=True, generator=generator)):  # fmt: skip
        A = fh.Hessian(model, criterion, loader, engine=engine)
        for _ in range(3):
            assert error(columns(A), exact) < 1e-12
    assert torch.equal(generator.get_state(), state)

    class Changing:
        """Yields another pass of a list each time it is read."""

        def __init__(self, *passes: Any) -> None:
            self.passes, self.at = passes, -1

        def __iter__(self) -> Any:
            self.at = min(self.at + 1, len(self.passes) - 1)
            return iter(self.passes[self.at])

    first = [(x[:4], y[:4]), (x[4:], y[4:])]
    other_pairs = [(x[:4], y[:4]), (x[4:], y[4:].roll(1))]
    zero = (torch.zeros_like(x[:1]), torch.zeros_like(y[:1]))
    for second in (first[:1], [*first, first[0]], [*first, zero], other_pairs, []):
        A = fh.Hessian(model, criterion, Changing(first, first, second), engine=engine)
        with pytest.raises(RuntimeError, match="different batches"):
            A @ torch.ones(A.n, dtype=A.dtype)
    # graphs of the refused pass are not kept for the next one
    A = fh.Hessian(model, criterion, Changing(first, first, other_pairs, first), engine=engine)
    with pytest.raises(RuntimeError, match="different batches"):
        A @ torch.ones(A.n, dtype=A.dtype)
    assert error(columns(A), exact) < 1e-12
    drop = DataLoader(data, 4, shuffle=True, drop_last=True)
    A = fh.Hessian(model, criterion, drop, engine=engine)
    with pytest.raises(RuntimeError, match="different batches"):
        A @ torch.ones(A.n, dtype=A.dtype)


def test_the_order_of_samples_is_checked_where_it_matters() -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    v = torch.ones(57, dtype=torch.float64)
    for options in ({"mode": "train"}, {"weights": [1, 2, 3]}, {"weights": lambda batch: 1.0}):
        A = fh.Hessian(model, criterion, loader, engine="recompute", **options)
        with pytest.raises(RuntimeError, match="different batches"):
            A @ v
        A = fh.Hessian(model, criterion, DataLoader(TensorDataset(x, y), 4), **options)
        assert torch.equal(A @ v, A @ v)


def test_token_batches_padded_with_zeros_may_be_shuffled() -> None:
    torch.manual_seed(0)
    rows = [torch.randint(1, 7, (length,)) for length in (2, 23, 15, 4, 36, 3)]

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 3, padding_idx=0)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens).sum(1).tanh()

    def pad(items: list[Tensor]) -> tuple[Tensor, Tensor]:
        tokens = nn.utils.rnn.pad_sequence(items, batch_first=True)
        return tokens, torch.tensor([len(item) % 3 for item in items])

    model, criterion = Bag().double(), nn.CrossEntropyLoss()
    exact = columns(fh.Hessian(model, criterion, pad(rows)))
    A = fh.Hessian(model, criterion, DataLoader(rows, 2, shuffle=True, collate_fn=pad),
                   engine="recompute")  # fmt: skip
    for _ in range(3):
        assert error(columns(A), exact) < 1e-12


def test_an_iterable_dataset_in_a_loader_can_be_read_again() -> None:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()

    class Pairs(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(zip(x, y, strict=True))

    exact = PROBLEMS["mlp"].dense(model, criterion, (x, y))
    A = fh.Hessian(model, criterion, DataLoader(Pairs(), 4), engine="recompute")
    assert error(columns(A), exact) < 1e-12
    assert math.isclose(A.loss(), fh.Hessian(model, criterion, (x, y)).loss())
