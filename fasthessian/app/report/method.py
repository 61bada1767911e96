"""How each part of a result was computed, in words."""

from __future__ import annotations

from fasthessian.app.analysis import BLOCK_SAMPLES
from fasthessian.app.options import MATRICES, AnalysisOptions
from fasthessian.app.report.result import Result
from fasthessian.app.report.summary import Rows, number, steps

BASES = {
    "compressed": "float16 rows; eigenpairs refined, and their residuals measured, by products",
    "offload": "rows in host memory",
}


def products(options: AnalysisOptions) -> str:
    """How products were made."""
    if options.engine == "difference":
        words = "by central differences of gradients"
    elif options.engine == "forward":
        words = "exact, in forward mode over reverse mode"
    else:
        words = "exact, " + MATRICES[options.matrix].products
    return words.replace("exact, ", f"in {options.precision}, ") if options.precision else words


def method(result: Result) -> Rows:
    """The rows (part, how it was computed)."""
    found, options = result.analysis, result.options
    engine = result.environment["engine"]
    rows = [
        ("matrix", f"{MATRICES[options.matrix].name} of the loss"),
        ("products", f"{products(options)}; engine: {engine}"),
    ]
    if options.params is not None:
        rows.append(("parameters", f"those whose name matches {options.params}"))
    if options.weight_decay:
        rows.append(("weight decay", f"{options.weight_decay:g} times the identity is added"))
    if options.basis in BASES:
        rows.append(("Krylov basis", BASES[options.basis]))
    pairs = found.top is not None or found.bottom is not None
    if pairs:
        rows.append(("eigenvalues", "Lanczos with full orthogonalisation, stopped on residuals"))
    if words := steps(result):
        rows.append(("Lanczos steps", words))
    if found.trace is not None:
        count = len(found.trace.samples)
        words = (
            ("the eigenvalues as above, the rest by " if pairs else "")
            + f"random vectors of signs ({count}), until the "
            f"half-width of the interval was {options.trace_rtol:.2g} of the value"
        )
        rows.append(("trace", words if count > 1 else "exact to rounding, without random vectors"))
    if found.density is not None:
        rows.append(
            (
                "density",
                f"stochastic Lanczos quadrature, random vectors: {options.probes}, steps: "
                f"{found.density.nodes.shape[1]}, Gaussian kernel of width "
                f"{number(found.density.sigma, 3)}",
            )
        )
    if found.landscape is not None:
        span = float(found.landscape.alphas[-1])
        rows.append(
            (
                "landscape",
                f"{options.points} points per direction over ±{number(span)} along the top "
                "eigenvectors (unit length)",
            )
        )
    if found.blocks is not None:
        rows.append(
            (
                "blocks",
                f"by {options.blocks}, all together; eigenvalues and traces as above, traces with "
                f"{BLOCK_SAMPLES} products at most",
            )
        )
    return rows
