"""The report of a study: one HTML file with claims, tables, figures and landscapes that turn."""

from __future__ import annotations

import base64
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from fasthessian.app.report.summary import Rows
from fasthessian.app.report.templates import template
from fasthessian.app.report.viewer import head, viewer
from fasthessian.results.records import Landscape
from fasthessian.study.networks import Network
from fasthessian.study.records import TRAINED, Study
from fasthessian.study.sheets import VERDICTS, Claim, Figure, Table
from fasthessian.study.text import name_of

TITLE = "Batch normalisation and residual connections through the Hessian"
SIGNS = dict(zip(VERDICTS, ("✓", "✗", "?", "–"), strict=True))  # noqa: RUF001
LARGEST = 1 << 20  # characters of a page that landscapes may take

Key = tuple[str, ...]


def study_page(
    study: Study,
    figures: Sequence[Figure],
    tables: Sequence[Table],
    claims: Sequence[Claim],
    absent: Mapping[str, str] | None = None,
) -> str:
    """The report of a study as one HTML file, which loads nothing.

    Args:
        study: what was found; its settings, landscapes and what it lacks are shown.
        figures: in the order of the report, those of one kind together. Each is embedded in the
            smaller of its formats.
        tables: in the order of the report.
        claims: in the order of the report.
        absent: why a kind of figure is missing, by its name.

    Raises:
        ImportError: jinja2 is missing.

    Example:
        >>> from fasthessian.app.report.study_page import study_page
        >>> from fasthessian.study.records import Study
        >>> "No claim was examined" in study_page(Study({}, (), (), {}), [], [], [])
        True
    """
    kinds = [
        (f"kind-{kind}", list(group))
        for kind, group in itertools.groupby(figures, operator.attrgetter("kind"))
    ]
    shown = [
        (anchor, _heading(group), [(figure, _source(figure)) for figure in group])
        for anchor, group in kinds
    ]
    landscapes, omitted = _landscapes(study)
    interactive = (
        viewer(landscapes, "Loss landscape", choices=("network", "seed", "epoch", "mode"))
        if landscapes
        else ""
    )
    counts = [(verdict, sum(claim.verdict == verdict for claim in claims)) for verdict in VERDICTS]
    contents = [
        ("claims", "Claims"),
        *([("tables", "Tables")] if tables else []),
        *((anchor, heading) for anchor, heading, _ in shown),
        *([("landscapes", "Landscapes that turn")] if interactive else []),
        ("missing", "What is missing"),
    ]
    return template("study.html").render(
        title=TITLE,
        head=head() if interactive else "",
        summary=_summary(study),
        settings=_settings(study.settings),
        contents=contents,
        signs=SIGNS,
        verdicts=[(verdict, count) for verdict, count in counts if count],
        claims=claims,
        tables=tables,
        kinds=shown,
        viewer=interactive,
        omitted=omitted,
        missing=_missing(study) + list((absent or {}).items()),
    )


def _heading(figures: Sequence[Figure]) -> str:
    """The title of the figures of a kind: what comes before depth or mode, if there are several."""
    title = figures[0].title
    return title if len(figures) == 1 else title.partition(",")[0]


def _source(figure: Figure) -> str:
    """The smaller file of a figure as a data URI."""
    formats = (("image/svg+xml", figure.svg), ("image/png", figure.png))
    kind, content = min(formats, key=lambda pair: len(pair[1]))
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _landscapes(study: Study) -> tuple[dict[Key, Landscape], str]:
    """The landscapes of a page by network, seed, epoch and mode, and how many are omitted.

    The last epochs come first, and early ones are omitted if they would make the page large.
    """
    kept, size = set(), 0
    for key in sorted(study.landscapes, key=lambda key: -key[1]):
        size += 8 * study.landscapes[key].losses.numel()
        if size > LARGEST:
            break
        kept.add(key)
    networks = list(dict.fromkeys(run.network for run, _, _ in study.landscapes))
    order = sorted(
        (key for key in study.landscapes if key in kept),
        key=lambda key: (networks.index(key[0].network), key[0].seed, -key[1]),
    )
    found: dict[Key, Landscape] = {
        (name_of(run.network), str(run.seed), str(epoch), mode): study.landscapes[run, epoch, mode]
        for run, epoch, mode in order
    }
    rest = len(study.landscapes) - len(kept)
    return found, f" To keep this page small, {rest} of early epochs are omitted." * (rest > 0)


def _summary(study: Study) -> Rows:
    """What was run, in a few rows."""
    kept = study.kept()
    networks = list(dict.fromkeys(name_of(training.run.network) for training in kept))
    training = sum(one.seconds for one in study.trainings)
    analysis = sum(one.seconds for one in study.measurements)
    recipe = study.settings.get("recipe", {})
    epochs = recipe.get("epochs") if isinstance(recipe, Mapping) else None
    rows = [
        ("networks", ", ".join(networks) or "none yet"),
        ("trainings", f"{len(study.trainings)}, of which {len(kept)} at the rate that was kept"
         + (f"; epochs: {epochs}" if epochs else "")),
        ("measurements", f"{len(study.measurements)} at "
         f"{len({(one.run, one.epoch) for one in study.measurements})} checkpoints"),
        ("time", f"training {_time(training)}, analysis {_time(analysis)}"),
    ]  # fmt: skip
    data = study.settings.get("data")
    if isinstance(data, Mapping):
        rows.insert(0, ("data", "; ".join(f"{name}: {value}" for name, value in data.items())))
    return rows


def _time(seconds: float) -> str:
    """A duration in words."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """The settings by heading; those that are not in a group come first."""
    plain = [(name, _words(value)) for name, value in settings.items()
             if not isinstance(value, Mapping)]  # fmt: skip
    groups = [(name, [(part, _words(inner)) for part, inner in value.items()])
              for name, value in settings.items() if isinstance(value, Mapping)]  # fmt: skip
    return [("study", plain)] * bool(plain) + groups


def _words(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return "automatic" if value is None else str(value)


def _missing(study: Study) -> Rows:
    """Networks that did not train, seeds without a training, and checkpoints not measured."""
    kept = study.kept()
    seeds = {training.seed for training in kept}
    recipe = study.settings.get("recipe")
    planned = recipe.get("checkpoints", ()) if isinstance(recipe, Mapping) else ()
    epochs = {*planned, *(found.epoch for found in study.measurements)}
    measured = {(found.run, found.epoch, found.mode) for found in study.measurements}
    rows: Rows = []
    trained: dict[Network, set[int]] = {}
    for training in kept:
        run = training.run
        trained.setdefault(run.network, set()).add(run.seed)
        modes = ("eval", "train") if run.network.has_batch_norm else ("eval",)
        rest = [f"{epoch} ({mode})" for epoch in sorted(epochs) for mode in modes
                if (run, epoch, mode) not in measured]  # fmt: skip
        words = []
        if training.status != TRAINED:
            words.append(f"{training.status} with the initial rate {run.lr:g}")
        if rest:
            none = len(rest) == len(modes) * len(epochs)
            words.append("not measured" + f" at epoch {', '.join(rest)}" * (not none))
        if words:
            rows.append((f"{name_of(run.network)}, seed {run.seed}", "; ".join(words)))
    for network, have in trained.items():
        if lacking := sorted(seeds - have):
            rows.append((name_of(network), f"no training ended for seed {_words(lacking)}"))
    return rows
