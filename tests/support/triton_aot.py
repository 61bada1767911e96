"""Compiles the Triton kernels for any GPU, without one; prints a report per kernel as JSON lines.

A process of its own, without the interpreter. The backend itself is run on tensors that have no
memory; in place of a launch the kernel is compiled with the very arguments it was given.

    python tests/support/triton_aot.py sm_90 gfx942 [--only REGEX] [--set UNIT_V=1]
"""

import argparse
import contextlib
import inspect
import itertools
import json
import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fasthessian.kernels.triton import backend as triton_backend

MULTIPROCESSORS, N = 132, 11_173_962  # an H200; a ResNet-18
TYPES = {"f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
POINTERS = {torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
            torch.int64: "*i64"}  # fmt: skip
# tokens of vocabularies that rows of 16 bytes fit and do not; digits; pixels; positions
LOGITS = ((2048, 50304, 1), (2048, 50257, 1), (4096, 10, 1), (8, 21, 512 * 512), (8, 50257, 49))
META = torch.device("meta")
WIDE = {"cuda": r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)", "hip": r"(?:global|buffer)_load_dwordx4"}


def target(name):
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def compiled(kernel, args, options, threads, registers, where):
    """What the JIT would build for these arguments."""
    names = list(inspect.signature(kernel.fn).parameters)
    given = dict(zip(names, args, strict=False)) | options
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(names):
        value, annotation = given[name], kernel.params[i].annotation
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if not kernel.params[i].do_not_specialize:
                aligned[(i,)] = [["tt.divisibility", 16]]
        elif annotation == "constexpr" or value is None:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = annotation or "i32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    settings = {"num_warps": threads // where.warp_size, "num_stages": 1}
    if where.backend == "cuda" and registers is not None:
        settings["maxnreg"] = registers
    return triton.compile(source, target=where, options=settings)


def resources(kernel, backend):
    """Registers a thread, and the bytes that a thread keeps outside them."""
    if backend == "hip":
        text = kernel.asm["amdgcn"]
        field = {key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in (
            "vgpr_count", "vgpr_spill_count", "private_segment_fixed_size",
        )}  # fmt: skip
        registers = field.pop("vgpr_count")
        return registers, sum(field.values())
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                              text=True, check=True).stdout  # fmt: skip
    found = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return found["REG"], found["STACK"] + found["LOCAL"]


def report(case, kernel, threads, registers, options, where):
    used, outside = resources(kernel, where.backend)
    text = kernel.asm["ptx" if where.backend == "cuda" else "amdgcn"]
    return {
        **case, "registers": used, "most": registers, "threads": threads, "outside": outside,
        "shared": kernel.metadata.shared, "wide": len(re.findall(WIDE[where.backend], text)),
        "constants": options,
    }  # fmt: skip


def stream_calls(vtype, wtype, b, pad):
    """(case, call) for rows of N numbers and ``pad``; 40 rows stand for 1,000: same kernels."""
    k, like = 40, {"dtype": torch.float64, "device": META}
    count = torch.empty(1, dtype=torch.int64, device=META)
    V = torch.empty(k, N + pad, dtype=TYPES[vtype], device=META)[:, :N]
    W = torch.empty(b, N + pad, dtype=TYPES[wtype], device=META)[:, :N]
    H, S = torch.empty(k, b, **like), torch.empty(b, b, **like)
    case = {"types": f"{vtype}/{wtype}", "b": b, "aligned": (N + pad) % 8 == 0}
    yield case | {"H": False}, partial(triton_backend.project_, V, W, count=count)
    yield case | {"H": True}, partial(triton_backend.project_, V, W, H)
    for mix in (None, S):
        told, update = case | {"S": mix is not None}, partial(triton_backend.update_, V, W, H, mix)
        yield told | {"append": False}, update
        yield told | {"append": True}, partial(update, count=count, append=1.0)


def calls():
    """(case, call) over the table of configurations."""
    like = {"dtype": torch.float64, "device": META}
    two = torch.empty(2, dtype=torch.int64, device=META)
    for vtype, wtype, b in itertools.product(TYPES, ("f32", "f64"), (1, 2, 3, 8)):
        yield from stream_calls(vtype, wtype, b, 54)
        if wtype == "f32" and b in (2, 8):
            yield from stream_calls(vtype, wtype, b, 53)
    for m in (100, 1000):
        C, T = torch.empty(m, 2, **like), torch.empty(m + 1, m + 1, **like)
        G, gauges = torch.empty(2, 2, **like), torch.empty(m + 1, 3, **like)
        count = two if m == 100 else 7
        yield {"m": m}, partial(triton_backend.recur_, C, G, T, gauges, count=count)
    for dtype in (torch.float32, torch.float64):
        out = torch.empty(N, dtype=dtype, device=META)
        case = {"types": str(dtype).removeprefix("torch.")}
        yield case, partial(triton_backend.signs_, out, 1)
        yield case, partial(triton_backend.normal_, out, 1)
        yield case, partial(triton_backend.pack_, out, [out], beta=0.5)
        for shape in LOGITS:
            U, Z = (torch.empty(shape, dtype=dtype, device=META) for _ in range(2))
            scale = torch.empty(shape[0], shape[2], **like)
            curvature = partial(triton_backend.softmax_curvature_, U, Z, scale)
            yield case | {"shape": shape}, curvature


def compile_instead(case, where, planted, only):
    """In place of the backend's launch: compile, and print the report."""

    def launch(kernel, device, programs, *args, threads=128, registers=None, **options):
        label = case | {"kernel": kernel.fn.__name__}
        if only.search(json.dumps(label)):
            options |= {key: value for key, value in planted.items() if key in options}
            built = compiled(kernel, args, options, threads, registers, where)
            found = report(label, built, threads, registers, options, where)
            print(json.dumps(found), flush=True)

    return launch


def main():
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", help="sm_80, sm_90, gfx942, ...")
    parser.add_argument("--only", default="", help="what a case as JSON must match")
    parser.add_argument("--set", default="", metavar="NAME=NUMBER", help="planted constants")
    chosen = parser.parse_args()
    pairs = (pair.split("=") for pair in chosen.set.split(",") if pair)
    planted = {name: int(number) for name, number in pairs}
    triton_backend._at = lambda device: contextlib.nullcontext()
    triton_backend._table = lambda n, device: torch.empty(len(n), dtype=torch.int64, device=device)
    for name, (case, call) in itertools.product(chosen.targets, list(calls())):
        where = target(name)
        triton_backend._hardware = lambda device, where=where: (MULTIPROCESSORS, where.warp_size)
        triton_backend._launch = compile_instead(
            {"target": name} | case, where, planted, re.compile(chosen.only)
        )
        call()


if __name__ == "__main__":
    main()
