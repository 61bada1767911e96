"""Welch intervals, rank correlation and crossings of a loss, against SciPy and closed forms."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from fasthessian.study import intervals
from fasthessian.study.compare import base_of, ratio_at_loss
from fasthessian.study.intervals import Group, contrast, quantile, spearman
from fasthessian.study.networks import Network
from fasthessian.study.select import Selection, trace
from tests.support.synthetic_study import Plant, synthetic


def group(*values, error=0.0, shared=0.0):
    return Group(tuple(values), (error,) * len(values), shared)


@pytest.mark.parametrize("freedom", [1, 1.01, 1.5, 2, 2.7, 5.5, 30, 300.5])
def test_the_quantile_is_that_of_student_or_a_little_more(freedom):
    assert 1 - 1e-6 <= quantile(freedom) / stats.t.ppf(0.975, freedom) <= 1.03


def test_a_difference_has_the_interval_of_welch():
    a, b = (1.0, 1.4, 0.9), (2.0, 2.9, 2.2, 2.5)
    found = contrast([(1, group(*a)), (-1, group(*b))])
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    width = (expected.high - expected.low) / 2
    assert width <= found.high - found.value == pytest.approx(width, rel=0.03)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert found.seeds


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    random = np.random.default_rng(1)
    draws = random.normal(0.0, [[0.2], [0.05]], (2000, 2, 2))
    found = [contrast([(1, group(*a)), (-1, group(*b))]) for a, b in draws]
    covered = np.mean([row.low <= 0 <= row.high for row in found])
    assert covered > 0.94  # 3 standard errors below 0.955; Welch is wide for two seeds


def test_probes_widen_an_interval_that_two_close_seeds_would_make_too_narrow():
    near = contrast([(1, group(1.0, 1.0)), (-1, group(2.0, 2.0))])
    assert near.low == near.high == -1
    found = contrast([(1, group(1.0, 1.0, error=0.1)), (-1, group(2.0, 2.0, error=0.1))])
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 2) * 0.1)


def test_one_seed_has_the_interval_of_the_probes_and_is_marked():
    found = contrast([(1, group(1.0, error=0.3)), (-1, group(2.0, error=0.4))])
    assert not found.seeds
    assert found.high - found.value == pytest.approx(1.96 * 0.5)


def test_an_error_that_seeds_share_does_not_fall_with_their_number():
    widths = []
    for seeds in (2, 200):
        row = contrast([(1, group(*[1.0, 1.0] * (seeds // 2), shared=0.2)), (-1, group(0.0, 0.0))])
        widths.append(row.high - row.value)
    assert widths == pytest.approx([1.96 * 0.2] * 2)


def test_rank_correlation_is_that_of_scipy_also_with_ties():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 6, (2, 15)).astype(float)
    found = spearman(x.tolist(), y.tolist())
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    z = math.atanh(found.value)
    assert math.atanh(found.high) - z == pytest.approx(1.96 * math.sqrt(1.06 / 12))


def test_four_networks_never_decide_a_correlation_and_five_can():
    # of the orders of 4, 1 in 12 is perfect in either direction; of 5, 1 in 60
    assert spearman([1, 2, 3, 4], [1, 2, 3, 4]).low < 0
    assert spearman([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]).low > 0
    assert spearman([1, 2, 3], [1, 2, 3]) is None
    assert spearman([1, 2, 3, 4], [1, 1, 1, 1]) is None


def powers(exponents, scales):
    """A study of one seed whose traces are exact powers of the training loss."""
    plants = {Network(20): Plant(loss=0.3), Network(20, "no-bn"): Plant(loss=0.5)}
    study = synthetic(plants, depths=(20,), seeds=(0,), epochs=(0, 4, 12, 20))
    rows = []
    for m in study.measurements:
        value = scales[m.variant] * m.loss ** exponents[m.variant]
        rows.append(dataclasses.replace(m, trace=value, trace_interval=(0.9 * value, 1.1 * value)))
    return dataclasses.replace(study, measurements=tuple(rows))


def test_at_equal_loss_a_power_of_the_loss_is_interpolated_exactly():
    study = powers({"resnet": -0.7, "no-bn": -0.2}, {"resnet": 100.0, "no-bn": 300.0})
    selection, network = Selection(study), Network(20, "no-bn")
    found = ratio_at_loss(selection, network, base_of(network), "eval", trace)
    assert found.loss == pytest.approx(0.5)  # the lowest that both reach
    assert found.ratio.value == pytest.approx(math.log(3 * 0.5**0.5))


def test_the_last_crossing_counts_and_the_start_does_not():
    study = powers({"resnet": -1.0, "no-bn": -1.0}, {"resnet": 1.0, "no-bn": 1.0})
    path = [m for m in study.measurements if m.variant == "resnet" and m.mode == "eval"]
    losses = (9.0, 1.0, 0.4, 0.8)  # epochs 0, 4, 12, 20
    path = [dataclasses.replace(m, loss=x) for m, x in zip(path, losses, strict=True)]
    assert intervals.common_loss([path]) == 0.4
    assert intervals.common_loss([path, [dataclasses.replace(path[1], loss=2.0)]]) is None
    (value,) = intervals.at_loss([path], 0.6, trace).values
    share = math.log(0.4 / 0.6) / math.log(0.4 / 0.8)
    low, high = (math.log(m.trace) for m in path[2:])
    assert value == pytest.approx((1 - share) * low + share * high)
    assert intervals.at_loss([path], 5.0, trace) is None  # crossed before the first epoch alone
