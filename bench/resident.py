"""Peak memory of a benchmark's contestant, run in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path


def peak():
    """Largest resident size of this process in KiB; rusage would count that of its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def fresh(script, name):
    """What ``python script name`` prints as JSON."""
    command = [sys.executable, script, name]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(answer)
