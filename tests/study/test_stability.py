"""Descent at the edge of stability: known curvatures, repeated runs, and the figure."""

import itertools
import json

import pytest
import torch
from torch import nn

from fasthessian.errors import InputError
from fasthessian.study import stability
from fasthessian.study.data import ImageData
from fasthessian.study.stability import Descent, batch_sharpness, descend, draw, follow

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
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("study") / "stability"
    return place, follow(images(), place, DESCENTS, width=3)


def test_each_descent_has_a_file_and_is_not_made_again(folder, monkeypatch):
    place, first = folder
    assert len(list(place.iterdir())) == 3
    made, original = [], descend

    def counted(*args, **options):
        made.append(args[3])
        return original(*args, **options)

    monkeypatch.setattr(stability, "descend", counted)
    again = follow(images(), place, DESCENTS, width=3)
    assert made == []
    (place / next(path.name for path in place.iterdir() if "lr0.25" in path.name)).unlink()
    torch.rand(3)  # the weights do not depend on the state of the global generator
    state, calls = torch.get_rng_state(), []
    third = follow(images(), place, DESCENTS, width=3, progress=lambda *c: calls.append(c))
    assert made == [DESCENTS[1]] and torch.equal(state, torch.get_rng_state())
    assert calls == [(4, 14), (6, 14), (8, 14)]
    for a, b, c in zip(first, again, third, strict=True):
        assert strip(a) == strip(b) == strip(c)
    follow(images(), place, DESCENTS[:1], width=3, seed=1)
    assert made == [DESCENTS[1], DESCENTS[0]]  # other settings are another file
    assert [r.batch for r in first] == [12, 12, 3] and first[2].steps.tolist() == [0, 3, 6]
    assert float(first[0].losses[0]) == float(first[2].losses[0])  # the same initial weights


def strip(record):
    return {name: value for name, value in record.to_json().items() if name != "seconds"}


def test_a_damaged_file_is_named_and_can_be_deleted(folder):
    place, first = folder
    path = next(path for path in place.iterdir() if "lr0.5" in path.name and "seed0" in path.name)
    for content in ("{", json.dumps({**first[0].to_json(), "losses": [1.0]})):
        path.write_text(content)
        with pytest.raises(InputError, match=r"lr0\.5-batch12of12.* is damaged .*; delete it") as e:
            follow(images(), place, DESCENTS, width=3)
        assert "\n" not in str(e.value)
    path.unlink()
    assert strip(follow(images(), place, DESCENTS, width=3)[0]) == strip(first[0])


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


def test_the_figure_has_every_rate_and_threshold(folder):
    figure = draw(folder[1])
    assert figure.png.startswith(b"\x89PNG") and (figure.kind, figure.name) == (
        "stability", "edge-of-stability",
    )  # fmt: skip
    svg = figure.svg.decode()
    for words in ("rate 2 / 4", "rate 2 / 8", "rate 2 / 20, batches of 3", "descent: sharpness"):
        assert words in svg, words
    assert "12 images" in figure.caption
    assert draw(folder[1]).png == figure.png


def test_the_rates_of_the_figure_differ():
    assert len({d.rate for d in stability.DESCENTS if d.batch is None}) == 3
    assert any(d.batch is not None for d in stability.DESCENTS)
    for a, b in itertools.pairwise(d.rate for d in stability.DESCENTS if d.batch is None):
        assert a > b
