"""Benchmarks: check first, then time in interleaved rounds, print ratios last, write JSON.

``make bench`` runs them. Absolute times of shared machines mean little; ratios within one run are
what is compared. The JSON goes to bench/results/ with processor, versions and date.
"""

import json
import os
import platform
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

import fasthessian as fh
from fasthessian.results.record import write_whole

ROWS: list[dict] = []


def rounds(functions, count=7, prepare=None):
    """Seconds of each named function, one call each per round in turn: {name: [s, ...]}."""
    times = {name: [] for name in functions}
    for _ in range(count):
        for name, function in functions.items():
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def median(times):
    return {name: statistics.median(values) for name, values in times.items()}


@pytest.fixture
def row(request):
    """Function that adds a line to the closing table; value None with a note says why."""

    def add(what, value, unit="x", *, target=None, **details):
        ROWS.append({"what": what, "value": value, "unit": unit, "target": target, **details})

    return add


def processor():
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    load = os.getloadavg()[0]
    write = terminalreporter.write_line
    write("")
    write(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if load > os.cpu_count() + 0.5:
        write(f"NOT QUIET: load average {load:.1f} on {os.cpu_count()} cores")
    for entry in ROWS:
        if entry["value"] is None:
            write(f"{entry['what']:<72} {entry['note']}")
            continue
        goal = f"   (goal {entry['target']})" if entry["target"] else ""
        write(f"{entry['what']:<72} {entry['value']:>10.4g} {entry['unit']}{goal}")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    now = datetime.now(timezone.utc)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fasthessian": fh.__version__,
        "backends": fh.doctor().splitlines(),
        "load_average": load,
        "rows": ROWS,
    }
    path = folder / f"cpu-{now:%Y%m%d-%H%M%S}.json"
    write_whole(path, json.dumps(report, indent=1).encode())
    write(f"written to bench/results/{path.name}")
