"""The tables of a study: ours beside the paper's, as cells of text, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from fasthessian.study import paper
from fasthessian.study.intervals import Quantity
from fasthessian.study.networks import Network
from fasthessian.study.records import DIVERGED, TRAINED, UNTRAINED, Measurement, Study, Training
from fasthessian.study.select import MODES, Selection, top, trace
from fasthessian.study.sheets import Claim, Table
from fasthessian.study.text import LABELS, interval, name_of, number

# name, title, variants, and the paper's table for CIFAR-10
_ACCURACIES = (
    (
        "accuracy",
        "Test accuracy by depth",
        ("resnet", "no-bn", "no-res"),
        "Table I",
    ),
    (
        "accuracy-no-bn-stages",
        "Test accuracy with batch normalisation removed from one stage",
        ("resnet", "no-bn-stage1", "no-bn-stage2", "no-bn-stage3"),
        "Table II",
    ),
    (
        "accuracy-no-res-stages",
        "Test accuracy with residual connections removed from one stage",
        ("resnet", "no-res-stage1", "no-res-stage2", "no-res-stage3"),
        "Table III",
    ),
)
NONE = "-"


def tables(study: Study) -> list[Table]:
    """The tables for which the study has data: accuracies as in the paper, and curvature.

    Example:
        >>> from fasthessian.study.records import Study
        >>> tables(Study({}, (), (), {}))
        []
    """
    selection = Selection(study)
    found = [_accuracies(selection, *row) for row in _ACCURACIES]
    found += [_curvature(selection), _trainings(study, selection)]
    return [table for table in found if table.rows]


def of_claims(claims: Sequence[Claim]) -> Table:
    """The verdict on each finding of the paper.

    Example:
        >>> of_claims([Claim("A is flatter.", "Figure 1", (), (), "not decided", "One seed.")]).rows
        (('A is flatter.', 'Figure 1', 'not decided', 'One seed.'),)
    """
    rows = tuple((each.statement, each.source, each.verdict, each.reason) for each in claims)
    return Table(
        "claims",
        "Findings of the paper, and what this study says of them",
        ("finding", "in the paper", "verdict", "why"),
        rows,
        "Intervals are at 95 %; the report has the numbers of each comparison.",
    )


def as_csv(table: Table) -> str:
    r"""The table as CSV: a line of column names, then the rows.

    Example:
        >>> as_csv(Table("t", "T", ("a", "b"), (("1", "2,5"),), ""))
        'a,b\n1,"2,5"\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((table.columns, *table.rows))
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """The table as Markdown: title, table, caption.

    Example:
        >>> print(as_markdown(Table("t", "T", ("a", "b"), (("1", "2"),), "Numbers.")))
        ### T
        <BLANKLINE>
        | a | b |
        |---|---|
        | 1 | 2 |
        <BLANKLINE>
        Numbers.
        <BLANKLINE>
    """
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    rows = "\n".join("|" + "|".join(f" {cell} " for cell in line) + "|" for line in lines)
    rows = rows.replace(" --- ", "---")
    return f"### {table.title}\n\n{rows}\n\n{table.caption}\n"


def _accuracies(
    selection: Selection, name: str, title: str, variants: Sequence[str], theirs_is: str
) -> Table:
    """Accuracies in percent: a row per variant, two columns per depth."""
    data = str(selection.study.settings.get("data", {}).get("name", ""))
    present = [v for v in variants if v in selection.variants]
    if not set(present) - {"resnet"} and name != "accuracy":
        present = []
    rows = []
    for variant in present:
        cells = [LABELS[variant]]
        for depth in selection.depths:
            theirs = paper.accuracy(Network(depth, variant), data)
            cells.append(ours(selection.trainings.get(Network(depth, variant), [])))
            cells.append(f"{theirs:.2f}" if isinstance(theirs, float) else theirs or NONE)
        rows.append(tuple(cells))
    columns = [f"depth {depth}{who}" for depth in selection.depths for who in (", ours", ", paper")]
    here = "Tables A.5 to A.7" if data == "CIFAR-100" else theirs_is
    caption = (
        "Percent of the test images after the last epoch: mean ± standard deviation over seeds; "
        f"with one seed the value alone. Paper: {here}, all 50,000 training images, 180 "
        f"epochs, one training per network. {NONE} in a column of the paper: not available here."
    )
    return Table(name, title, ("network", *columns), tuple(rows), caption)


