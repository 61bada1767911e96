"""``report.html``: one page without links to anything outside it, and its summary table."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from fasthessian.results.plots import shown

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2430; background: #f4f6f9; margin: 0; }
main { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { background: #fff; border: 1px solid #dde3ec; border-radius: 8px; padding: 1rem 1.5rem;
  margin: 1rem 0; }
h1 { margin-bottom: 0; } h2 { margin-top: .2rem; color: #1f3b63; }
.about { color: #566274; margin-top: .3rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #e8ecf2;
  vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; white-space: pre-line; }
img { max-width: 100%; display: block; margin: .5rem auto; }
.note { border-left: 4px solid #c8442c; background: #fdf3f0; padding: .4rem .8rem; }
"""

# Two sentences a picture, for a reader who meets Hessian spectra for the first time.
EXPLAINED = {
    "eigenvalues.png": (
        "Eigenvalues",
        "Each eigenvalue is the curvature of the loss along one direction in parameter space: the "
        "largest are the steepest walls of the valley the model sits in, and a negative one is a "
        "direction in which the loss still falls away. The residual beside each value bounds how "
        "far it can be from a true eigenvalue.",
    ),
    "trace.png": (
        "Trace",
        "The trace is the sum of all eigenvalues, so it says how curved the loss is over all "
        "directions together; it is estimated from products with random vectors. Each dot is one "
        "random vector, the line is their mean so far, and the shaded band is the confidence "
        "interval at the end.",
    ),
    "density.png": (
        "Spectral density",
        "The height of the curve is the share of eigenvalues found near each value, on a "
        "logarithmic scale: usually most directions are nearly flat and pile up at zero, and a "
        "few stand out to the right. Triangles mark the eigenvalues computed one by one above; "
        "the ticks at the bottom are the quadrature nodes that the curve is built from.",
    ),
    "landscape.png": (
        "Loss landscape",
        "The loss as the model is moved along its sharpest directions, all other directions held "
        "fixed; the circle is the model itself and the star the lowest point seen. Narrow, "
        "closely packed contours mean steep walls, and a star away from the circle means that "
        "this slice has a lower loss nearby than the model reached.",
    ),
    "blocks.png": (
        "Blocks",
        "The same for parts of the model alone: each bar is the sharpest curvature that the loss "
        "has in the parameters of one part while all others stay fixed, and the trace beside it "
        "is the curvature summed over all of them, with its confidence interval.",
    ),
}


def number(value: float | None, digits: int = 5) -> str:
    """A number for people; an unknown one is a dash."""
    return "-" if value is None else f"{value:.{digits}g}"


LISTED = 8  # blocks in the summary, the sharpest first


