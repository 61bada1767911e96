"""Figures of the result records; matplotlib is imported when a figure is drawn.

Every function draws into ``ax``. Without ``ax`` it makes a new figure with one Axes, which belongs
to no window and no global state: ``plot_density(d).figure.savefig("density.png")``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fasthessian.errors import MissingPackageError
from fasthessian.results.drawable import Blocks, Curve, Losses, Mean, Pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]

INK = "#1f3b63"
ACCENT = "#c8442c"
BAND = "#9db8dc"
GREY = "#6b7280"
BARS = 100  # blocks in one figure, at most


def figure(width: float = 7.0, height: float = 4.2) -> Figure:
    """An empty figure of this size in inches, drawn without a display.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("figures need matplotlib; pip install matplotlib") from error
    fig = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(fig)
    return fig


def plot_eigenpairs(pairs: Pairs, ax: Axes | None = None) -> Axes:
    """Eigenvalues by rank, with their residuals as error bars and as numbers."""
    ax = figure().add_subplot() if ax is None else ax
    values, residuals = pairs.values.numpy(), pairs.residuals.numpy()
    rank = np.arange(1, len(values) + 1)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.vlines(rank, 0, values, color=BAND, linewidth=3)
    ax.errorbar(rank, values, residuals, fmt="o", color=INK, capsize=4, label="value ± residual")
    if len(values) <= 12:
        for x, value, residual in zip(rank, values, residuals, strict=True):
            ax.annotate(
                f"{value:.4g}\n± {residual:.1g}",
                (x, value),
                xytext=(0, 9 if value >= 0 else -9),
                textcoords="offset points",
                ha="center",
                va="bottom" if value >= 0 else "top",
                fontsize=8,
                color=INK,
            )
    ax.margins(y=0.22)
    if values.min(initial=0) == 0:
        ax.set_ylim(bottom=0)
    elif values.max(initial=0) == 0:
        ax.set_ylim(top=0)
    ax.set_xlim(0.4, len(values) + 0.6)
    if len(values) <= 20:
        ax.set_xticks(rank)
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue of the Hessian")
    ax.set_title("Eigenvalues" if pairs.converged else "Eigenvalues\n(not converged)")
    return tidy(ax)


