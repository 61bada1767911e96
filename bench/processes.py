"""A benchmark's contestants in a process of their own: its memory and its allocator are new."""

import json
import os
import subprocess
import sys
from pathlib import Path


def peak():
    """Largest resident size of this process in KiB; rusage would count that of its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def fresh(script, name, **environment):
    """What ``python script name`` prints as JSON, with more variables in its environment."""
    command, variables = [sys.executable, script, name], {**os.environ, **environment}
    answer = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert answer.returncode == 0, f"{script} {name} failed:\n{answer.stderr}"
    return json.loads(answer.stdout)