def ours(trainings: Sequence[Training]) -> str:
    """The last test accuracy over the seeds of a network, and what did not train.

    Example:
        >>> ours([])
        '-'
    """
    if not trainings:
        return NONE
    values = [_last_accuracy(t) for t in trainings if t.status == TRAINED]
    notes = []
    for status in (DIVERGED, UNTRAINED):
        rows = [t for t in trainings if t.status == status]
        if rows:
            reached = f" ({max(map(_last_accuracy, rows)):.1f})" * (status == UNTRAINED)
            share = f"{len(rows)} of {len(trainings)} " * (len(rows) < len(trainings))
            notes.append(share + status + reached)
    return "; ".join(([_spread(values)] if values else []) + notes)


def _last_accuracy(training: Training) -> float:
    return 100 * float(training.test_accuracy[-1])


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    deviation = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.2f} ± {deviation:.2f}"


def _curvature(selection: Selection) -> Table:
    """Trace and largest eigenvalue of each kept training, beside loss and weight norm."""
    data = str(selection.study.settings.get("data", {}).get("name", ""))
    rows = []
    for network in selection.networks:
        for mode in ("eval", "train") if network.has_batch_norm else ("eval",):
            theirs = paper.trace(network, data) if mode == "eval" else None
            for found in selection.last(network, mode):
                status = selection.training_of(found).status
                cells = (
                    name_of(network) + f" ({status})" * (status != TRAINED),
                    str(found.seed),
                    MODES[mode] if network.has_batch_norm else "no batch normalisation",
                    *(_cell(quantity, found) for quantity in (trace, top)),
                    number(found.loss),
                    f"{100 * found.accuracy:.1f}",
                    number(found.weight_norm),
                    number(found.gradient_norm),
                    NONE if theirs is None else f"about {theirs:g}",
                )
                rows.append(cells)
    columns = (
        "network", "seed", "statistics", "trace", "largest eigenvalue", "training loss",
        "training accuracy (%)", "norm of the weights", "norm of the gradient", "trace, paper",
    )  # fmt: skip
    caption = (
        f"After epoch {selection.end}. In brackets: 95 % interval of the trace over random "
        "probes, and the eigenvalue with its residual bound. Loss, accuracy and trace are on the "
        "same images and with the same statistics. Paper: running statistics, CIFAR-10, to one "
        f"digit, from the text to Figure 2; {NONE}: not available here."
    )
    return Table("curvature", "Curvature at the end of training", columns, tuple(rows), caption)


def _cell(quantity: Quantity, found: Measurement) -> str:
    value = quantity(found)
    return f"{number(value.value)} {interval(value.low, value.high)}"


def _trainings(study: Study, selection: Selection) -> Table:
    """Every training, also those whose learning rate was not kept."""
    kept = {t.run for rows in selection.trainings.values() for t in rows}
    rows = []
    for t in study.trainings:
        ended = len(t.test_accuracy) > 0 and t.status != DIVERGED
        last = (NONE, NONE)
        if ended:
            last = number(float(t.train_loss[-1])), f"{_last_accuracy(t):.2f}"
        rows.append(
            (
                name_of(t.run.network),
                str(t.seed),
                f"{t.lr:g}",
                t.status,
                "yes" if t.run in kept else "no",
                str(len(t.test_accuracy)),
                *last,
                f"{t.seconds:.0f}",
            )
        )
    columns = (
        "network", "seed", "initial rate", "status", "kept", "epochs", "training loss",
        "test accuracy (%)", "seconds",
    )  # fmt: skip
    caption = (
        "Training loss over the last epoch, test accuracy after it. The rate with the best last "
        "test accuracy is kept for each network and seed."
    )
    return Table("trainings", "All trainings", columns, tuple(rows), caption)
