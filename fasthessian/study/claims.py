r"""The findings of the paper, and what the numbers of a study say of each.

Rule of the verdicts. A finding compares networks by the logarithm of a trace or by an accuracy. The
difference of the means over seeds has Welch's 95 % interval (``intervals.contrast``): it covers
the spread over seeds and the random probes. If the interval lies on the side that the paper states,
that comparison is confirmed; on the other side, contradicted; if it contains 0, not decided. If a
network has one seed, the interval covers the probes (for accuracies, the choice of test images)
alone, and the comparison is not decided, whatever the interval; its row says where it lies. A
finding about several depths is confirmed if all its comparisons are, contradicted if one is, else
not decided; without any comparison it is not measured. The correlation is between networks, so
that one seed per network is enough for it.

Networks that diverged or did not train are left out of all comparisons. Each finding about
curvature is judged with running and with batch statistics of batch normalisation, as the later
dispute is about that (Ghorbani, Krishnan, Xiao 2019); the paper's code uses running statistics. The
findings about traces are judged again at equal training loss: under cross-entropy a small trace may
only mean large weights and a small loss (Granziol 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fasthessian.study import compare
from fasthessian.study.intervals import (
    Group,
    Quantity,
    at_loss,
    contrast,
    logarithms,
    spearman,
)
from fasthessian.study.networks import Network
from fasthessian.study.records import TRAINED, Measurement, Study
from fasthessian.study.select import MODES, Selection, Value, stage, top, trace
from fasthessian.study.sheets import Claim
from fasthessian.study.text import name_of
from fasthessian.study.verdicts import UNMEASURED, Row, claim_of, pair, ratio, verdict_of


class Finding(NamedTuple):
    """A statement that a quantity is larger (sign 1) or smaller than that of the ResNet."""

    statement: str
    source: str
    variant: str
    depths: Callable[[int], bool]
    sign: int
    quantity: Quantity


def _of_stage(place: int) -> Quantity:
    """The trace of stage 1, 2 or 3."""
    return lambda found: stage(found, f"stage{place}")


_FINDINGS = (
    Finding(
        "Without batch normalisation, ResNet-20 is flatter: its trace is smaller.",
        "Figures 1 to 3",
        "no-bn",
        lambda depth: depth == 20,
        -1,
        trace,
    ),
    Finding(
        "Without batch normalisation, networks deeper than 20 are sharper: their trace is larger.",
        "Figures 1 to 3",
        "no-bn",
        lambda depth: depth > 20,
        1,
        trace,
    ),
    Finding(
        "Without residual connections the trace is larger, at every depth.",
        "Figures 1 and 2",
        "no-res",
        lambda depth: True,
        1,
        trace,
    ),
    Finding(
        "Without batch normalisation in the last stage, the trace of that stage is larger.",
        "Figure 4",
        "no-bn-stage3",
        lambda depth: True,
        1,
        _of_stage(3),
    ),
)
_TRACE_COLUMNS = (
    "compared", "traces", "ratio of traces", "ratio of largest eigenvalues", "training losses",
    "norms of the weights", "seeds",
)  # fmt: skip


def claims(study: Study) -> list[Claim]:
    """Each finding of the paper with the numbers of the study, a verdict and its reason.

    Example:
        >>> from fasthessian.study.records import Study
        >>> claims(Study({}, (), (), {}))[0].verdict
        'not measured'
    """
    selection = Selection(study)
    return [
        *(
            _trace_claim(selection, finding, mode, equal)
            for finding in _FINDINGS
            for mode in MODES
            for equal in (False, True)
        ),
        *(_last_stage_rises_most(selection, mode) for mode in MODES),
        _accuracy_falls(selection),
        _last_stage_costs_most(selection),
        *(_correlation(selection, mode) for mode in MODES),
    ]


def _trace_claim(selection: Selection, finding: Finding, mode: str, equal: bool) -> Claim:
    """A finding about traces with one kind of statistics, at the end or at equal loss."""
    networks = [n for n in selection.networks if n.variant == finding.variant]
    networks = [n for n in networks if finding.depths(n.depth)]
    rows = [_trace_row(selection, n, finding, mode, equal) for n in networks]
    absent = [n for n, row in zip(networks, rows, strict=True) if row is None]
    if networks:
        lacking = " ".join(_lacking(selection, network, mode, equal) for network in absent)
    else:
        lacking = f"The study has no variant {finding.variant} at such a depth."
    where = f"At equal training loss, {MODES[mode]}" if equal else f"{MODES[mode]}".capitalize()
    return claim_of(
        f"{finding.statement} ({where}.)",
        f"{finding.source}; the paper compares at the end" if equal else finding.source,
        _TRACE_COLUMNS,
        [row for row in rows if row],
        lacking,
    )


def _trace_row(
    selection: Selection, network: Network, finding: Finding, mode: str, equal: bool
) -> Row | None:
    """The comparison of a network with the ResNet of its depth."""
    base = compare.base_of(network)
    both = (network, base)
    level = None

    def groups(quantity: Quantity) -> list[Group | None]:
        if level is None:
            return [logarithms(compare.at_end(selection, n, mode), quantity) for n in both]
        return [at_loss(compare.paths(selection, n, mode), level, quantity) for n in both]

    if equal:
        reached = compare.ratio_at_loss(selection, network, base, mode, finding.quantity)
        if reached is None:
            return None
        level, difference = reached
    else:
        found = compare.ratio(selection, network, base, mode, finding.quantity)
        if found is None:
            return None
        difference = found
    tops = groups(top)
    cells = (
        f"{name_of(network)} / {name_of(base)}",
        pair(groups(finding.quantity)),
        ratio(difference),
        ratio(contrast([(1, tops[0]), (-1, tops[1])])) if tops[0] and tops[1] else "-",
        pair(groups(_plain("loss"))),
        pair(groups(_plain("weight_norm"))),
        " / ".join(str(len(group.values)) for group in groups(finding.quantity) if group),
    )
    return Row(cells, difference, finding.sign)


def _plain(name: str) -> Quantity:
    """A number of a measurement that has no interval."""

    def read(found: Measurement) -> Value:
        value = float(getattr(found, name))
        return Value(value, value, value)

    return read


def _lacking(selection: Selection, network: Network, mode: str, equal: bool) -> str:
    """Why a network cannot be compared with the ResNet of its depth."""
    base = compare.base_of(network)
    both = f"{name_of(network)} and {name_of(base)}"
    for each in (network, base):
        if each not in selection.networks:
            return f"The study has no {name_of(each)}."
        if TRAINED not in selection.statuses(each):
            return f"{name_of(each)} did not train: {selection.statuses(each)[0]}."
        if not compare.at_end(selection, each, mode):
            return f"{name_of(each)} was not measured with {MODES[mode]} at the last epoch."
    if equal:
        return f"No training loss is passed by all seeds of {both}."
    return f"A trace among {both} is not positive."


def _accuracy_rows(
    selection: Selection, pairs: Callable[[int], Iterator[tuple[Network, Network]]]
) -> list[Row]:
    """Comparisons of accuracies: the first network of a pair should be the worse one."""
    rows = []
    for depth in selection.depths:
        for worse, better in pairs(depth):
            groups = [compare.accuracy(selection, n) for n in (better, worse)]
            if groups[0] and groups[1]:
                lost = contrast([(1, groups[0]), (-1, groups[1])])
                means = [sum(g.values) / len(g.values) for g in groups if g]
                cells = (
                    f"{name_of(worse)} / {name_of(better)}",
                    f"{means[1]:.2f} / {means[0]:.2f}",
                    f"{lost.value:.2f} [{lost.low:.2f}, {lost.high:.2f}]",
                    f"{len(groups[1].values)} / {len(groups[0].values)}",
                )
                rows.append(Row(cells, lost, 1))
    return rows


_NO_STAGES = "No depth has a trained network without BN in stage 3, and one in another stage."
_ACCURACY_COLUMNS = "compared", "test accuracies (%)", "points lost", "seeds"


def _accuracy_falls(selection: Selection) -> Claim:
    def pairs(depth: int) -> Iterator[tuple[Network, Network]]:
        yield Network(depth, "no-bn-stage3"), Network(depth)

    rows = _accuracy_rows(selection, pairs)
    return claim_of(
        "Without batch normalisation in the last stage, the test accuracy is lower.",
        "Table II",
        _ACCURACY_COLUMNS,
        rows,
        "" if rows else "No depth has trained networks with and without BN in stage 3.",
    )


def _last_stage_costs_most(selection: Selection) -> Claim:
    def pairs(depth: int) -> Iterator[tuple[Network, Network]]:
        for other in (1, 2):
            yield Network(depth, "no-bn-stage3"), Network(depth, f"no-bn-stage{other}")

    rows = _accuracy_rows(selection, pairs)
    return claim_of(
        "Removing batch normalisation costs most accuracy in the last stage.",
        "Table II",
        _ACCURACY_COLUMNS,
        rows,
        "" if rows else _NO_STAGES,
    )


def _last_stage_rises_most(selection: Selection, mode: str) -> Claim:
    """The rise of stage 3's trace against that of stage 1 or 2, each where its BN is removed."""
    rows = []
    for depth in selection.depths:
        removed, bases = {}, {}
        base = compare.at_end(selection, Network(depth), mode)
        for s in (1, 2, 3):
            here = compare.at_end(selection, Network(depth, f"no-bn-stage{s}"), mode)
            removed[s] = logarithms(here, _of_stage(s))
            bases[s] = logarithms(base, _of_stage(s))
        last, before = removed[3], bases[3]
        for s in (1, 2):
            other, start = removed[s], bases[s]
            if not (last and before and other and start):
                continue
            values = tuple(a - b for a, b in zip(before.values, start.values, strict=True))
            errors = tuple(math.hypot(*e) for e in zip(before.errors, start.errors, strict=True))
            difference = contrast([(1, last), (-1, other), (-1, Group(values, errors))])
            rises = [
                ratio(contrast([(1, a), (-1, b)])) for a, b in ((last, before), (other, start))
            ]
            seeds = " / ".join(str(len(group.values)) for group in (last, other, before))
            name = f"ResNet-{depth}, stage 3 / stage {s}"
            rows.append(Row((name, *rises, ratio(difference), seeds), difference, 1))
    return claim_of(
        "Removing batch normalisation raises the trace of the stage most in the last stage. "
        f"({MODES[mode].capitalize()}.)",
        "Figure 4",
        ("compared", "rise of stage 3", "rise of the other", "ratio of rises", "seeds"),
        rows,
        "" if rows else f"{_NO_STAGES} Or their traces were not measured with {MODES[mode]}.",
    )


def _correlation(selection: Selection, mode: str) -> Claim:
    """Rank correlation between the trace and the accuracy lost, both relative to the ResNet."""
    cells, x, y = [], [], []
    for network in selection.networks:
        base = compare.base_of(network)
        lost = compare.loss_of_accuracy(selection, network)
        found = compare.ratio(selection, network, base, mode, trace)
        if network != base and lost and found:
            cells.append((name_of(network), ratio(found), f"{lost.value:.2f}"))
            x.append(found.value)
            y.append(lost.value)
    rank = spearman(x, y)
    statement = f"The trace rises with the loss of accuracy. ({MODES[mode].capitalize()}.)"
    columns = ("network", "trace / trace of ResNet", "points of accuracy lost")
    if rank is None:
        verdict, reason = UNMEASURED, f"{len(x)} networks beside ResNet; a correlation needs four."
    else:
        verdict = verdict_of(rank, 1)
        reason = (
            f"Spearman's rank correlation over {len(x)} networks is {rank.value:.2f}, 95 % interval"
            f" [{rank.low:.2f}, {rank.high:.2f}]."
        )
    return Claim(
        statement, "Figure 4 with Tables II and III", columns, tuple(cells), verdict, reason
    )
