"""Krylov runs that are written in one process and continued in another one.

    python -m tests.support.continued_runs FOLDER

reads the states in FOLDER/NAME, continues their runs and writes what they give to ``NAME.pt``. What
the Ritz loop gives from each state in FOLDER/NAME/NUMBER goes to one file.
"""

import sys
from pathlib import Path

import torch

import fasthessian as fh
from fasthessian.checkpoints.folder import Folder
from fasthessian.checkpoints.states import States
from fasthessian.distributed.ranks import ALONE
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.ritz import converge, refine
from fasthessian.krylov.three_term import ThreeTerm
from fasthessian.operators.base import multiply

F32, F64 = torch.float32, torch.float64
BULK = torch.linspace(-1, 1, 490, dtype=F64)
VALUES = torch.cat([torch.tensor([9.0, 7, 5, 4, 3, 2.5, -8, -6, -3.5, -2.2], dtype=F64), BULK])
FEW = torch.tensor([2.0] * 30 + [5.0] * 10 + [-1.0] * 60, dtype=F64)  # breaks down at row 3


def diagonal(values, dtype=F64):
    d = values.to(dtype)
    return fh.SymmetricOperator(lambda v: d * v, len(d), dtype=dtype, check=False)


def steps(run, count):
    """Make some steps, with a poll after every fourth one; returns what the polls found."""
    polls = []
    for _ in range(count):
        if run.size == run.capacity or (run.ended and not getattr(run, "refill", False)):
            break
        run.step()
        if run.size % 4 == 0:
            polls.append([run.poll(wait=False), run.size, len(run.jacobi())])
    return polls


def restarted(run):
    steps(run, 24)
    run.poll(wait=True)
    run.restart(torch.tensor([23, 22, 21, 0, 1]))
    steps(run, 5)


def renewed(run):
    steps(run, 24)
    run.poll(wait=True)
    run.renew(torch.tensor([23, 22, 0]))
    steps(run, 6)


CASES = {}  # name: (a new run, its steps before it is written)
for schedule in ("dcgs2", "cgs2"):
    for basis in ("full", "compressed"):
        for deferred in (False, True):
            options = {"seed": 3, "schedule": schedule, "basis": basis, "deferred": deferred}
            where = f"{schedule} {basis}{' deferred' * deferred}"
            for moment, values, dtype, before in (
                ("before the first step", VALUES, F64, lambda run: None),
                ("in the middle", VALUES, F32, lambda run: steps(run, 10)),
                ("after a restart", VALUES, F64, restarted),
                ("after a renewal", VALUES, F64, renewed),
                ("after a breakdown", FEW, F64, lambda run: steps(run, 10)),
                ("of a large norm", VALUES * 1e25, F32, lambda run: steps(run, 10)),
            ):
                CASES[f"{where} {moment}"] = (
                    lambda values=values, dtype=dtype, options=options: Lanczos(
                        diagonal(values, dtype), 24, **options
                    ),
                    before,
                )
for deferred in (False, True):
    for moment, values, count in (("in the middle", VALUES, 9), ("at its end", FEW, 3)):
        CASES[f"three terms{' deferred' * deferred} {moment}"] = (
            lambda values=values, deferred=deferred: ThreeTerm(
                diagonal(values, F32), 24, seed=3, deferred=deferred
            ),
            lambda run, count=count: steps(run, count),
        )


def rest(run):
    """What the remaining steps give, and then the eigenpairs of the Ritz loop."""
    polls = steps(run, 24)
    run.poll(wait=True)
    found = {
        "polls": polls,
        "T": run.jacobi(),
        "size": run.size,
        "ended": run.ended,
        "graph": run.graph,
    }
    if isinstance(run, ThreeTerm):
        return found | {"rows": run.state.rows, "entries": run.state.entries}
    values, _, residuals = run.ritz()
    found |= {"V": run.state.basis.stored[: run.size].clone(), "W": run.state.W.clone()}
    found |= {"ritz": values, "bounds": residuals, "numbers": run.state.numbers()}
    return found | pairs(run, 3, "LA", 200)


def pairs(run, k, which, limit, callback=lambda states: None, made=0):
    """What the Ritz loop finds, and the products of this process; a callback at each request."""
    before, states = run.A.matvecs, States(run.A, made=made)
    asking = converge(run, states, k, which, 1e-3, limit, lambda: None)
    while True:
        try:
            request = next(asking)
        except StopIteration as stop:
            found = stop.value
            break
        callback(states)
        multiply([request])
        del request
    for request in refine(run.A, found, 1e-3, run.space):
        multiply([request])
    return {"pairs": dict(vars(found)), "products": run.A.matvecs - before}


def write(path, run, made=0):
    """The state of a run as the first generation of a folder."""
    path.mkdir()
    Folder(path, ALONE).write({"made": made}, {("run", "krylov"): run.state})


def read(path, run):
    """Restore the state of a run; returns the products made before."""
    folder = Folder(path, ALONE)
    made = folder.read()["made"]
    run.state.restore(*folder.parts("run")["krylov"])
    return made


def rounded():
    """Products whose error shows in T only after some steps."""
    d = COPIES.float()
    return fh.SymmetricOperator(lambda v: (d * v).bfloat16().float(), len(d), check=False)


COPIES = torch.cat([VALUES[:10].repeat_interleave(2), BULK[::4]])
LOOPS = {  # name: (a new run, what its loop looks for, steps before the loop)
    "both sides": (lambda: Lanczos(diagonal(COPIES), 13, seed=3), (5, "LM", 1000), 0),
    "one side": (lambda: Lanczos(diagonal(COPIES, F32), 16, seed=3), (5, "LA", 1000), 7),
    "deferred": (
        lambda: Lanczos(diagonal(COPIES), 24, seed=3, deferred=True),
        (5, (3, 2), 1000),
        0,
    ),
    "limit of a compressed run": (
        lambda: Lanczos(diagonal(COPIES, F32), 20, seed=3, basis="compressed"),
        (3, "LM", 27),
        0,
    ),
    "limit in the search": (
        lambda: Lanczos(diagonal(COPIES, F32), 30, seed=3, schedule="cgs2"),
        (3, "SA", 30),
        0,
    ),
    "limit of inexact products": (lambda: Lanczos(rounded(), 24, seed=3), (4, "LM", 24), 0),
}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, (new, _) in CASES.items():
        continued = new()
        read(folder / name, continued)
        torch.save(rest(continued), folder / f"{name}.pt")
    for name, (new, wanted, _) in LOOPS.items():
        found = {}
        for path in sorted((folder / name).iterdir()):
            continued = new()
            made = read(path, continued)
            found[made] = pairs(continued, *wanted, made=made)
        torch.save(found, folder / f"{name}.pt")
