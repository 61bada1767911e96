"""Descent at the edge of stability: known curvatures, repeated runs, and the figure."""

import pytest
import torch
from torch import nn

from fasthessian.errors import InputError
from fasthessian.study import stability
from fasthessian.study.data import ImageData
from fasthessian.study.descents import Descent, descents
from fasthessian.study.figures import draw, missing
from fasthessian.study.records import Stability, Study
from fasthessian.study.stability import batch_sharpness, descend, follow

F64 = torch.float64


def quadratic(dtype=F64):
    """The loss w' diag(4, 1) w / 4: eigenvalues 2 and 0.5 of its Hessian."""
    model = nn.Linear(2, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    return (
        model,
        torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=dtype),
        torch.zeros(2, 1, dtype=dtype),
    )


def images(count=12):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 1, 2, 2, generator=generator)
    return ImageData(x, torch.arange(count) % 2, x[:2], torch.arange(2), 2, "noise")


def test_on_a_quadratic_every_number_is_the_formula():
    model, x, y = quadratic()
    found = descend(model, x, y, Descent(0.3, None, 6, 2))
    h, w = torch.tensor([2.0, 0.5], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)
    assert found.steps.tolist() == [0, 2, 4, 6] and (found.batch, found.images) == (2, 2)
    torch.testing.assert_close(found.sharpness, torch.full((4,), 2.0, dtype=F64))
    for i, step in enumerate((0, 2, 4, 6)):
        at = (1 - 0.3 * h) ** step * w
        g = h * at
        assert float(found.losses[i]) == pytest.approx(float(at @ (h * at)) / 2)
        assert float(found.batch_sharpness[i]) == pytest.approx(float(g @ (h * g) / (g @ g)))
    torch.testing.assert_close(model.weight.detach()[0], (1 - 0.3 * h) ** 6 * w)
    assert model.weight.grad is None and found.threshold == pytest.approx(2 / 0.3)


@pytest.mark.parametrize(("rate", "grows"), [(1.02, True), (0.98, False)])
def test_above_two_over_the_sharpness_descent_oscillates_and_grows(rate, grows):
    model, x, y = quadratic()
    signs, weights = [], model.weight

    def seen(made, _):
        signs.append(float(weights.detach()[0, 0].sign()))

    found = descend(model, x, y, Descent(rate, None, 40, 1), progress=seen)
    assert signs == [(-1.0) ** step for step in range(41)]
    assert (found.threshold < float(found.sharpness[0])) == grows
    late = found.losses[20:]
    assert bool((late.diff() > 0).all()) == grows == bool(late[-1] > late[0])


def test_batch_sharpness_is_the_mean_rayleigh_quotient_of_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)
    batches = [torch.tensor([0, 1, 2]), torch.tensor([5]), torch.arange(7)]
    params = dict(model.named_parameters())
    quotients = []
    for index in batches:

        def loss(flat, index=index):
            parts = flat.split([p.numel() for p in params.values()])
            named = {name: part.view_as(params[name]) for name, part in zip(params, parts)}  # noqa: B905
            out = torch.func.functional_call(model, named, (x[index],))
            return ((out - y[index]) ** 2).sum() / (2 * len(index))

        theta = torch.cat([p.detach().flatten() for p in params.values()])
        H = torch.autograd.functional.hessian(loss, theta)
        g = torch.autograd.functional.jacobian(loss, theta)
        quotients.append(float(g @ H @ g / (g @ g)))
    found = batch_sharpness(model, x, y, batches)
    assert found == pytest.approx(sum(quotients) / 3, rel=1e-10)


