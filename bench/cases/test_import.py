"""What ``import fasthessian`` costs on top of ``import torch``, in fresh processes."""

import statistics
import subprocess
import sys

CODE = """
import time, torch
start = time.perf_counter()
import fasthessian
print(time.perf_counter() - start)
import sys
heavy = {"matplotlib", "click", "rich", "sklearn", "scipy", "triton"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import(row, benchmark):
    def fresh():
        command = [sys.executable, "-c", CODE]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    times = [fresh() for _ in range(9)]
    row(
        "import fasthessian after import torch",
        1e3 * statistics.median(times),
        "ms",
        target="<= 50",
    )
    benchmark.pedantic(fresh, rounds=1)
