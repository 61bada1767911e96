"""The rows of one run of benchmarks, and the JSON file that keeps them."""

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import fasthessian as fh
from fasthessian.results.record import write_whole

RESULTS = Path(__file__).resolve().parents[1] / "results"


def processor():
    """Model name and number of cores."""
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def printed(rows):
    """The machine, its load and the rows as lines of text."""
    load = os.getloadavg()[0]
    yield f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if load > os.cpu_count() + 0.5:
        yield f"NOT QUIET: load average {load:.1f} on {os.cpu_count()} cores"
    for row in rows:
        if row["value"] is None:
            yield f"{row['what']:<72} {row['note']}"
            continue
        goal = f"   (goal {row['target']})" if row["target"] else ""
        yield f"{row['what']:<72} {row['value']:>10.4g} {row['unit']}{goal}"


def written(rows):
    """Path of the new file in bench/results/ that holds the rows and describes the machine."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.now(timezone.utc)
    report = {
        "date": now.isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fasthessian": fh.__version__,
        "backends": fh.doctor().splitlines(),
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }
    path = RESULTS / f"cpu-{now:%Y%m%d-%H%M%S}.json"
    write_whole(path, json.dumps(report, indent=1).encode())
    return path
