"""Write the tables of README.md and bench/README.md: ``python -m bench.harness.table``.

Every number comes from the JSON files of bench/results/. The tables describe the newest run that
has all rows; a test compares them with the files.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PEERS = "PyHessian", "hessian-eigenthings", "curvlinops"
COMPILED = "curvlinops compiled by us"
ENGINES = "retained", "recompute", "forward", "difference"
PROBLEMS = {
    "ResNet-20": "ResNet-20, batch 64",
    "ResNet-56": "ResNet-56, batch 32",
    "MLP": "MLP, batch 256",
    "GPT": "GPT, 4 x 256 tokens",
}
MATH = ", math attention"
LAYERS = "ResNet-20 without normalisation, 22 layers: joint products over the whole product"
CURVATURE = "softmax curvature, 2,048 x 50,000:"
MEMORY = "softmax curvature: growth of peak memory over the logits,"
ANALYSIS = "top 5, trace, density of 60 steps:"
MATH_NOTE = "¹ With math attention: with fused attention, the default of torch, these fail."
# eigsh and spectrum search for missing eigenvalues since then, and make more products
SEARCH = "2026-11-28T18:16:22"


@dataclass
class Run:
    """One file of results: its rows by name, and the machine in words."""

    name: str
    date: str
    machine: str
    rows: dict

    def __getitem__(self, what):
        """The value of a row."""
        return self.rows[what]["value"]


def runs():
    """All runs on a CPU, oldest first."""
    found = []
    for path in sorted(RESULTS.glob("cpu-*.json")):
        report = json.loads(path.read_text())
        rows = {row["what"]: row for row in report["rows"]}
        machine = f"{report['processor']}, torch {report['torch']}"
        found.append(Run(path.name, report["date"], machine, rows))
    return found


def newest(found):
    """The newest run that has every row of the tables."""
    needed = {what for what, *_ in MEASURED} | set(STREAMS)
    needed |= {f"gradient: {problem}" for problem in PROBLEMS}

    def whole(run):
        names = {re.sub(r", n = .*", "", what) for what in run.rows}
        return needed <= names

    return [run for run in found if whole(run)][-1]


def number(value):
    """Three digits, whole numbers as they are."""
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}"


def markdown(head, lines):
    """A table of Markdown; the first column is text."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def version(run, peer):
    """The name and version of a library."""
    rows = [row for what, row in run.rows.items() if what.endswith(f", {peer}")]
    return f"{peer} {next(row['version'] for row in rows if 'version' in row)}"


def product(run, problem, name):
    """(value in gradients, the cell's text); where fused attention fails, that of math attention.

    The value is None if there is none or the product is wrong.
    """
    what = f"product over gradient: {problem}, {name}"
    own, other = (run.rows.get(key) for key in (what, what + MATH))
    if own is None and other is None:
        return None, ""
    mark = "" if other is None else " ¹"
    row = own if other is None else other
    if row["value"] is None:
        off = re.search(r"off by (\S+) of .* in float64, (\S+) in float32", row["note"])
        return None, f"wrong by {number(max(map(float, off.groups())))}{mark}" if off else "fails"
    return row["value"], number(row["value"]) + mark


def peers_table(run):
    """The table of the README: at most twelve rows, every number lower is better."""
    old = " ²" if run.date < SEARCH else ""
    lines = []

    def add(what, *cells):
        cells = [cell if isinstance(cell, tuple) else (cell, number(cell)) for cell in cells]
        best = min(value for value, _ in cells if value is not None)
        lines.append([what, *(f"**{text}**" if value == best else text for value, text in cells)])

    for problem, words in PROBLEMS.items():
        cells = [product(run, problem, name) for name in ("ours retained", *PEERS)]
        add(f"Hessian-vector product, {words}: time in gradients", *cells, None)
    blocks = run[LAYERS]
    add("one product with each of the 22 layer blocks of a ResNet-20: time, relative to one "
        "product with the full Hessian",
        blocks, None, None, blocks * run["the same: curvlinops' block diagonal over jointly"],
        None)  # fmt: skip
    add("spectral density of a ResNet-20, 100 steps: time relative to ours",
        1, run["ESD, 100 steps, against PyHessian"], None, None, None)  # fmt: skip
    add(f"top 10 eigenvalues of a ResNet-20 to 1e-3: products{old}",
        run["top 10 eigenvalues: our products"],
        run["top 10 eigenvalues: PyHessian's products"], None, None, None)  # fmt: skip
    add("the same eigenvalues: largest relative error",
        run["our largest relative error"],
        run["PyHessian's largest relative error at its tol 1e-3"], None, None, None)  # fmt: skip
    add(f"top 5 eigenvalues, trace and density of a ResNet-20: time relative to ours{old}",
        1, run[f"{ANALYSIS} PyHessian's time over ours"], None, None, None)  # fmt: skip
    add("curvature of cross-entropy, 2,048 tokens x 50,000 classes: time relative to ours",
        1, None, *(run[f"{CURVATURE} {name} over ours"] for name in
                   (*PEERS[1:], "formula in torch")))  # fmt: skip
    add("the same curvature: extra memory, in tensors of the size of the logits",
        run[f"{MEMORY} ours"], None, *(run[f"{MEMORY} {name}"] for name in
                                       (*PEERS[1:], "formula in torch")))  # fmt: skip
    add("orthogonalising a vector against 40 of 11 million floats: time relative to ours",
        1, None, None, None, run["DCGS2 against four-GEMV CGS2 (torch)"])  # fmt: skip
    head = [
        "lower is better",
        "fasthessian",
        *(version(run, peer) for peer in PEERS),
        "plain torch",
    ]
    note = (
        f"\n\nMeasured by `make bench` on {run.date[:10]} ({run.machine}; "
        f"[result file](bench/results/{run.name})). Bold is the lowest; an empty cell means that "
        f"it was not measured. {MATH_NOTE}"
    )
    if old:
        products = run["top 10 eigenvalues: our products"]
        note += (
            f" ² This run is older than the search for missing eigenvalues. With it, the top ten "
            f"take 48 to 61 products instead of {products}, and `spectrum` takes more too."
        )
    return markdown(head, lines) + note


