"""Every Triton kernel compiles without a GPU, without spills and with 16-byte loads.

For sm_90: blocks of 1, 2, 4 and 8 rows, with and without H, for types that use each line of the
table of tiles; for the other types, the kernels with the most terms. S and append are compiled for
2 and 8 rows, where registers are scarcest. For sm_80, sm_100 and gfx942: the kernels of a Lanczos
step, those that are short of registers on any chip, and one of each other kernel.
"""

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fasthessian.kernels.contract import FLOATS, STORED
from fasthessian.kernels.triton.tiles import BOTH, DOTS, UPDATE, tile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]
TABLED, OTHERS = "f16/f32|f16/f64|f32/f32|f64/f64", "f32/f64|f64/f32"  # one per line of TABLE
H, PLAIN = '"H": true.*"project"', '"S": false, "append": false'
REST = r'"f32/f32", "b": 2, "aligned": true.*"total"|"m"|"float32"'
LARGE_SUBSET = "|".join((
    rf'"({TABLED})", "b": [28], "aligned": true.*"(project|update)"',
    rf'"({TABLED})", "b": [13], "aligned": true, ("H".*"project"|{PLAIN})',
    rf'"({OTHERS})", "b": ., "aligned": true, ({H}|{PLAIN})',
    rf'"({OTHERS})", "b": [28], "aligned": true, "S": true, "append": true',
    rf'"b": 2, "aligned": false, {PLAIN}|"b": 8, "aligned": false, {H}',
    rf'{REST}|"float64"',
))  # fmt: skip
SUBSET = "|".join((
    r'"(f16/f32|f32/f32|f64/f64)", "b": 2, "aligned": true, "H".*"project"',
    rf'"(f16/f32|f32/f32|f64/f64)", "b": 2, "aligned": true, ({PLAIN}|"S": true, "append": true)',
    rf'"(f16/f64", "b": [123]|f32/f..", "b": 3), "aligned": true, {H}',
    rf'"(f16/f64|f32/f64)", "b": 3, "aligned": true, {PLAIN}',
    rf'"({TABLED})", "b": 8, "aligned": true, ({H}|"S".*"append": false)',
    rf'"f32/f32", "b": (2, "aligned": false, {PLAIN}|8, "aligned": false, {H})',
    REST,
))  # fmt: skip
SUBSETS = {"sm_90": LARGE_SUBSET, "sm_80": SUBSET, "sm_100": SUBSET, "gfx942": SUBSET}
REGISTERS = 65536  # per multiprocessor; a CDNA3 compute unit has twice as many


@functools.cache
def compiled(*arguments):
    """The reports of tests/support/triton_aot.py, one per kernel."""
    script = Path(__file__).parents[1] / "support/triton_aot.py"
    run = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@functools.cache
def table():
    """The reports of SUBSETS, by target, from parallel processes."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda item: compiled(item[0], "--only", item[1]), SUBSETS.items())
        return dict(zip(SUBSETS, found, strict=True))


def wide_loads(found):
    """How many 16-byte loads a thread needs, computed from the shapes."""
    c = found["constants"]
    if found["kernel"] == "curvature":  # U and Z, two passes, for whole tiles and for the last tile
        numbers = 4 if found["types"] == "float32" else 2
        line = found["shape"][1] if found["shape"][2] == 1 else found["shape"][2]
        tiles = c["R"] * c["T"] * c["F"] // (found["threads"] * numbers)
        return 0 if line % numbers else 8 * tiles
    if not found["aligned"]:
        return 0
    v_bytes, w_bytes = (int(name[1:]) // 8 for name in found["types"].split("/"))
    w_loads = w_bytes // v_bytes if w_bytes >= v_bytes else 0  # 8-byte loads are not counted
    rows = c["BK"] + c["B"] * w_loads
    if found["kernel"] == "update":
        return rows
    gram = (min(c["B"], c["BK"]) + c["B"]) * w_loads
    return gram + rows * (2 if found["H"] else 1)


def faults(found):
    """Texts that say what is wrong with a compiled kernel."""
    backend = "hip" if found["target"].startswith("gfx") else "cuda"
    if found["outside"]:
        yield f"{found['outside']} bytes of spills or local memory"
    if found["registers"] * found["threads"] > REGISTERS:
        yield f"{found['registers']} registers of {found['threads']} threads do not fit"
    if backend == "cuda" and found["registers"] > (found["most"] or 255):
        yield f"{found['registers']} registers, more than {found['most']}"
    if found["kernel"] in ("project", "update") and found["wide"] != wide_loads(found):
        yield f"{found['wide']} loads of 16 bytes, not {wide_loads(found)}"
    # loads of the scales are additional
    if found["kernel"] == "curvature" and found["wide"] < wide_loads(found):
        yield f"{found['wide']} loads of 16 bytes, fewer than {wide_loads(found)}"
    most = {"project": 1024, "update": 0}.get(found["kernel"])  # for sums across threads
    if most is not None and found["aligned"] and found["shared"] > most:
        yield f"tiles pass through {found['shared']} bytes of shared memory"


@pytest.mark.parametrize("target", SUBSETS)
def test_kernels_compile_without_spills_and_with_wide_loads(target):
    here = table()[target]
    assert {found["kernel"] for found in here} == {
        "project", "total", "update", "recur", "signs", "normal", "pack", "curvature",
    }  # fmt: skip
    assert len(here) == (118 if target == "sm_90" else 45)
    bad = {str(found): list(faults(found)) for found in here if list(faults(found))}
    assert not bad, bad


def test_the_checks_find_planted_faults():
    """Too many rows at a time, a leading dimension without known divisor, narrow loads of W."""
    case = r'"f16/f32", "b": 8, "aligned": true.*"S": true, "append": true'
    (found,) = compiled("sm_90", "--only", case, "--set", "BK=4,UNIT_V=1,PARTS=1")
    words = " ".join(faults(found))
    assert "bytes of spills" in words and "loads of 16 bytes" in words and "shared" in words
    (found,) = compiled("sm_90", "--only", "float32.*50304", "--set", "UNIT=1")
    assert "0 loads of 16 bytes, fewer than 8" in " ".join(faults(found))


@pytest.mark.parametrize("kind", [DOTS, BOTH, UPDATE])
def test_blocks_of_other_sizes_use_the_same_kernels(kind):
    for vtype, wtype in itertools.product(STORED, FLOATS):
        V = torch.empty(9, 64, dtype=vtype, device="meta")
        W = torch.empty(8, 64, dtype=wtype, device="meta")
        tiles = [tile(V, W[:b], kind) for b in range(1, 9)]
        assert [tiles.index(each) + 1 for each in tiles] == [1, 2, 3, 3, 5, 5, 5, 5]
