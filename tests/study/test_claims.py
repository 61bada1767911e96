"""Verdicts on the findings of the paper, on studies whose truth is planted."""

import dataclasses
import math

import pytest

from fasthessian.study.claims import claims
from fasthessian.study.networks import VARIANTS, Network
from fasthessian.study.records import DIVERGED, UNTRAINED, Study
from fasthessian.study.select import MODES
from fasthessian.study.sheets import VERDICTS
from tests.support.synthetic_study import PLANTS, Plant, synthetic

FLAT, DEEP, RESIDUAL = "ResNet-20 is flatter", "deeper than 20", "Without residual"
STAGE = "trace of that stage"


def find(study, words, where="(Running"):
    """The one claim whose statement has both words."""
    found = [c for c in claims(study) if words in c.statement and where in c.statement]
    assert len(found) == 1, [c.statement for c in found]
    return found[0]


def planted(changes, **options):
    """The study of the paper's findings with other plants for some networks."""
    plants = {**PLANTS, **{Network(*key): plant for key, plant in changes.items()}}
    return synthetic(plants, **options)


@pytest.fixture(scope="module")
def study():
    return synthetic()


def test_the_planted_findings_of_the_paper_are_confirmed(study):
    for words in (FLAT, DEEP, RESIDUAL, STAGE):
        for where in ("(Running", "(Batch", "loss, running", "loss, batch"):
            claim = find(study, words, where)
            assert claim.verdict == "confirmed", claim
            assert claim.rows and claim.rows[0][-1] == "confirmed"
    assert find(study, "accuracy is lower", "").verdict == "confirmed"


def test_every_claim_is_complete(study):
    found = claims(study)
    assert len({c.statement for c in found}) == len(found) == 22
    for claim in found:
        assert claim.verdict in VERDICTS and claim.source and claim.reason
        assert all(len(row) == len(claim.columns) for row in claim.rows)


@pytest.mark.parametrize(
    ("words", "key", "trace", "spread", "verdict"),
    [
        (FLAT, (20, "no-bn"), 1500.0, 0.03, "contradicted"),
        (FLAT, (20, "no-bn"), 580.0, 0.03, "not decided"),
        (FLAT, (20, "no-bn"), 200.0, 1.2, "not decided"),  # the seeds differ by a factor of 11
        (DEEP, (32, "no-bn"), 100.0, 0.03, "contradicted"),
        (DEEP, (32, "no-bn"), 720.0, 0.03, "not decided"),
        (RESIDUAL, (20, "no-res"), 100.0, 0.03, "contradicted"),
        (RESIDUAL, (32, "no-res"), 710.0, 0.03, "not decided"),
    ],
)
def test_a_verdict_follows_the_planted_traces(words, key, trace, spread, verdict):
    plant = dataclasses.replace(PLANTS[Network(*key)], trace=trace, spread=spread)
    claim = find(planted({key: plant}), words)
    assert claim.verdict == verdict
    assert f"ResNet-{key[0]}" in claim.reason


def test_one_depth_that_differs_contradicts_a_finding_about_all(study):
    claim = find(planted({(32, "no-res"): Plant(100.0, 0.64)}), RESIDUAL)
    assert [row[-1] for row in claim.rows] == ["confirmed", "contradicted"]
    assert claim.verdict == "contradicted" and "ResNet-32" in claim.reason


def test_statistics_of_the_batches_are_judged_alone():
    changed = dataclasses.replace(PLANTS[Network(20)], batch=0.1)
    study = planted({(20, "resnet"): changed})
    assert find(study, FLAT).verdict == "confirmed"
    assert find(study, FLAT, "(Batch").verdict == "contradicted"


def test_equal_training_loss_can_turn_a_verdict():
    # At the end the network without BN has the larger trace, at a lower loss. Where it has the
    # loss of the ResNet, between its epochs 5 and 20, its trace is 514 against 600.
    study = planted({
        (20, "no-bn"): Plant(800.0, 0.62, 0.3, spread=0.005),
        (20, "resnet"): Plant(600.0, 0.7, 0.7, spread=0.005),
    })  # fmt: skip
    assert find(study, FLAT).verdict == "contradicted"
    claim = find(study, FLAT, "loss, running")
    assert claim.verdict == "confirmed"
    assert claim.rows[0][1] == "514 / 600" and claim.rows[0][4] == "0.700 / 0.700"


def test_losses_without_overlap_are_not_compared():
    study = planted(
        {(20, "no-bn"): Plant(200.0, 0.62, 2.2), (20, "resnet"): Plant(600.0, 0.7, 0.01)}
    )
    claim = find(study, FLAT, "loss, running")
    assert claim.verdict == "not measured" and "No training loss" in claim.reason
    assert find(study, FLAT).verdict == "confirmed"


def test_one_seed_decides_nothing_and_says_where_the_interval_lies():
    claim = find(synthetic(seeds=(0,)), FLAT)
    assert claim.verdict == "not decided" and claim.rows[0][-2] == "1 / 1"
    assert "One seed" in claim.reason and "as stated" in claim.reason
    claim = find(planted({(20, "no-bn"): Plant(5000.0)}, seeds=(0,)), FLAT)
    assert claim.verdict == "not decided" and "the other way" in claim.reason


