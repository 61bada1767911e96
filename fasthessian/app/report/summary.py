"""The words and rows of a result that both the report and the terminal show."""

from __future__ import annotations

import math

from torch import Tensor

from fasthessian.app.options import MATRICES
from fasthessian.app.report.result import Result
from fasthessian.results.plots import shown
from fasthessian.results.records import BlockSpectra, Eigenpairs

LISTED = 8  # blocks in the summary, the sharpest first

Rows = list[tuple[str, str]]


def number(value: float, digits: int = 5) -> str:
    """A number for people; a dash stands for an unknown one."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "-"


def kind(result: Result) -> str:
    """The kind of matrix: Hessian, Gauss-Newton or Fisher."""
    return MATRICES[result.options.matrix].name.removesuffix(" matrix")


def title(result: Result) -> str:
    """What the report is about."""
    return f"{kind(result)} spectrum"


def steps(result: Result) -> str:
    """Whether Lanczos steps were captured as CUDA graphs, or why not; empty if unknown."""
    found = result.analysis
    known = {part.graph for part in (found.top, found.bottom, found.density) if part is not None}
    return "; ".join(sorted(filter(None, known)))


def summary(result: Result) -> Rows:
    """The rows (what, value) of the summary table."""
    found, info = result.analysis, result.info
    rows = [("model", f"{result.name}, {found.parameters:,} parameters")]
    if "test" in info:
        rows.append(
            (
                "training",
                f"{info['data']}, epochs: {len(info['epochs'])}, test accuracy: "
                f"{info['test']['accuracy']:.1%}",
            )
        )
    if "samples" in info:
        rows.append(("loss is over", f"{info['samples']:,} training images"))
    rows.append(("loss", f"{number(found.loss)}, gradient norm {number(found.gradient_norm, 3)}"))
    if found.check is not None:
        verdict = "passed" if found.check.ok else "FAILED"
        rows.append(("self-checks", f"{verdict}\n{found.check.report}"))
    if found.top is not None:
        rows += eigenvalues("largest λ", found.top)
    if found.bottom is not None:
        rows += eigenvalues("smallest λ", found.bottom)
    if found.trace is not None:
        low, high = found.trace.interval
        flag = "" if found.trace.converged else "  (tolerance not reached)"
        rows.append(
            (
                "trace",
                f"{number(found.trace.value)}  [{number(low)}, {number(high)}] at "
                f"{found.trace.confidence:.0%}{flag}",
            )
        )
    if found.density is not None:
        nodes = found.density.nodes
        low, high = float(nodes[:, 0].min()), float(nodes[:, -1].max())
        rows.append(("density", f"eigenvalues from {number(low)} to {number(high)}"))
    if found.landscape is not None:
        rows.append(("landscape", loss_range(found.landscape.losses)))
    if found.blocks is not None:
        rows.append(("blocks", "\n".join(block_lines(found.blocks))))
    rows.append(("products", f"{found.matvecs:,} {kind(result)}-vector products"))
    rows.append(("time", f"{result.timing['total']:.1f} s"))
    return rows


def eigenvalues(symbol: str, pairs: Eigenpairs) -> Rows:
    """One row per eigenvalue of one end of the spectrum."""
    flag = "" if pairs.converged else "  (not converged)"
    values = zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
    return [
        (f"{symbol} {rank}", f"{number(value)}  ± {number(residual, 2)} residual{flag}")
        for rank, (value, residual) in enumerate(values, 1)
    ]


def loss_range(losses: Tensor) -> str:
    """The smallest and the largest finite loss."""
    known = losses[losses.isfinite()]
    if not len(known):
        return "no finite loss"
    return f"loss from {number(float(known.min()))} to {number(float(known.max()))}"


def block_lines(blocks: BlockSpectra) -> list[str]:
    """One line for each of the sharpest blocks, and how many more there are."""
    order = (-blocks.values.abs().nan_to_num()).argsort(stable=True).tolist()
    lines = [
        f"{shown(blocks.names[i])}: λ {number(float(blocks.values[i]))}, trace "
        f"{number(float(blocks.traces[i]))} ± {number(float(blocks.errors[i]), 2)}"
        for i in order[:LISTED]
    ]
    more = len(order) - LISTED
    return lines + ([f"and {more} more"] if more > 0 else [])
