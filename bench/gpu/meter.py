"""What the GPU benchmarks share: timing by device events, counts of launches, rows on disk.

``python -m bench.gpu.meter FILE`` writes the facts of this machine: device, driver, versions.
"""

import collections
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

HEAD_START = 1_000_000  # cycles: half a millisecond, longer than the host needs to enqueue a call


def milliseconds(function, device, repeats=20, warm=3, *, queued=False):
    """Median time of one call: by events on a GPU, by the clock in a rehearsal.

    With ``queued`` the device sleeps while the host enqueues the call, so that the time of the
    host is not included.
    """
    for _ in range(warm):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for begin, end in marks:
        if queued:
            torch.cuda._sleep(HEAD_START)
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def counted(function, device):
    """Kernels and copies that ran on the device, launches and waits of the host, in one call."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    counts = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=activities) as trace:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        for event in trace.events():
            if event.device_type == DeviceType.CUDA:
                if not getattr(event, "is_user_annotation", False):
                    copy = event.name.startswith(("Memcpy", "Memset"))
                    counts["copies" if copy else "kernels"] += 1
            elif event.name.startswith("cu"):
                counts["launches"] += "Launch" in event.name
                counts["waits"] += "Synchronize" in event.name
    return counts


def per_step(steps, device, few=4, many=24):
    """Counts per step of ``steps(count)``: by the difference of two runs, so set-up cancels."""
    first, second = (counted(lambda c=count: steps(c), device) for count in (few, many))
    return {
        kind: (second[kind] - first[kind]) / (many - few)
        for kind in ("kernels", "copies", "launches", "waits")
    }


@contextlib.contextmanager
def no_waiting(device):
    """Scope in which torch raises where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode misses some waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Rows:
    """The rows of one benchmark, written to disk after each, so that a killed run leaves some."""

    def __init__(self, path):
        self._path, self.rows, self.failed = path, [], False

    @staticmethod
    def read(path):
        """The rows that another process wrote."""
        return json.loads(Path(path).read_text())

    def add(self, what, **numbers):
        """Add, print and write one row."""
        self.rows.append({"what": what, **numbers})
        print(what, numbers, flush=True)
        if self._path is not None:
            beside = Path(f"{self._path}.part")
            beside.write_text(json.dumps(self.rows))
            os.replace(beside, self._path)

    @contextlib.contextmanager
    def section(self, what):
        """Scope of one section: an error inside adds a row and marks the run as failed."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self.add(what, error=f"{type(error).__name__}: {error}".splitlines()[0][:120])


def machine():
    """Device, driver and versions, as far as they can be read here."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.is_available(),
        "nvcc": _last(["nvcc", "--version"]),
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if found["gpu"]:
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2": getattr(properties, "L2_cache_size", None),
            "free_GiB": round(free / 2**30, 1),
            "total_GiB": round(total / 2**30, 1),
            "driver": _last(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        }
    return found


def _last(command):
    if shutil.which(command[0]) is None:
        return "absent"
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return (run.stdout.strip().splitlines() or [f"exit status {run.returncode}"])[-1]


if __name__ == "__main__":
    facts = machine()
    Path(sys.argv[1]).write_text(json.dumps(facts))
    print(json.dumps(facts, indent=1))
    if facts["gpu"]:
        subprocess.run(["nvidia-smi"], timeout=60)
