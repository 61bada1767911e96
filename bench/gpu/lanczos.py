"""Lanczos on a GPU: launches and waits per step, densities compared with peers, bases.

``--device cpu`` with small sizes runs the same lines without device events.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch

import fasthessian as fh
from bench.gpu.meter import Rows, milliseconds, no_waiting, per_step
from bench.peers import eigenthings, pyhessian
from fasthessian import kernels
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.ritz import POLL_EVERY
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request
from fasthessian.study.resnet import resnet

FEW, MANY, WARM = 4, 24, 3  # steps
# with the goal of the ratio of their time to ours
PEERS = ("PyHessian", pyhessian, 30), ("hessian-eigenthings", eigenthings, 10)


def started(A, capacity=WARM + FEW + 2 * MANY, **options):
    """A run after its first steps, when kernels are loaded and the capture is over."""
    krylov = Lanczos(A, capacity, seed=0, **{"deferred": True, **options})
    for _ in range(WARM):
        krylov.step()
    return krylov


def steps_of(krylov, every=None):
    """A function that makes a number of steps and, with ``every``, polls as `eigsh` does."""

    def steps(count):
        for _ in range(count):
            krylov.step()
            if every is not None and krylov.size % every == 0:
                krylov.poll(wait=False)

    return steps


def first_wait(steps, device):
    """The first line that makes the host wait during some steps, or "none"."""
    try:
        with no_waiting(device):
            steps(MANY)
    except RuntimeError as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if "fasthessian" in f.filename
        ]
        last = frames[-1] if frames else None
        return f"{Path(last.filename).name}:{last.lineno}" if last else str(error)[:60]
    return "none"


def serving(device):
    names = kernels.AUTOMATIC[device.type]
    return [name for name in names if kernels.BACKENDS[name].unavailable(device) is None]


def step_costs(rows, device, n):
    """Kernels and copies per step outside its product, for each backend, with polls as in `eigsh`.

    The product is one multiplication. Waits are those of the steps alone: a poll waits until the
    device has reached the previous poll.
    """
    d = torch.linspace(1, 3, n, device=device)
    A = fh.SymmetricOperator(lambda v: d * v, n, device=device, check=False)
    u, w = (torch.randn(1, n, device=device) for _ in range(2))

    def products(count):
        for _ in range(count):
            multiply([Request(A, u, w, deferred=True)])

    for name in serving(device):
        with rows.section(f"step by {name}"):
            polling = steps_of(started(A, backend=name), POLL_EVERY)
            step = per_step(polling, device, FEW, MANY)
            own = per_step(products, device, FEW, MANY)
            outside = {kind: step[kind] - own[kind] for kind in step}
            steps = steps_of(started(A, backend=name))
            outside["waits"] = per_step(steps, device, FEW, MANY)["waits"] - own["waits"]
            waits = first_wait(steps_of(started(A, backend=name)), device)
            rows.add(f"step by {name}: kernels outside the product", value=outside["kernels"],
                     copies=outside["copies"], waits=outside["waits"], first_wait=waits,
                     goal="<= 4; 0 waits")  # fmt: skip


def network(device, depth, batch, side):
    """A ResNet in eval mode and random images."""
    torch.manual_seed(0)
    model = resnet(depth).to(device).eval()
    data = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
    return model, torch.nn.CrossEntropyLoss(), tuple(t.to(device) for t in data)


def wall(function, device, repeats=1):
    """Median seconds from the call until the device has finished."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def densities(rows, device, net, steps, repeats):
    """Density of a ResNet, captured and eager, and that of the peers that are installed."""
    model, criterion, data = network(device, *net)
    what = f"ESD {steps} steps, ResNet-{net[0]} batch {net[1]}"
    A = fh.Hessian(model, criterion, data)
    ends, ours = {}, {}
    for words, graph in (("captured", True), ("eager", False)):
        with rows.section(f"ESD {words}"):
            krylov = started(A, graph=graph)
            cost = per_step(steps_of(krylov), device, FEW, MANY)
            waits, replay = first_wait(steps_of(krylov), device), krylov.graph
            krylov.close()
            del krylov  # it holds graphs of A, which would prevent the capture of the next run
            found = fh.density(A, steps=steps, graph=graph)
            ends[words] = float(found.nodes.min()), float(found.nodes.max())
            options = {"steps": steps, "graph": graph}
            ours[words] = wall(lambda o=options: fh.density(A, **o), device, repeats)
            rows.add(f"{what}, {words}", s=ours[words], replay=replay,
                     kernels=cost["kernels"], launches=cost["launches"], waits=cost["waits"],
                     first_wait=waits)  # fmt: skip
    if {"captured", "eager"} <= set(ends):
        near(ends["captured"], ends["eager"], 1e-3, "captured and eager")
    if not ours:
        return  # the sections above have added a row
    best = min(ours.values())
    for name, peer, goal in PEERS:
        with rows.section(f"ESD by {name}"):
            try:
                call = peer.density(copy.deepcopy(model), criterion, data)
            except ImportError as error:
                rows.add(f"ESD by {name}", value=f"not installed ({error})")
                continue
            call(3)  # warm-up
            nodes = []
            seconds = wall(lambda n=nodes, c=call: n.extend(c(steps)), device)
            # the starting vectors differ: the outermost node agrees, the weights need not
            outermost = [max(pair, key=abs) for pair in (nodes, ends["eager"])]
            near(outermost[:1], outermost[1:], 2e-2, name)
            rows.add(f"{what}, {name} over ours", value=seconds / best, s=seconds,
                     goal=f">= {goal}")  # fmt: skip
    with rows.section("product over gradient"):
        params = list(model.parameters())
        v, out = (torch.randn(1, A.n, device=device) for _ in range(2))
        A._kept.rebuild()  # on this stream
        multiply([Request(A, v, out)])
        product = milliseconds(lambda: multiply([Request(A, v, out, deferred=True)]), device)
        gradient = milliseconds(
            lambda: torch.autograd.grad(criterion(model(data[0]), data[1]), params), device
        )
        rows.add("product over gradient, both eager", value=product / gradient, ms=product,
                 gradient_ms=gradient, goal="<= 2.0")  # fmt: skip
        if "captured" in ours:
            rows.add("captured step (product and all) over gradient",
                     value=1e3 * ours["captured"] / steps / gradient)  # fmt: skip


