"""What the report of a study consists of: figures, tables and claims, ready to be shown."""

from __future__ import annotations

import dataclasses

# what can be said of a claim of the paper
VERDICTS = ("confirmed", "contradicted", "not decided", "not measured")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One picture, in two formats.

    Attributes:
        kind: what it shows; figures of one kind stand together in the report.
        name: the file name without a suffix; unique in a study.
        title: one line.
        caption: what to see in it, and the number of the paper's figure.
        png: the PNG file.
        svg: the SVG file.

    Example:
        >>> from fasthessian.study.sheets import Figure
        >>> picture = Figure("trace", "trace-depth20", "Trace", "Figure 2.", b"", b"")
        >>> picture.name + ".png"
        'trace-depth20.png'
    """

    kind: str
    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


@dataclasses.dataclass(frozen=True)
class Table:
    """One table, whose cells are strings as they are shown.

    Attributes:
        name: the file name without a suffix; unique in a study.
        title: one line.
        columns: the c names of the columns.
        rows: rows of c cells.
        caption: what the columns mean, and the number of the paper's table.

    Example:
        >>> from fasthessian.study.sheets import Table
        >>> table = Table("accuracy", "Accuracy", ("network", "test"), (("20", "91.2 %"),), "")
        >>> dict(zip(table.columns, table.rows[0]))["test"]
        '91.2 %'
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A finding of the paper, the numbers of this study that bear on it, and the verdict.

    Attributes:
        statement: the finding, one sentence.
        source: where the paper states it.
        columns: the c names of the columns.
        rows: rows of c cells: values with their intervals.
        verdict: one of VERDICTS.
        reason: why, one or two sentences.

    Example:
        >>> from fasthessian.study.sheets import VERDICTS, Claim
        >>> claim = Claim("A is flatter.", "Section 4", ("net",), (("A",),), "not decided", "...")
        >>> claim.verdict in VERDICTS
        True
    """

    statement: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    verdict: str
    reason: str
