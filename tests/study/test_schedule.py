import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fasthessian.study.networks import Network, Run
from fasthessian.study.recipes import RECIPES
from fasthessian.study.records import DIVERGED, TRAINED, UNTRAINED, Study
from fasthessian.study.schedule import (
    MEASURE,
    READY,
    SKIPPED,
    SURFACE,
    TRAIN,
    WAITING,
    Images,
    Speed,
    gradient_cost,
    tasks,
)  # fmt: skip
from tests.support.small_study import training

RECIPE = RECIPES["laptop"].changed(epochs=2, lrs=(0.1, 0.02), checkpoints=(0, 2))
IMAGES = Images(60, 20)
BN, NO_BN = Network(8), Network(8, "no-bn")


def planned(networks, seeds, *trainings, recipe=RECIPE):
    return tasks(networks, seeds, recipe, IMAGES, {each.run: each for each in trainings})


def states(plan, kind, run):
    return {task.state for task in plan if (task.kind, task.run) == (kind, run)}


def rates(network, first, second):
    """The trainings with both rates and seed 0."""
    return training(Run(network, 0, 0.1), *first), training(Run(network, 0, 0.02), *second)


def test_the_tasks_of_a_study_and_their_order():
    plan = planned([BN, NO_BN], 2, *rates(BN, (0.5,), (0.4,)), *rates(NO_BN, (0.3,), (0.4,)))
    kept = {BN: 0.1, NO_BN: 0.02}
    assert [(t.kind, t.run) for t in plan if t.kind == TRAIN] == [
        *((TRAIN, Run(network, 0, lr)) for network in (BN, NO_BN) for lr in (0.1, 0.02)),
        *((TRAIN, Run(network, 1, kept[network])) for network in (BN, NO_BN)),
    ]
    places = [(2 * seed + 1, run, epoch, mode)
              for seed in (0, 1) for run in (Run(n, seed, kept[n]) for n in (BN, NO_BN))
              for epoch in (0, 2)
              for mode in (("eval", "train") if run.network is BN else ("eval",))]  # fmt: skip
    measured = [(t.run, t.epoch, t.mode) for t in plan if t.kind == MEASURE]
    assert measured == [place[1:] for place in places]
    surfaces = [(t.run, t.epoch, t.mode) for t in plan if t.kind == SURFACE]
    assert surfaces == [place for place in measured if place[0].seed == 0]
    assert [t.kind for t in plan] == [TRAIN] * 6 + [MEASURE] * 12 + [SURFACE] * 6


def test_the_best_rate_is_kept_after_all_rates_have_ended():
    first, second = rates(BN, (0.4,), (0.5,))
    for done in ((), (first,), (second,)):
        plan = planned([BN], 2, *done)
        assert [t.state for t in plan if t.kind == TRAIN] == [READY, READY, WAITING]
        assert {t.state for t in plan if t.kind != TRAIN} == {WAITING}
        assert len(plan) == 3 + 2 * 4 + 4  # the number does not depend on what is done
    plan = planned([BN], 2, first, second)
    assert [t.state for t in plan if t.kind == TRAIN] == [READY] * 3
    assert states(plan, MEASURE, Run(BN, 0, 0.02)) == {READY}
    assert states(plan, MEASURE, Run(BN, 1, 0.02)) == {WAITING}
    plan = planned([BN], 2, first, second, training(Run(BN, 1, 0.02)))
    assert states(plan, MEASURE, Run(BN, 1, 0.02)) == {READY}
    assert not states(plan, MEASURE, Run(BN, 0, 0.1))


def test_a_network_that_diverges_is_not_analysed():
    lost, also = rates(NO_BN, (float("nan"), DIVERGED), (float("nan"), DIVERGED))
    plan = planned([NO_BN, BN], 2, lost, also)
    assert states(plan, TRAIN, Run(NO_BN, 1, 0.1)) == {SKIPPED}
    assert {t.state for t in plan if t.run.network == NO_BN and t.kind != TRAIN} == {SKIPPED}
    assert states(plan, TRAIN, Run(BN, 0, 0.1)) == {READY}
    # one rate is enough, and only the seed that diverges is left out
    saved = training(Run(NO_BN, 0, 0.02), 0.1, UNTRAINED)
    second = training(Run(NO_BN, 1, 0.02), float("nan"), DIVERGED)
    plan = planned([NO_BN], 2, lost, saved, second)
    assert states(plan, MEASURE, Run(NO_BN, 0, 0.02)) == {READY}
    assert states(plan, MEASURE, Run(NO_BN, 1, 0.02)) == {SKIPPED}


def test_a_network_that_is_named_twice_is_one_and_deep_ones_come_first():
    plan = planned([BN, Network(14), BN], 1)
    runs = [t.run.network.depth for t in plan if t.kind == TRAIN]
    assert runs == [14, 14, 8, 8]


@pytest.mark.parametrize("depth", [8, 20])
@pytest.mark.parametrize("width", [4, 16])
def test_the_cost_of_a_gradient_is_that_of_its_convolutions(depth, width):
    network, recipe = Network(depth), dataclasses.replace(RECIPE, width=width)
    with torch.random.fork_rng():
        model = network.make(10, width)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    forward = counter.get_total_flops() / 2e6  # one multiplication and one addition
    assert gradient_cost(network, recipe) / 3 == pytest.approx(forward, rel=0.05)


def test_costs_follow_the_recipe():
    def cost(kind, **numbers):
        plan = planned([BN], 1, recipe=RECIPE.changed(**numbers))
        return next(t.cost for t in plan if t.kind == kind)

    base = {kind: cost(kind) for kind in (TRAIN, MEASURE, SURFACE)}
    assert cost(TRAIN, epochs=4) == 2 * base[TRAIN]
    assert cost(TRAIN, train_images=30) < 0.6 * base[TRAIN]
    assert cost(MEASURE, steps=90) > base[MEASURE]
    assert cost(MEASURE, images=30) < base[MEASURE]
    assert cost(SURFACE, points=30) == 4 * base[SURFACE]
    assert cost(SURFACE, spectrum_images=256) == base[SURFACE] / 2
    assert cost(MEASURE, points=30) == base[MEASURE]


def test_the_speed_comes_from_the_tasks_of_the_same_kind_if_some_have_ended():
    done = training(Run(BN, 0, 0.1), 0.5, TRAINED, seconds=8.0)
    lost = training(Run(BN, 0, 0.02), float("nan"), DIVERGED, seconds=0.1)  # ended early
    plan = planned([BN, Network(14)], 1, done, lost)
    speed = Speed.of(Study({}, (done, lost), (), {}), plan)
    train = {t.run.network.depth: t for t in plan if t.kind == TRAIN}
    assert speed.seconds(train[8]) == pytest.approx(8.0)
    assert speed.seconds(train[14]) == pytest.approx(8.0 * train[14].cost / train[8].cost)
    measure = next(t for t in plan if t.kind == MEASURE)
    assert speed.seconds(measure) == pytest.approx(8.0 * measure.cost / train[8].cost)
    speed.add(MEASURE, measure.cost, 3.0)
    assert speed.seconds(measure) == pytest.approx(3.0)
    assert speed.seconds(train[8]) == pytest.approx(8.0)
