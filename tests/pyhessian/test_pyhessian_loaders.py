"""Loaders that yield different batches at each pass: one pass is kept, with a warning."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fasthessian as fh
from fasthessian.pyhessian import group_add, hessian
from tests.support.pyhessian_cases import assert_top, batches, cross_entropy, mean_loss_hessian, mlp

pytestmark = pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
CHANGES = "different batches at each pass"


class Noisy(Dataset):
    """Samples with random augmentation; ``seen`` are those of the last passes."""

    def __init__(self, count=12):
        ((self.x, self.y),) = batches((count,))
        self.seen = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.seen.append((self.x[i] + 0.5 * torch.randn(4), self.y[i]))
        return self.seen[-1]

    def last(self, count):
        """The last samples as one batch."""
        x, y = zip(*self.seen[-count:], strict=True)
        return torch.stack(x), torch.stack(y)


def changing(kind):
    """A loader that changes."""
    if kind == "augmenting":
        return DataLoader(Noisy(), batch_size=5)
    if kind == "augmenting and shuffled":
        return DataLoader(Noisy(), batch_size=5, shuffle=True)
    if kind == "own generator":
        return DataLoader(Noisy(), 5, shuffle=True, generator=torch.Generator().manual_seed(3))
    if kind == "subset":
        sampler = torch.utils.data.RandomSampler(Noisy(), num_samples=7)
        return DataLoader(Noisy(), batch_size=4, sampler=sampler)
    pairs = TensorDataset(*batches((14,))[0])
    return DataLoader(pairs, batch_size=4, shuffle=True, drop_last=True)


KINDS = ["augmenting", "augmenting and shuffled", "own generator", "subset", "drop_last"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_is_kept_with_one_warning(kind):
    model, loader = mlp(), changing(kind)
    h = hessian(model, cross_entropy, dataloader=loader, cuda=False)
    with pytest.warns(UserWarning, match=CHANGES) as caught:
        first = h.eigenvalues(tol=1e-6)[0][0]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert h.data is loader
    v = [torch.ones_like(p) for p in h.params]
    assert h.dataloader_hv_product(v)[0] == pytest.approx(h.dataloader_hv_product(v)[0])
    h.trace(maxIter=3, tol=0)
    assert max(h.density(iter=30)[0][0]) == pytest.approx(first, rel=1e-3)
    again = hessian(model, cross_entropy, dataloader=changing(kind), cuda=False)
    with pytest.warns(UserWarning, match=CHANGES):
        assert again.eigenvalues(tol=1e-6)[0][0] == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("first", ["eigenvalues", "trace", "density", "product", "gradsH"])
def test_the_results_are_those_of_the_pass_that_is_kept(first):
    model, dataset = mlp(), Noisy()
    loader = DataLoader(dataset, batch_size=5)
    h = hessian(model, cross_entropy, dataloader=loader, cuda=False)
    with pytest.warns(UserWarning, match=CHANGES):
        {
            "eigenvalues": h.eigenvalues,
            "trace": lambda: h.trace(maxIter=2, tol=0),
            "density": lambda: h.density(iter=2),
            "product": lambda: h.dataloader_hv_product([torch.ones_like(p) for p in h.params]),
            "gradsH": lambda: h.gradsH,
        }[first]()
    batch, read = dataset.last(12), len(dataset.seen)
    assert_top(h, mean_loss_hessian(model, [batch]))
    loss = cross_entropy(model(batch[0]), batch[1])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(h.gradsH, list(expected))
    assert len(dataset.seen) == read  # it is not read again


def test_an_override_that_builds_on_the_product_of_the_base():
    class Decayed(hessian):
        def dataloader_hv_product(self, v):
            _, Hv = super().dataloader_hv_product(v)
            group_add(Hv, v, alpha=0.25)
            return 0.0, Hv

    model, dataset = mlp(), Noisy()
    h = Decayed(model, cross_entropy, dataloader=DataLoader(dataset, batch_size=5), cuda=False)
    with pytest.warns(UserWarning, match=CHANGES):
        h.eigenvalues()
    H = mean_loss_hessian(model, [dataset.last(12)])
    assert_top(h, H + 0.25 * torch.eye(len(H), dtype=H.dtype))


def test_another_loader_is_read_again():
    model, data = mlp(), batches((6, 6))
    h = hessian(model, cross_entropy, dataloader=changing("augmenting"), cuda=False)
    with pytest.warns(UserWarning, match=CHANGES):
        h.eigenvalues()
    h.data = data
    assert_top(h, mean_loss_hessian(model, data))


@pytest.mark.parametrize("kind", ["shuffled", "plain", "list"])
def test_loaders_that_yield_the_same_samples_are_not_kept(kind):
    model, (data,) = mlp(), batches()
    loader = DataLoader(TensorDataset(*data), batch_size=5, shuffle=kind == "shuffled")
    given = list(loader) if kind == "list" else loader
    h = hessian(model, cross_entropy, dataloader=given, cuda=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_top(h, mean_loss_hessian(model, [data]))
    assert h._pass is None


def test_the_advice_of_the_warning_works():
    model, loader = mlp(), changing("augmenting")
    with pytest.warns(UserWarning, match=r"pass dataloader=list\(dataloader\)"):
        hessian(model, cross_entropy, dataloader=loader, cuda=False).eigenvalues()
    held = list(loader)
    assert_top(
        hessian(model, cross_entropy, dataloader=held, cuda=False), mean_loss_hessian(model, held)
    )


def test_too_large_a_pass_is_refused_and_the_advice_works(monkeypatch):
    model, loader = mlp(), changing("augmenting")
    monkeypatch.setattr("fasthessian.pyhessian.arguments.available_bytes", lambda _: 300)
    h = hessian(model, cross_entropy, dataloader=loader, cuda=False)
    with pytest.raises(RuntimeError, match=r"150 B.*list\(itertools\.islice\(dataloader") as caught:
        h.eigenvalues()
    assert "\n" not in str(caught.value)
    some = list(itertools.islice(loader, 10))
    assert_top(
        hessian(model, cross_entropy, dataloader=some, cuda=False), mean_loss_hessian(model, some)
    )


def test_a_loader_that_changes_after_products_is_refused_and_the_advice_works(monkeypatch):
    class Late:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(batches((6, 6), seed=1 + self.passes // 6))

    monkeypatch.setattr("fasthessian.operators.products.options.available_bytes", lambda _: 1000)
    model, loader = mlp(), Late()  # read at each product, since no graphs fit
    h = hessian(model, cross_entropy, dataloader=loader, cuda=False)
    with pytest.raises(RuntimeError, match=r"other batches.*dataloader=list\(dataloader\)"):
        h.eigenvalues(maxIter=50, tol=1e-6)
    held = list(loader)
    assert_top(
        hessian(model, cross_entropy, dataloader=held, cuda=False), mean_loss_hessian(model, held)
    )


def test_the_operators_still_refuse_such_loaders():
    A = fh.Hessian(mlp(), cross_entropy, changing("augmenting"))
    with pytest.raises(RuntimeError, match=CHANGES):
        fh.eigsh(A)