def near(found, expected, bound, what):
    scale = max(map(abs, expected))
    for a, b in zip(found, expected, strict=True):
        if not abs(a - b) <= bound * scale:
            raise AssertionError(f"{what}: outermost nodes {found} against {expected}")


def bases(rows, device, width, steps):
    """Time and peak memory of a density for each basis, without the memory of the product."""
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (torch.nn.Linear(width, width), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10)).to(device)
    data = torch.randn(64, width, device=device), torch.randint(10, (64,), device=device)
    A = fh.Hessian(model, torch.nn.CrossEntropyLoss(), data)
    A @ torch.randn(A.n, device=device)
    ends = {}
    for basis in ("full", "compressed", "offload")[: 3 if device.type == "cuda" else 2]:
        with rows.section(f"ESD on a {basis} basis"):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            found = fh.density(A, steps=steps, basis=basis)
            peak = 0
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) - before
            ends[basis] = float(found.nodes.min()), float(found.nodes.max())
            near(ends[basis], ends["full"], 5e-3 if basis == "compressed" else 1e-4, basis)
            seconds = wall(lambda b=basis: fh.density(A, steps=steps, basis=b), device)
            rows.add(f"ESD {steps} steps, {A.n / 1e6:.3g} M parameters, {basis} basis", s=seconds,
                     peak_GiB=peak / 2**30)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--net", type=int, nargs=3, default=(20, 128, 32), metavar="SIZE",
                        help="depth, batch and side of the images")  # fmt: skip
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=2600)
    parser.add_argument("--json")
    options = parser.parse_args()
    device, rows = torch.device(options.device), Rows(options.json)
    for name, section in (
        ("steps", lambda: step_costs(rows, device, options.n)),
        ("densities", lambda: densities(rows, device, options.net, options.steps,
                                        options.repeats)),
        ("bases", lambda: bases(rows, device, options.width, options.steps)),
    ):  # fmt: skip
        with rows.section(name), contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.callback(torch.cuda.empty_cache)
            section()
    sys.exit(rows.failed)


if __name__ == "__main__":
    main()
