"""``make gpu``: build, test and measure on a machine with an NVIDIA GPU, and print one table.

It works in a copy of the tree and needs no network. Each part is a process with a time limit and a
log. A part that fails or exceeds its limit is reported, and the others still run. Results are
written to bench/results/gpu-<date>.json and, with the log, to the folder $OUT if it is set.

Without a GPU this is a rehearsal: the same programs on the CPU at small sizes, without results.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 530  # for all parts together
ABSENT = 77  # exit status of a part that cannot run here
TAIL = 1200  # characters of a failed part's log that are printed
LEFT_OUT = ("build", "dist", "*.egg-info", "report", "report-*", ".*")  # at the top of the tree
SMALL = {  # the part of a test command that a rehearsal runs
    "kernels": ["-k", "append or rows_beyond or second_derivative"],
    "suite": ["tests/house/test_layers.py", "tests/results/test_records.py"],
}


@dataclass
class Part:
    """A command with a limit in seconds; time is reserved for a part that ``must`` run."""

    name: str
    command: list
    limit: float
    env: dict = field(default_factory=dict)
    must: bool = False


@dataclass
class Outcome:
    """How a part ended: "ok", "FAILED", "OVER TIME", "NO TIME" or "not here"."""

    name: str
    state: str
    seconds: float = 0.0
    log: str = ""

    @property
    def bad(self):
        """Whether the exit status of the whole run is an error."""
        return self.state in ("FAILED", "OVER TIME", "NO TIME")


def carry_out(part, limit, folder):
    """Run one part; at its limit it is killed with all its child processes."""
    log, start, state = folder / f"{part.name.replace(' ', '-')}.log", time.monotonic(), "ok"
    if limit < min(5, part.limit):
        return Outcome(part.name, "NO TIME")
    with log.open("wb") as out:
        process = subprocess.Popen(
            part.command, cwd=folder, env={**os.environ, **part.env}, stdin=subprocess.DEVNULL,
            stdout=out, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            state = {0: "ok", ABSENT: "not here"}.get(status, "FAILED")
        except subprocess.TimeoutExpired:
            state = "OVER TIME"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace")
    return Outcome(part.name, state, time.monotonic() - start, text)


def carry_out_all(parts, folder, seconds, words=""):
    """Run the parts in turn; print how each ended, and the end of the log if it failed."""
    outcomes, end = [], time.monotonic() + seconds
    if os.environ.get("OUT"):
        Path(os.environ["OUT"]).mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        kept = sum(later.limit for later in parts[i + 1 :] if later.must)
        limit = min(part.limit, end - time.monotonic() - kept * (not part.must))
        outcome = carry_out(part, limit, folder)
        outcomes.append(outcome)
        print(f"{part.name}: {outcome.state}, {outcome.seconds:.0f} s{words}", flush=True)
        if outcome.bad or outcome.state == "not here":
            print(outcome.log[-TAIL:].strip(), flush=True)
        if os.environ.get("OUT"):
            with (Path(os.environ["OUT"]) / "gpu.log").open("a") as whole:
                whole.write(f"\n===== {part.name}: {outcome.state}\n{outcome.log[-1_000_000:]}")
    return outcomes


def parts_of(folder, facts, without):
    """The parts in order: measurements follow as soon as the kernels have passed their tests."""
    python, gpu = sys.executable, facts["gpu"]
    arch = facts.get("capability", "90")
    base = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    many = importlib.util.find_spec("xdist") is not None

    def tests(name, limit, files, workers, env=(), small=()):
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        command += ["-n", str(workers)] if many else []
        return Part(name, command + ([] if gpu else [*small]), limit, {**base, **dict(env)})

    def rows(names):
        kept = {"native-cuda": "native", "reference-cuda": "reference"}  # in a rehearsal
        chosen = names if gpu else [kept[name] for name in names if name in kept] or ["reference"]
        return {"FASTHESSIAN_TEST_ROWS": ",".join(chosen)}

    def bench(name, limit, small, must=True):
        options = [] if gpu else ["--device", "cpu", *small.split()]
        command = [python, "-m", f"bench.gpu.{name}", "--json", f"{name}.json", *options]
        return Part(name, command, limit, base, must=must)

    build = {"FASTHESSIAN_CUDA": "1", "FASTHESSIAN_CUDA_ARCHS": arch}
    contract = (
        "test_kernels.py", "test_kernel_arguments.py", "test_vector_kernels.py",
        "test_softmax_curvature.py",
    )  # fmt: skip
    apart = (*contract, "test_cuda.py", "test_gpu_rehearsal.py")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    others = [str(p.relative_to(ROOT)) for p in files if p.name not in apart]
    kernels = [f"tests/kernels/{name}" for name in contract]
    doctor = [python, "-c", "import fasthessian; print(fasthessian.doctor())"]
    sanitize = [python, "-m", "bench.gpu.sanitize", "--arch", arch]
    if not gpu:
        sanitize += ["--rehearse", "--row", "reference"]
    parts = [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 200, {**base, **build}),
        Part("doctor", doctor, 40, base),
        tests("conformance", 80, kernels, 8, rows(["native-cuda", "reference-cuda"]),
              SMALL["kernels"]),
        bench("streams", 110, "--n 3000 --repeats 2"),
        bench("lanczos", 130, "--n 2000 --net 8 2 8 --steps 8 --repeats 1 --width 30"),
        bench("ranks", 60, "--width 40 --samples 16 --steps 1 --repeats 1 --ranks 1",
              must=False),
        tests("on the gpu", 120, ["tests/kernels/test_cuda.py"], 4),
        tests("conformance triton", 120, kernels, 8, rows(["triton-cuda"]), SMALL["kernels"]),
        Part("sanitizer", sanitize, 150, base),
        tests("suite", 200, others if gpu else SMALL["suite"], "auto"),
    ]  # fmt: skip
    return [part for part in parts if part.name not in without]


def copy_tree(source, target, *more):
    """Copy a tree without LEFT_OUT at its top and without ``more`` patterns anywhere."""
    at_top = shutil.ignore_patterns(*LEFT_OUT)
    anywhere = shutil.ignore_patterns("__pycache__", *more)

    def ignored(folder, names):
        found = anywhere(folder, names)
        return found | at_top(folder, names) if Path(folder) == source else found

    shutil.copytree(source, target, ignore=ignored)


def table(rows):
    """Lines of text: streams with one column per backend, other rows as they are."""
    streams, lines = {}, []
    for row in rows:
        if "of_copy" in row:
            cell = f"{row['backend']} {row['ms']:.3f} ms {row['of_copy']:.0%}"
            streams.setdefault(row["what"], []).append(cell)
            continue
        numbers = ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "what")
        lines.append(f"{row['what']}: {numbers}")
    return [f"{what:<36} {'  '.join(cells)}" for what, cells in streams.items()] + lines


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts")
    parser.add_argument("--without", default="", help="comma-separated names of parts to skip")
    options = parser.parse_args()
    without = set(options.without.split(","))
    start, now = time.monotonic(), datetime.now(timezone.utc)
    with tempfile.TemporaryDirectory(prefix="fasthessian-gpu-") as temporary:
        folder = Path(temporary) / "tree"
        copy_tree(ROOT, folder, *(() if "build" in without else ("*.so",)))
        meter = [sys.executable, "-m", "bench.gpu.meter", "machine.json"]
        outcomes = carry_out_all([Part("machine", meter, 60)], folder, 60)
        found = folder / "machine.json"
        facts = json.loads(found.read_text()) if found.exists() else {"gpu": False}
        if "nvcc" in facts and facts["nvcc"] == "absent" and not facts["gpu"]:
            without |= {"build", "sanitizer"}
        words = "" if facts["gpu"] else " (rehearsal: no GPU here)"
        left = options.seconds - (time.monotonic() - start)
        outcomes += carry_out_all(parts_of(folder, facts, without), folder, left, words)
        rows = []
        for name in ("streams", "lanczos", "ranks"):
            with contextlib.suppress(FileNotFoundError):
                rows += json.loads((folder / f"{name}.json").read_text())
    report = {
        "date": now.isoformat(timespec="seconds"),
        "machine": facts,
        "parts": [{"part": o.name, "state": o.state, "s": round(o.seconds, 1)} for o in outcomes],
        "rows": rows,
    }
    if facts["gpu"]:
        written = json.dumps(report, indent=1)
        folders = [ROOT / "bench" / "results", *filter(None, [os.environ.get("OUT")])]
        for place in map(Path, folders):
            place.mkdir(exist_ok=True)
            (place / f"gpu-{now:%Y%m%d-%H%M%S}.json").write_text(written)
    head = "" if facts["gpu"] else "REHEARSAL, no GPU here: these times mean nothing\n"
    print(f"\n{head}{facts}")
    print(*table(rows), sep="\n")
    print(", ".join(f"{o.name} {o.state} {o.seconds:.0f} s" for o in outcomes))
    bad = [o.name for o in outcomes if o.bad]
    print(f"FAILED: {', '.join(bad)}" if bad else "all parts passed")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
