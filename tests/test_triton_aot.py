"""Every Triton kernel compiles for GPUs that are not here, without spills and with 16-byte loads.

All kernels for sm_90; for sm_80, sm_100 and gfx942 those of a Lanczos step and one of each other.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
TARGETS = ("sm_90", "sm_80", "sm_100", "gfx942")
SUBSET = r'sm_90|"b": 2|"m"|float32'
REGISTERS = 65536  # of a multiprocessor; a CDNA3 compute unit has twice as many


@functools.cache
def compiled(*arguments):
    """The reports of tests/triton_aot.py, one a kernel."""
    script = Path(__file__).with_name("triton_aot.py")
    run = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def wide_loads(found):
    """How many 16-byte loads a thread makes where all is aligned, from the shapes."""
    c = found["constants"]
    if found["kernel"] == "curvature":  # U and Z, twice, of whole tiles and of the last
        numbers = 4 if found["types"] == "float32" else 2
        line = found["shape"][1] if found["shape"][2] == 1 else found["shape"][2]
        tiles = c["R"] * c["T"] * c["F"] // (found["threads"] * numbers)
        return 0 if line % numbers else 8 * tiles
    w_loads = 2 if found["types"] == "f16" else 1
    rows = c["BK"] + c["B"] * w_loads
    if found["kernel"] == "update":
        return rows
    gram = (min(c["B"], c["BK"]) + c["B"]) * w_loads
    return gram + rows * (2 if found.get("H") else 1)


def faults(found):
    """What is wrong with a compiled kernel, in words."""
    backend = "hip" if found["target"].startswith("gfx") else "cuda"
    if found["outside"]:
        yield f"{found['outside']} bytes of spills or local memory"
    if found["registers"] * found["threads"] > REGISTERS:
        yield f"{found['registers']} registers of {found['threads']} threads do not fit"
    if backend == "cuda" and found["registers"] > (found["most"] or 255):
        yield f"{found['registers']} registers, more than {found['most']}"
    if found["kernel"] in ("project", "update") and found["wide"] != wide_loads(found):
        yield f"{found['wide']} loads of 16 bytes, not {wide_loads(found)}"
    # those of the scales may come on top
    if found["kernel"] == "curvature" and found["wide"] < wide_loads(found):
        yield f"{found['wide']} loads of 16 bytes, fewer than {wide_loads(found)}"
    if found["kernel"] == "project" and not found.get("H") and found["shared"] > 1024:
        yield f"tiles pass through {found['shared']} bytes of shared memory"


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills_and_with_wide_loads(target):
    here = [found for found in compiled(*TARGETS, "--only", SUBSET) if found["target"] == target]
    assert {found["kernel"] for found in here} == {
        "project", "total", "update", "recur", "signs", "normal", "pack", "curvature",
    }  # fmt: skip
    assert len(here) == (69 if target == "sm_90" else 25)
    bad = {str(found): list(faults(found)) for found in here if list(faults(found))}
    assert not bad, bad


def test_these_checks_can_fail():
    """Too many rows at a time spill; a leading dimension of unknown divisibility narrows loads."""
    case = r'"f16", "b": 8.*"append".*update'
    (found,) = compiled("sm_90", "--only", case, "--set", "BK=4,UNIT_V=1")
    words = " ".join(faults(found))
    assert "bytes of spills" in words and "loads of 16 bytes" in words
    (found,) = compiled("sm_90", "--only", "float32.*50304", "--set", "UNIT=1")
    assert "0 loads of 16 bytes, fewer than 8" in " ".join(faults(found))
