import dataclasses

import pytest

from fasthessian.study.networks import VARIANTS, Network
from fasthessian.study.recipes import RECIPES

LAPTOP, PAPER = RECIPES["laptop"], RECIPES["paper"]


def test_the_paper_trains_for_180_epochs_with_two_drops():
    assert (PAPER.epochs, PAPER.batch_size, PAPER.momentum, PAPER.weight_decay) == (
        180, 128, 0.9, 5e-4
    )  # fmt: skip
    rates = [PAPER.rate(0.1, epoch) for epoch in (0, 79, 80, 119, 120, 179)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-15)


def test_the_laptop_drops_at_the_same_fractions():
    assert LAPTOP.drops == (9, 13) and LAPTOP.checkpoints == (0, 5, 10, 20)
    assert LAPTOP.name == "laptop" and PAPER.name == "paper"


def test_other_epochs_move_drops_and_checkpoints_that_are_not_given():
    assert PAPER.changed(epochs=90).drops == (40, 60)
    assert PAPER.changed(epochs=90).checkpoints == tuple(range(0, 91, 10))
    short = PAPER.changed(epochs=1)
    assert short.drops == () and short.checkpoints == (0, 1)
    given = PAPER.changed(epochs=90, drops=(3,), checkpoints=(90,), momentum=None)
    assert (given.drops, given.checkpoints, given.momentum) == ((3,), (90,), 0.9)


def test_fewer_images_shrink_the_sets_of_the_analysis_that_are_not_given():
    small = LAPTOP.changed(train_images=100)
    assert (small.images, small.spectrum_images) == (None, 100)
    with pytest.raises(ValueError, match="spectrum_images=512 is above the 100 images of the"):
        LAPTOP.changed(train_images=100, spectrum_images=512).check_images(1000)


def test_an_analysis_set_larger_than_the_data_is_refused():
    LAPTOP.check_images(512)
    with pytest.raises(ValueError, match="spectrum_images=512 is above the 511 images"):
        LAPTOP.check_images(511)
    with pytest.raises(ValueError, match=r"^images=600 is above the 599 images"):
        LAPTOP.changed(images=600).check_images(599)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer, got 2.5"),
        ({"top": 1}, "top must be at least 2, got 1"),
        ({"points": 1}, "points must be at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"analysis_batch": 0}, "analysis_batch must be at least 1"),
        ({"train_images": 0}, "train_images must be at least 1"),
        ({"images": -1}, "images must be at least 1"),
        ({"spectrum_images": True}, "spectrum_images must be an integer, got True"),
        ({"span": 0}, "span must be a finite positive number, got 0"),
        ({"trace_rtol": 1}, "trace_rtol must be between 0 and 1"),
        ({"momentum": 1}, r"momentum must be a number in \[0, 1\), got 1"),
        ({"weight_decay": -1e-4}, r"weight_decay must be a number in \[0, inf\), got -0.0001"),
        ({"weight_decay": float("nan")}, "weight_decay must be .*, got nan"),
        ({"augment": 1}, "augment must be True or False, got 1"),
        ({"lrs": ()}, r"lrs must be a tuple of numbers, got \(\)"),
        ({"lrs": 0.1}, "lrs must be a tuple of numbers, got 0.1"),
        ({"lrs": (0.1, float("inf"))}, "lrs must be a finite positive number, got inf"),
        ({"lrs": (0.1, 0.10000001)}, "lrs must differ in their first six digits"),
        ({"drops": (13, 9)}, r"drops must ascend, got \(13, 9\)"),
        ({"drops": (0,)}, "drops must be from 1 to 20, got 0"),
        ({"checkpoints": (5, 5)}, "checkpoints must ascend"),
        ({"checkpoints": (21,)}, "checkpoints must be from 0 to 20, got 21"),
        ({"checkpoints": ()}, "checkpoints must be a tuple of numbers"),
    ],
)
def test_a_bad_number_is_refused_in_one_line(numbers, words):
    with pytest.raises((ValueError, TypeError), match=words) as info:
        LAPTOP.changed(**numbers)
    assert "\n" not in str(info.value)
    with pytest.raises((ValueError, TypeError), match=words):
        dataclasses.replace(LAPTOP, **numbers)


def test_a_variant_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(
        ValueError, match="variant 'no-bm' does not exist; use resnet, no-bn"
    ) as info:
        Network(20, "no-bm")
    for name in str(info.value).partition("; use ")[2].split(", "):
        assert name in VARIANTS and Network(20, name).name.startswith("resnet20")