def products_table(run):
    """Every engine and library: time in gradients, and a library's time over ours."""
    lines: list[list[str]] = []
    for engine in ENGINES:
        cells = [product(run, problem, f"ours {engine}")[1] for problem in PROBLEMS]
        lines.append([f'ours, `engine="{engine}"`', *cells])
    for peer in (*PEERS, COMPILED):
        cells = []
        for problem in PROBLEMS:
            value, text = product(run, problem, peer)
            ours = product(run, problem, "ours retained")[0]
            cells.append(text if value is None else f"{text} ({value / ours:.2f}x)")
        lines.append([version(run, peer), *cells])
    table = markdown(["time in gradients (lower is better)", *PROBLEMS.values()], lines)
    return f"{table}\n\n{MATH_NOTE}"


# (row of the results, what it says, whether lower is better)
MEASURED = [
    ("ESD, 100 steps, against PyHessian",
     "spectral density of a ResNet-20, batch 64, 100 steps: PyHessian's time over ours", False),
    ("share of our ESD outside the products",
     "share of the time of that density that is not spent in products", True),
    ("top 10 eigenvalues: our products",
     "top 10 eigenvalues of a ResNet-20 to 1e-3: our products", True),
    ("top 10 eigenvalues: PyHessian's products",
     "the same: PyHessian's products; it draws its own starting vectors", True),
    ("PyHessian's products over ours", "the same: PyHessian's products over ours", False),
    ("PyHessian's time over ours", "the same: PyHessian's time over ours", False),
    ("our largest relative error", "the same: our largest relative error", True),
    ("PyHessian's largest relative error at its tol 1e-3",
     "the same: PyHessian's largest relative error", True),
    (f"{ANALYSIS} our products, 2 bottom eigenvalues too",
     "`make demo`: top 5 and bottom 2 eigenvalues, trace, density of 60 steps: products of "
     "`spectrum`", True),
    ("the same by four calls", "the same by `eigsh` twice, `trace` and `density`: products", True),
    (f"{ANALYSIS} PyHessian's products",
     "the same without bottom eigenvalues: products of PyHessian's three calls on one batch", True),
    (f"{ANALYSIS} PyHessian's time over ours",
     "the same: time of those calls over that of `spectrum`", False),
    ("half-width of our trace's interval over its value",
     "the same: half-width of our interval of the trace, relative to the trace (asked: 5 %)", True),
    (LAYERS,
     "22 layer blocks of a ResNet-20 without BatchNorm: time of one product with each, relative "
     "to one product with the full Hessian", True),
    ("the same: layer by layer over jointly",
     "the same: time of one layer after the other over that of all together", False),
    ("the same: curvlinops' block diagonal over jointly",
     "the same: time of curvlinops' block diagonal over ours", False),
    ("ESD, 20 steps: 22 layers over the whole matrix",
     "densities of the 22 blocks, 20 steps: time relative to the density of the full Hessian",
     True),
    (f"{CURVATURE} ours",
     "curvature of cross-entropy, 2,048 tokens x 50,000 classes: our milliseconds", True),
    (f"{CURVATURE} formula in torch over ours", "the same: the formula in torch, time over ours",
     False),
    (f"{CURVATURE} double backward over ours", "the same: double backward, time over ours", False),
    (f"{CURVATURE} hessian-eigenthings over ours",
     "the same: hessian-eigenthings, time over ours", False),
    (f"{CURVATURE} curvlinops over ours", "the same: curvlinops, time over ours", False),
    (f"{CURVATURE} ours over reading z and u and writing u",
     "the same: our time over that of reading two such tensors and writing one", True),
    *((f"{MEMORY} {name}",
       f"the same: growth of peak memory in tensors of the logits' size, {name}", True)
      for name in ("ours", "formula in torch", "double backward", "hessian-eigenthings",
                   "curvlinops")),
    ("DCGS2 against four-GEMV CGS2 (torch)",
     "orthogonalising against 40 vectors of 11 million floats: CGS2 by four GEMVs in torch, time "
     "over our DCGS2", False),
    ("CGS2 against four-GEMV CGS2 (torch)", "the same: time over our CGS2", False),
    ("DCGS2 on a float16 basis against four-GEMV CGS2 (float32)",
     "the same: time over our DCGS2 with a float16 basis", False),
    ("DCGS2 against one pass of per-vector loop",
     "the same: one pass of a loop over single vectors, time over our DCGS2", False),
    ("the same where the loop's temporaries reuse pages",
     "the same where the loop's temporaries reuse mapped pages", False),
    ("ESD, 100 steps, 20,313,810 parameters: peak RSS, float32 basis",
     "density of 100 steps, 20 million parameters: peak memory in GiB, float32 basis", True),
    ("ESD, 100 steps, 20,313,810 parameters: peak RSS, float16 basis",
     "the same, float16 basis", True),
    ("the same: growth of RSS during the run, float32 over float16",
     "the same: growth of memory during the run, float32 over float16", False),
    ("the same: time, float32 over float16", "the same: time, float32 over float16", False),
    ("import fasthessian after import torch",
     "`import fasthessian` after `import torch`: milliseconds", True),
]  # fmt: skip


