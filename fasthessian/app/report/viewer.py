"""The viewer of loss landscapes: a piece of HTML that holds the losses and draws them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fasthessian.app.report.templates import content, template
from fasthessian.results.records import Landscape


def head() -> str:
    """The script and the style of the viewers of a page, for its head."""
    return f"<style>\n{content('viewer.css')}</style>\n<script>\n{content('viewer.js')}</script>\n"


def viewer(
    landscapes: Mapping[tuple[str, ...], Landscape],
    title: str,
    *,
    choices: Sequence[str] = (),
    picture: bytes = b"",
) -> str:
    """A piece of HTML in which landscapes over two directions turn with the mouse.

    The page also needs `head`, once. Nothing is loaded: the losses are inside, with five
    significant digits, or with more where losses differ by little. A loss that is not finite is a
    hole in the surface. A trajectory is drawn on it.

    Args:
        landscapes: by key, a tuple with one word per choice. One landscape is shown at a time.
        title: what is shown, for those who cannot see it.
        choices: names of the parts of the keys; for each the viewer has a list to select from.
        picture: a PNG file that is shown where scripts do not run.

    Returns:
        A ``figure`` element.

    Raises:
        ImportError: jinja2 is missing.

    Example:
        >>> import torch
        >>> from fasthessian.app.report.viewer import viewer
        >>> from fasthessian.results.records import Landscape
        >>> x = torch.linspace(-1, 1, 3, dtype=torch.float64)
        >>> html = viewer({(): Landscape(x, x, x[:, None] ** 2 + x**2)}, "A bowl")
        >>> "[2,1,2,1,0,1,2,1,2]" in html
        True
    """
    finite = [loss for part in landscapes.values() for loss in _finite(part.losses)]
    surfaces = [
        {
            "key": json.dumps(key),
            "label": f"{' '.join((title, *key))}: {_words(landscape)}",
            "words": _words(landscape),
            "data": _data(landscape),
        }
        for key, landscape in landscapes.items()
    ]
    words = [dict.fromkeys(key[part] for key in landscapes) for part in range(len(choices))]
    return template("viewer.html").render(
        title=title,
        range=json.dumps([min(finite), max(finite)] if finite else [0, 0]),
        choices=list(zip(choices, words, strict=True)),
        surfaces=surfaces,
        picture=base64.b64encode(picture).decode(),
    )


def _finite(losses: Tensor) -> list[float]:
    return losses[losses.isfinite()].tolist()


def _words(landscape: Landscape) -> str:
    """The range of the losses, where the lowest one is, and how many holes there are."""
    losses, count = landscape.losses, landscape.losses.numel()
    finite = losses.isfinite()
    if not finite.any():
        return "no loss is finite, the span is too wide."
    lowest = losses.masked_fill(~finite, math.inf).argmin()
    i, j = divmod(int(lowest), losses.shape[1])
    known = losses[finite]
    holes = count - len(known)
    alpha, beta = _axis(landscape.alphas)[i], _axis(landscape.betas)[j]
    low, high = _short((float(known.min()), float(known.max())))
    return f"loss from {low}, at alpha = {alpha:.3g} and beta = {beta:.3g}, to {high}" + (
        f"; {holes} of {count} losses are not finite: holes." if holes else "."
    )


def _data(landscape: Landscape) -> str:
    """The numbers of a landscape as JSON without spaces."""
    axes = _axis(landscape.alphas), _axis(landscape.betas), landscape.losses.flatten()
    alphas, betas, losses = (",".join(_short(axis.tolist())) for axis in axes)
    points = ",".join(f"[{','.join(_short(at))}]" for at in landscape.trajectory.T.tolist())
    return f'{{"alphas":[{alphas}],"betas":[{betas}],"losses":[{losses}],"trajectory":[{points}]}}'


def _axis(steps: Tensor) -> Tensor:
    """The steps of a grid; the one in the middle is 0 and not a rounding error."""
    return steps.where(steps.abs() > 1e-6 * steps.abs().max(), 0.0)


def _short(values: Iterable[float]) -> list[str]:
    """Numbers with as few digits as a screen shows; null for those that are not finite."""
    values = list(values)
    known = [value for value in values if math.isfinite(value)]
    span = max(known) - min(known) if known else 0.0
    return [_digits(value, span) if math.isfinite(value) else "null" for value in values]


def _digits(value: float, span: float) -> str:
    """A number with five digits, or with more if the last would exceed ``span / 1000``."""
    extra = math.log10(abs(value) / span) if value and span else 0.0
    return f"{value:.{min(max(5, 5 + math.floor(extra)), 17)}g}"
