"""Run a contestant in a process of its own, which starts with fresh memory and allocator."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peak():
    """Largest resident size of this process in KiB; rusage would count that of its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def fresh(module, name, **environment):
    """What ``python -m module name`` prints as JSON, with these extra environment variables."""
    command, variables = [sys.executable, "-m", module, name], {**os.environ, **environment}
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert answer.returncode == 0, f"{module} {name} failed:\n{answer.stderr}"
    return json.loads(answer.stdout)