SEARCHED = {  # rows that depend on how many products eigsh and spectrum make
    "top 10 eigenvalues: our products", "PyHessian's products over ours",
    "PyHessian's time over ours", f"{ANALYSIS} our products, 2 bottom eigenvalues too",
    "the same by four calls", f"{ANALYSIS} PyHessian's time over ours",
}  # fmt: skip


def measured_table(run, others):
    """Every other row of a run, and its range over the other runs."""
    lines = []
    for what, words, lower in MEASURED:
        values = [other[what] for other in others if what in other.rows]
        span = " to ".join(dict.fromkeys(number(f(values)) for f in (min, max))) if values else ""
        goal = (run.rows[what]["target"] or "").replace("<=", "≤").replace(">=", "≥")
        old = " ²" if run.date < SEARCH and what in SEARCHED else ""
        better = "lower" if lower else "higher"
        lines.append([words + old, better, number(run[what]), goal, span])
    return markdown(["what", "better", "this run", "goal", "other runs"], lines)


STREAMS = {
    f"{stream} of a {basis} basis over a plain read": f"{short}, {basis}"
    for basis in ("float32", "float16")
    for stream, short in (
        ("project stream (2 rows of W)", "project"),
        ("update stream (2 rows of W)", "update"),
        ("corrected projection (1 row of W)", "corrected projection"),
    )
}


def streams_table(found):
    """The speed of our streams relative to a plain read of memory, one line per run."""
    lines = []
    for run in found:
        if set(STREAMS) <= set(run.rows):
            speed = number(run["plain read of a float32 basis"])
            cells = [number(run[what]) for what in STREAMS]
            lines.append([f"[{run.name[4:-5]}](results/{run.name})", speed, *cells])
    return markdown(["run", "plain read, GB/s", *STREAMS.values()], lines)


def placed(text, name, table):
    """The text with the table between the comments of this name."""
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    assert len(re.findall(pattern, text, re.DOTALL)) == 1, f"no place for the table {name!r}"
    return re.sub(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)


def texts():
    """{path: text with its tables} of the two files."""
    found = runs()
    run = newest(found)
    others = [other for other in found if other is not run]
    source = (
        f"The newest full run is [{run.name}](results/{run.name}) of {run.date[:10]}, on a machine "
        f"with {run.machine}."
    )
    front, long = ROOT / "README.md", ROOT / "bench" / "README.md"
    tables = {
        "products": products_table(run),
        "measured": measured_table(run, others),
        "streams": streams_table(found),
        "source": source,
    }
    text = long.read_text()
    for name, table in tables.items():
        text = placed(text, name, table)
    return {front: placed(front.read_text(), "peers", peers_table(run)), long: text}


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text)