def test_batches_of_an_epoch_are_all_images_in_a_new_order():
    order = stability.order_of(7, 2, torch.Generator().manual_seed(0))
    epochs = [[next(order) for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [2, 2, 2]
        assert len(set(torch.cat(epoch).tolist())) == 6
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    drawn = stability.sampled(7, 3, torch.Generator().manual_seed(0))
    assert len(drawn) == stability.SAMPLES and all(len(set(b.tolist())) == 3 for b in drawn)
    assert [b.tolist() for b in stability.sampled(7, 7, torch.Generator())] == [list(range(7))]


DESCENTS = (Descent(0.5, None, 4, 2), Descent(0.25, None, 4, 2), Descent(0.1, 3, 6, 3))


@pytest.fixture(scope="module")
def records():
    return tuple(follow(descent, images(), width=3) for descent in DESCENTS)


def strip(record):
    return {name: value for name, value in record.to_json().items() if name != "seconds"}


def test_descents_repeat_and_start_from_the_same_weights(records):
    torch.rand(3)  # the weights do not depend on the state of the global generator
    state, calls = torch.get_rng_state(), []
    again = follow(DESCENTS[2], images(), lambda *c: calls.append(c), width=3)
    assert torch.equal(state, torch.get_rng_state())
    assert strip(again) == strip(records[2])
    assert calls == [(step, 6) for step in range(7)]
    assert [r.batch for r in records] == [12, 12, 3] and records[2].steps.tolist() == [0, 3, 6]
    assert len({float(record.losses[0]) for record in records}) == 1


def test_a_record_knows_its_descent(records):
    for descent, record in zip(DESCENTS, records, strict=True):
        assert record.run == descent == Stability.from_json(record.to_json()).run


def test_each_sharpness_is_that_of_a_cold_run(records):
    """Each search starts from the eigenvector before; here eigenvalues move and cross."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = stability.network(images(), 3)
    x, y = images().train_x, torch.nn.functional.one_hot(images().train_y, 2).float()
    for steps, found in zip((0, 2, 2), records[0].sharpness, strict=True):
        for _ in range(steps):
            loss = stability.squared_error(model(x), y)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(model.parameters(), grads, strict=True):
                    parameter -= 0.5 * grad
        params = dict(model.named_parameters())

        def loss_of(*parts, params=params):
            named = dict(zip(params, parts, strict=True))
            return stability.squared_error(torch.func.functional_call(model, named, (x,)), y)

        parts = tuple(p.detach() for p in params.values())
        blocks = torch.autograd.functional.hessian(loss_of, parts)
        rows = [
            torch.cat([block.reshape(p.numel(), -1) for block in row], 1)
            for p, row in zip(parts, blocks, strict=True)
        ]
        exact = torch.linalg.eigvalsh(torch.cat(rows).double())[-1]
        assert float(found) == pytest.approx(float(exact), rel=2e-4)


@pytest.mark.parametrize(
    ("descent", "words"),
    [
        (Descent(0.1, 3, 4, 2), r"batch=3 is not in 1\.\.2"),
        (Descent(0.1, None, 0, 1), r"steps=0 is not in 1\.\."),
        (Descent(0.1, None, 4, 5), r"every=5 is not in 1\.\.4"),
    ],
)
def test_numbers_out_of_range_are_refused(descent, words):
    with pytest.raises(InputError, match=words):
        descend(*quadratic(), descent)


def test_a_descent_that_diverges_is_refused_and_a_smaller_rate_works():
    with pytest.raises(InputError, match="rate=30 within 200 steps; use a smaller rate"):
        descend(*quadratic(torch.float32), Descent(30.0, None, 200, 200))
    found = descend(*quadratic(torch.float32), Descent(0.5, None, 200, 200))
    assert found.losses[-1] < 1e-6


def test_the_figure_has_every_rate_and_threshold(records):
    (figure,) = draw(Study({}, (), (), {}, records))
    assert figure.png.startswith(b"\x89PNG") and figure.name == "edge-of-stability"
    svg = figure.svg.decode()
    for words in ("rate 2 / 4", "rate 2 / 8", "rate 2 / 20, batches of 3", "descent: sharpness"):
        assert words in svg, words
    assert "12 images" in figure.caption
    (again,) = draw(Study({}, (), (), {}, records))
    assert again.png == figure.png


def test_without_descents_the_figure_says_which_option_makes_them():
    words = missing(Study({}, (), (), {}))["edge-of-stability"]
    assert words == "no descent was made; see --edge-of-stability"


def test_the_descents_of_some_rates():
    found = descents([0.05, 0.03], 4660)
    assert [(d.rate, d.batch) for d in found] == [(0.05, None), (0.03, None), (0.05, 32)]
    for descent in [*found, *descents([0.1], 3), *descents([0.1], 40)]:
        assert descent.steps == 20 * descent.every
    assert found[2].steps * 32 >= 80 * 4660 > (found[2].steps - 20) * 32
    assert [d.batch for d in descents([0.1], 3)] == [None, 1]
    assert descents([], 4660) == []


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ([0.1, -1.0], "must be a finite positive number, got -1.0"),
        ([0.1, 0.1], "must be rates that differ in six digits, got 0.1 0.1"),
    ],
)
def test_rates_that_make_no_sense_are_refused(rates, words):
    with pytest.raises(InputError, match=f"^edge_of_stability {words}$"):
        descents(rates, 10)
    assert len(descents([0.1, 0.2], 10)) == 3