@pytest.mark.parametrize(
    ("status", "words"), [(DIVERGED, "did not train: diverged"), (UNTRAINED, "not trained")]
)
def test_networks_that_did_not_train_are_left_out(status, words):
    plant = dataclasses.replace(PLANTS[Network(20, "no-bn")], status=status)
    claim = find(planted({(20, "no-bn"): plant}), FLAT)
    assert claim.verdict == "not measured" and claim.rows == () and words in claim.reason


def test_a_depth_that_did_not_train_is_named_beside_the_others():
    plants = {(56, "resnet"): Plant(), (56, "no-bn"): Plant(status=DIVERGED)}
    claim = find(planted(plants, depths=(32, 56)), DEEP)
    assert claim.verdict == "confirmed" and len(claim.rows) == 1
    assert "ResNet-56, no BN did not train: diverged." in claim.reason


def test_what_is_missing_is_named(study):
    for claim in claims(Study({}, (), (), {})):
        assert claim.verdict == "not measured" and claim.rows == () and claim.reason
    without = synthetic(variants=("no-bn", "no-res"))
    assert "no ResNet-20." in find(without, FLAT).reason
    assert "no variant no-bn" in find(synthetic(depths=(32,)), FLAT).reason
    rows = tuple(m for m in study.measurements if m.mode == "eval")
    claim = find(dataclasses.replace(study, measurements=rows), FLAT, "(Batch")
    assert claim.verdict == "not measured" and "batch statistics" in claim.reason
    early = tuple(m for m in study.measurements if m.variant != "no-bn" or m.epoch < 20)
    claim = find(dataclasses.replace(study, measurements=early), FLAT)
    assert claim.verdict == "not measured" and "last epoch" in claim.reason


def test_a_trace_that_is_not_finite_counts_as_not_measured(study):
    rows = tuple(
        dataclasses.replace(m, trace=math.nan) if m.seed and m.variant == "no-bn" else m
        for m in study.measurements
    )
    claim = find(dataclasses.replace(study, measurements=rows), FLAT)
    assert claim.rows[0][-2] == "1 / 2" and claim.verdict == "not decided"


def test_a_trace_that_is_not_positive_has_no_ratio(study):
    last, *_ = (m for m in study.measurements if m.run.network == Network(20) and m.epoch == 20)
    rows = tuple(
        dataclasses.replace(m, trace=-1.0, trace_interval=(-2.0, 0.0)) if m is last else m
        for m in study.measurements
    )
    claim = find(dataclasses.replace(study, measurements=rows), FLAT)
    assert claim.verdict == "not measured" and "is not positive" in claim.reason


def staged(accuracies, rises):
    """Depth 20 with batch normalisation removed from each stage alone."""
    plants = {Network(20): Plant()}
    for s, (accuracy, rise) in enumerate(zip(accuracies, rises, strict=True), 1):
        factors = [1.0] * 5
        factors[s] = rise
        plants[Network(20, f"no-bn-stage{s}")] = Plant(600, accuracy, 0.4, stages=tuple(factors))
    return synthetic(plants, depths=(20,), variants=tuple(VARIANTS))


@pytest.mark.parametrize(
    ("accuracies", "verdict"),
    [
        ((0.68, 0.68, 0.50), "confirmed"),
        ((0.68, 0.40, 0.50), "contradicted"),
        ((0.68, 0.51, 0.50), "not decided"),
    ],
)
def test_the_stage_that_costs_most_accuracy(accuracies, verdict):
    study = staged(accuracies, (1, 1, 1))
    assert find(study, "costs most accuracy", "").verdict == verdict


@pytest.mark.parametrize(
    ("rises", "verdict"),
    [((2, 3, 9), "confirmed"), ((2, 20, 9), "contradicted"), ((2, 8.9, 9), "not decided")],
)
def test_the_stage_whose_trace_rises_most(rises, verdict):
    claim = find(staged((0.6, 0.6, 0.6), rises), "most in the last stage")
    assert claim.verdict == verdict
    assert claim.rows[0][1].startswith("9.0")  # the planted rise of stage 3


def test_accuracies_are_not_compared_more_finely_than_the_test_images_allow(study):
    settings = {"data": {"name": "CIFAR-10", "test images": 50}}
    claim = find(dataclasses.replace(study, settings=settings), "accuracy is lower", "")
    assert claim.verdict == "not decided"


@pytest.mark.parametrize(("slope", "verdict"), [(-1, "confirmed"), (1, "contradicted")])
def test_the_correlation_of_trace_and_accuracy(slope, verdict):
    plants = {
        Network(20, v): Plant(600 * 2**i, 0.6 + slope * 0.03 * i) for i, v in enumerate(VARIANTS)
    }
    study = synthetic(plants, depths=(20,), variants=tuple(VARIANTS), seeds=(0,))
    for mode in MODES:
        claim = find(study, "rises with the loss", f"({MODES[mode].capitalize()}")
        assert claim.verdict == verdict and len(claim.rows) == 8
    few = synthetic(plants, depths=(20,), variants=tuple(VARIANTS)[:4])
    assert find(few, "rises with the loss").verdict == "not measured"
    assert math.isclose(float(find(few, "rises with").rows[0][1].split()[0]), 2.0, rel_tol=0.01)