def summary(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows (what, value) of the summary table, for the page and for the terminal."""
    problem = content["problem"]
    rows = [("model", f"{problem['name']}, {problem['parameters']:,} parameters")]
    if "test" in problem:
        rows.append(
            (
                "training",
                f"{problem['data']}, epochs: {len(problem['epochs'])}, test accuracy: "
                f"{problem['test']['accuracy']:.1%}",
            )
        )
    if "samples" in problem:
        rows.append(("loss is over", f"{problem['samples']:,} training images"))
    rows.append(
        ("loss", f"{number(content['loss'])}, gradient norm {number(content['gradient_norm'], 3)}")
    )
    check = content.get("check")
    if check is not None:
        verdict = "passed" if check["ok"] else "FAILED"
        rows.append(("self-checks", f"{verdict}\n{check['report']}"))
    for end, symbol in (("top", "largest λ"), ("bottom", "smallest λ")):
        part = content[end]
        if part is None:
            continue
        flag = "" if part["converged"] else "  (not converged)"
        for rank, (value, residual) in enumerate(
            zip(part["values"], part["residuals"], strict=True), 1
        ):
            rows.append(
                (f"{symbol} {rank}", f"{number(value)}  ± {number(residual, 2)} residual{flag}")
            )
    trace = content["trace"]
    if trace is not None:
        low, high = trace["interval"]
        flag = "" if trace["converged"] else "  (tolerance not reached)"
        rows.append(
            (
                "trace",
                f"{number(trace['value'])}  [{number(low)}, {number(high)}] at "
                f"{trace['confidence']:.0%}{flag}",
            )
        )
    density = content["density"]
    if density is not None:
        low = min(row[0] for row in density["nodes"])
        high = max(row[-1] for row in density["nodes"])
        rows.append(("density", f"eigenvalues from {number(low)} to {number(high)}"))
    landscape = content["landscape"]
    if landscape is not None:
        flat = [x for row in landscape["losses"] for x in (row if isinstance(row, list) else [row])]
        known = [x for x in flat if x is not None]
        span = f"loss from {number(min(known))} to {number(max(known))}" if known else "no finite"
        rows.append(("landscape", span))
    blocks = content.get("blocks")
    if blocks is not None:
        order = sorted(range(len(blocks["names"])), key=lambda i: -abs(blocks["values"][i] or 0))
        lines = [
            f"{shown(blocks['names'][i])}: λ {number(blocks['values'][i])}, trace "
            f"{number(blocks['traces'][i])} ± {number(blocks['errors'][i], 2)}"
            for i in order[:LISTED]
        ]
        more = len(order) - LISTED
        rows.append(("blocks", "\n".join(lines + ([f"and {more} more"] if more > 0 else []))))
    rows.append(
        (
            "products",
            f"{content['matvecs']:,} {matrix(content).removesuffix(' matrix')}-vector products",
        )
    )
    rows.append(("time", f"{content['timing']['total']:.1f} s"))
    return rows


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns of escaped text."""
    cells = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


KEPT = {
    "compressed": "float16 rows; eigenpairs refined, and their residuals measured, by products",
    "offload": "rows in host memory",
}


def steps(content: Mapping[str, Any]) -> str:
    """Whether Lanczos steps were captured as CUDA graphs, or why not; empty if none is known."""
    known = {(content[part] or {}).get("graph") for part in ("top", "bottom", "density")}
    return "; ".join(sorted(filter(None, known)))


MATRICES = {
    "hessian": ("Hessian", "by double backward"),
    "ggn": ("Gauss-Newton matrix", "as J' M J with the Jacobian J of the outputs"),
    "fisher": ("Fisher matrix", "as J' M J, M from targets drawn from the model's predictions"),
}


def matrix(content: Mapping[str, Any]) -> str:
    """The name of the matrix; documents of before there was a choice are of the Hessian."""
    settings = content.get("settings")
    key = settings.get("matrix", "hessian") if isinstance(settings, Mapping) else "hessian"
    return MATRICES.get(str(key), MATRICES["hessian"])[0]


def title_of(content: Mapping[str, Any]) -> str:
    """What the report is about."""
    name = matrix(content)
    return "Hessian spectrum" if name == "Hessian" else f"{name.removesuffix(' matrix')} spectrum"


def products(settings: Mapping[str, Any]) -> str:
    """How products were made."""
    engine = settings.get("engine", "auto")
    words = "exact, " + MATRICES[settings.get("matrix", "hessian")][1]
    if engine == "difference":
        words = "by central differences of gradients"
    elif engine == "forward":
        words = "exact, in forward mode over reverse mode"
    if settings.get("precision"):
        words = words.replace("exact, ", f"in {settings['precision']}, ")
    return words


def how(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows that say how each part was computed."""
    settings = content["settings"]
    used = content["environment"]["engine"]
    rows = [
        ("matrix", f"{matrix(content)} of the loss"),
        ("products", f"{products(settings)}; engine: {used}"),
    ]
    if settings.get("params") is not None:
        rows.append(("parameters", f"those whose name matches {settings['params']}"))
    if settings.get("weight_decay"):
        rows.append(("weight decay", f"{settings['weight_decay']:g} times the identity is added"))
    if settings.get("basis", "full") != "full":
        rows.append(("Krylov basis", KEPT[settings["basis"]]))
    if content["top"] or content["bottom"]:
        rows.append(("eigenvalues", "Lanczos with full orthogonalisation, stopped on residuals"))
    if words := steps(content):
        rows.append(("Lanczos steps", words))
    if content["trace"]:
        count = len(content["trace"]["samples"])
        words = (
            ("the top eigenvalues as above, the rest by " if content["top"] else "")
            + f"random vectors of signs ({count}), until the "
            f"half-width of the interval was {settings['trace_rtol']:.2g} of the value"
        )
        rows.append(("trace", words if count > 1 else "exact to rounding, without random vectors"))
    if content["density"]:
        rows.append(
            (
                "density",
                f"stochastic Lanczos quadrature, random vectors: {settings['probes']}, steps: "
                f"{len(content['density']['nodes'][0])}, Gaussian kernel of width "
                f"{number(content['density']['sigma'], 3)}",
            )
        )
    if content["landscape"]:
        rows.append(
            (
                "landscape",
                f"{settings['points']} points a direction over "
                f"±{number(content['landscape']['alphas'][-1])} along the top eigenvectors "
                "(unit length)",
            )
        )
    if content.get("blocks"):
        rows.append(
            (
                "blocks",
                f"by {settings['blocks']}, all advanced together; eigenvalues and traces as above, "
                "traces with 64 products at most",
            )
        )
    return rows


def html(content: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """The whole page; ``figures`` are PNG bytes by file name."""
    problem = content["problem"]
    parts = [
        f"<h1>{title_of(content)} of {escape(problem['name'])}</h1>",
        f"<p class='about'>{escape(str(problem.get('about', '')))}</p>",
        "<section><h2>Summary</h2>",
        *(f"<p class='note'>{escape(note)}</p>" for note in content["notes"]),
        table(summary(content)),
        "</section>",
    ]
    for name, (title, text) in EXPLAINED.items():
        if name in figures:
            data = base64.b64encode(figures[name]).decode()
            parts.append(
                f"<section><h2>{title}</h2><p>{text}</p>"
                f"<img alt='{title}' src='data:image/png;base64,{data}'></section>"
            )
    settings = [
        (name.replace("_", " "), "automatic" if value is None else str(value))
        for name, value in content["settings"].items()
        if name == "span" or value is not None
    ]
    timing = [(name, f"{seconds:.1f} s") for name, seconds in content["timing"].items()]
    environment = [(name, str(v)) for name, v in content["environment"].items() if name != "engine"]
    for title, rows in (
        ("How it was computed", how(content)),
        ("Settings", settings),
        ("Versions and machine", environment),
        ("Time", timing),
    ):
        parts.append(f"<section><h2>{title}</h2>{table(rows)}</section>")
    body = "\n".join(parts)
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title_of(content)} of {escape(problem['name'])}</title>"
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