def shown(name: str, most: int = 2**31) -> str:
    """A name as one line of at most ``most`` characters, with escapes for unprintable ones."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def plot_blocks(blocks: Blocks, ax: Axes | None = None) -> Axes:
    """The outermost eigenvalue of each block as a bar, with the first block at the top.

    If there are more than BARS blocks, the BARS largest in magnitude are drawn, in the order of
    the model.
    """
    sharpest = np.argsort(-np.nan_to_num(np.abs(blocks.values.numpy())), kind="stable")
    drawn = np.sort(sharpest[:BARS])
    count = len(drawn)
    ax = figure(8.4, 1.6 + 0.24 * count).add_subplot() if ax is None else ax
    values, place = blocks.values.numpy()[drawn], np.arange(count)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.barh(place, values, xerr=blocks.residuals.numpy()[drawn], color=BAND, ecolor=INK)
    traces, errors = blocks.traces.numpy()[drawn], blocks.errors.numpy()[drawn]
    for y, value, trace, error in zip(place, values, traces, errors, strict=True):
        ax.annotate(
            f"{value:.3g}   trace {trace:.3g} ± {error:.2g}",
            (max(value, 0.0), float(y)),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    names = [shown(blocks.names[i], 50) for i in drawn]
    ax.set_yticks(place, names, fontsize=8, parse_math=False)  # a name may hold dollar signs
    ax.invert_yaxis()
    ax.margins(x=0.35, y=0.01)
    ax.set_xlabel("eigenvalue of largest magnitude")
    some = "" if count == len(blocks.names) else f"\n(the sharpest {count} of {len(blocks.names)})"
    ax.set_title(f"Diagonal blocks of the Hessian{some}")
    return tidy(ax)


def plot_estimate(estimate: Mean, ax: Axes | None = None) -> Axes:
    """Samples, their running mean, and the final value with its confidence interval."""
    ax = figure().add_subplot() if ax is None else ax
    samples: Array = estimate.samples.numpy()
    low, high = estimate.interval
    count = np.arange(1, len(samples) + 1)
    ax.axhspan(low, high, color=BAND, alpha=0.5, label=f"{estimate.confidence:.0%} interval")
    ax.axhline(estimate.value, color=ACCENT, linewidth=1, label=f"estimate {estimate.value:.4g}")
    ax.plot(count, samples, ".", color=GREY, alpha=0.6, markersize=5, label="samples")
    if len(samples):
        ax.plot(count, np.cumsum(samples) / count, color=INK, label="running mean")
    ax.set_xlabel("random vectors v used")
    ax.set_ylabel("trace of the Hessian")
    ax.set_title("Trace" if estimate.converged else "Trace (tolerance not reached)")
    ax.legend(fontsize=8, framealpha=0.9)
    return tidy(ax)


def plot_density(
    density: Curve, ax: Axes | None = None, *, eigenvalues: npt.ArrayLike = ()
) -> Axes:
    """Density of the eigenvalues on a logarithmic axis, with band, nodes and marked eigenvalues.

    Values that are not finite are not drawn.

    Args:
        density: what to draw.
        ax: where to draw it.
        eigenvalues: known eigenvalues, marked above the curve.
    """
    ax = figure().add_subplot() if ax is None else ax
    grid, values = density.grid.numpy(), finite(density.values.numpy())
    nodes, weights = density.nodes.numpy().ravel(), finite(density.weights.numpy().ravel())
    nodes, weights = nodes[weights > 0], weights[weights > 0]
    if not np.any(values > 0):
        ax.set_title("Spectral density: no finite value above 0")
        return tidy(ax)
    floor = density_floor(values, weights / len(density.nodes), density.sigma)
    lower, upper = (np.maximum(edge.numpy(), floor) for edge in (density.lower, density.upper))
    if np.any(upper > lower):
        ax.fill_between(grid, lower, upper, color=BAND, alpha=0.6, linewidth=0, label="band")
    ax.plot(grid, np.maximum(values, floor), color=INK, linewidth=1.4, label="density")
    ax.set_yscale("log")
    ax.set_ylim(floor, 4 * np.nanmax(values))
    ax.plot(
        nodes,
        np.full(nodes.shape, 0.03),
        "|",
        color=GREY,
        markersize=8,
        transform=ax.get_xaxis_transform(),
        label="quadrature nodes",
    )
    marks = np.atleast_1d(np.asarray(eigenvalues, dtype=float))
    if marks.size:
        ax.plot(
            marks,
            np.full(marks.shape, 0.96),
            "v",
            color=ACCENT,
            markersize=6,
            transform=ax.get_xaxis_transform(),
            label="computed eigenvalues",
        )
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("density (log scale)")
    ax.set_title("Spectral density")
    # below the axes: above, marks of eigenvalues stand from end to end
    ax.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return tidy(ax)


def finite(values: Array) -> Array:
    """The values, with NaN for those that are not finite."""
    return np.where(np.isfinite(values), values, np.nan)


def density_floor(values: Array, weights: Array, sigma: float) -> float:
    """Lowest density to show: below the peaks of single nodes, above the Gaussian tails."""
    peak = float(np.nanmax(values))
    if not len(weights) or not sigma > 0:  # sigma may be NaN, which stands for not finite
        return 1e-6 * peak
    single = float(np.quantile(weights, 0.03)) / (sigma * np.sqrt(2 * np.pi))
    return float(np.clip(0.3 * single, 1e-12 * peak, 1e-3 * peak))


def plot_landscape(landscape: Losses, ax: Axes | None = None) -> Axes:
    """The loss along one direction, or its contours over two; the lowest point is marked."""
    ax = figure(6.8, 5.2).add_subplot() if ax is None else ax
    x, y, losses = (t.numpy() for t in (landscape.alphas, landscape.betas, landscape.losses))
    losses = finite(losses)
    if np.isnan(losses).all():
        ax.set_title("Loss landscape: no finite loss, the span is too wide")
        return tidy(ax)
    at = np.unravel_index(int(np.nanargmin(losses)), losses.shape)
    lowest = f"lowest on the grid, {losses[at]:.4g}"
    if losses.ndim == 1:
        ax.plot(x, losses, color=INK, linewidth=1.6)
        ax.plot(x[at], losses[at], "*", color=ACCENT, markersize=14, label=lowest)
        if x[0] <= 0 <= x[-1]:
            ax.plot(0, np.interp(0, x, losses), "o", color=INK, markersize=4, label="the model")
        logarithmic = wide(losses)
        ax.set_yscale("log" if logarithmic else "linear")
        ax.set_ylabel("loss" + " (log scale)" * logarithmic)
    else:
        contours(ax, x, y, losses)
        path = landscape.trajectory.numpy()
        if path.size:
            ax.plot(*path, ".-", color="black", markersize=5, linewidth=0.9, label="trajectory")
        ax.plot(x[at[0]], y[at[1]], "*", color=ACCENT, markersize=14, label=lowest)
        if x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]:
            ax.plot(0, 0, "o", color="white", markeredgecolor="black", ms=5, label="the model")
        ax.set_ylabel("step along direction 2")
        width, height = np.ptp(x), np.ptp(y)
        if max(width, height) <= 2 * min(width, height):
            ax.set_aspect("equal")
        ax.locator_params(axis="x", nbins=5)  # an equal aspect makes the axis narrow
    ax.set_xlabel("step along direction 1")
    ax.set_title("Loss landscape")
    ax.legend(fontsize=8, framealpha=0.9, loc="best")
    return tidy(ax)


def wide(losses: Array) -> bool:
    """Whether losses, of which some may be NaN, are positive and span more than two decades."""
    low, high = np.nanmin(losses), np.nanmax(losses)
    return bool(low > 0 and high > 100 * low)


def contours(ax: Axes, x: Array, y: Array, losses: Array) -> None:
    """Filled contours with a colour bar; logarithmic if the loss spans more than two decades."""
    from matplotlib.colors import LogNorm

    shown = np.ma.masked_invalid(losses.T)
    low, high = float(shown.min()), float(shown.max())
    logarithmic = wide(losses)
    if logarithmic:
        levels, ticks = np.geomspace(low, high, 24), round_numbers(low, high)
    else:
        high = max(high, low + 1e-12 * max(1.0, abs(low)))  # a constant loss needs two levels too
        levels, ticks = np.linspace(low, high, 24), np.linspace(low, high, 6)
    norm = LogNorm(low, high) if logarithmic else None
    filled = ax.contourf(x, y, shown, levels, cmap="viridis", norm=norm)
    ax.contour(x, y, shown, levels[::3], colors="white", linewidths=0.5, alpha=0.5)
    bar = ax.figure.colorbar(filled, ax=ax, label="loss" + " (log scale)" * logarithmic)
    bar.minorticks_off()
    bar.set_ticks(list(ticks), labels=[f"{tick:.3g}" for tick in ticks])


def round_numbers(low: float, high: float) -> Array:
    """Numbers 1, 2, 5 times a power of ten inside the range; only powers if it is wide."""
    exponents = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    factors = np.array([1.0, 2.0, 5.0] if len(exponents) < 5 else [1.0])
    numbers = np.outer(10.0**exponents, factors).ravel()
    return np.asarray(numbers[(numbers >= low) & (numbers <= high)])


def tidy(ax: Axes) -> Axes:
    """Apply the style that all figures share."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.title.set_fontweight("bold")
    return ax
