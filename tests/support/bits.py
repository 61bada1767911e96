"""Records the bits of every algorithm's results on five problems, or compares them with a record.

    python tests/support/bits.py record FILE
    python tests/support/bits.py compare FILE      exit code 1 if a bit differs

Sums depend on the instruction set and the number of threads: a record holds for one machine. Only
public names are used: the script runs on any commit.
"""

import hashlib
import json
import os
import sys
import warnings

if __name__ == "__main__":  # before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn

import fasthessian as fh


def classifier() -> tuple[nn.Module, nn.Module, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    return model, nn.CrossEntropyLoss(), (torch.randn(64, 12), torch.randint(5, (64,)))


def regression() -> tuple[nn.Module, nn.Module, object]:
    """A linear layer under MSE: every eigenvalue is threefold."""
    torch.manual_seed(1)
    batches = [(torch.randn(size, 10), torch.randn(size, 3)) for size in (16, 16, 7)]
    return nn.Linear(10, 3), nn.MSELoss(), batches


def resnet() -> tuple[nn.Module, nn.Module, object]:
    from fasthessian.study.resnet import resnet as network

    torch.manual_seed(2)
    return (
        network(8, width=4),
        nn.CrossEntropyLoss(),
        (torch.randn(8, 3, 16, 16), torch.randint(10, (8,))),
    )


def operators() -> dict[str, fh.SymmetricOperator]:
    """The five problems, each a fresh operator."""
    diagonal = torch.cat((torch.linspace(0, 1, 290), torch.logspace(0.5, 2, 10)))
    return {
        "hessian": fh.Hessian(*classifier()),
        "multiple": fh.Hessian(*regression()),
        "resnet": fh.Hessian(*resnet()),
        "gauss-newton": fh.GaussNewton(*classifier()),
        "diagonal": fh.SymmetricOperator(lambda v: diagonal * v, 300),
    }


ALGORITHMS = {
    "eigsh LM": lambda A: fh.eigsh(A, 4),
    "eigsh BE": lambda A: fh.eigsh(A, 3, "BE", tol=1e-2),
    "eigsh cgs2": lambda A: fh.eigsh(A, 2, "LA", schedule="cgs2"),
    "eigsh compressed": lambda A: fh.eigsh(A, 2, basis="compressed", tol=1e-2),
    "trace": lambda A: fh.trace(A, rtol=0.1),
    "deflated trace": lambda A: fh.trace(A, rtol=0.1, deflate=fh.eigsh(A, 2)),
    "density": lambda A: fh.density(A, steps=24, probes=2),
    "density without a basis": lambda A: fh.density(A, steps=24, basis="none"),
    "spectrum": lambda A: fh.spectrum(A, 2, steps=24, rtol=0.1),
}


def digest(value: object) -> str:
    """A hash of the bits of a record: its tensors, numbers and words."""
    found = hashlib.sha256()

    def add(item: object) -> None:
        if isinstance(item, torch.Tensor):
            found.update(str((item.dtype, tuple(item.shape))).encode())
            found.update(item.detach().cpu().contiguous().numpy().tobytes())
        elif hasattr(item, "__dataclass_fields__"):
            for name in sorted(item.__dataclass_fields__):
                add(name)
                add(getattr(item, name))
        elif isinstance(item, dict):
            for name, each in item.items():
                add(name)
                add(each)
        elif isinstance(item, (list, tuple)):
            for each in item:
                add(each)
        elif isinstance(item, float):
            found.update(item.hex().encode())
        else:
            found.update(repr(item).encode())

    add(value)
    return found.hexdigest()[:16]


def measured() -> dict[str, str]:
    """The digest of every algorithm on every problem, and of blocks that advance together."""
    torch.set_num_threads(1)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fh.ConvergenceWarning)
        for algorithm, run in ALGORITHMS.items():
            for problem, A in operators().items():
                found[f"{algorithm}: {problem}"] = digest(run(A))
        blocks = fh.Hessian(*classifier()).blocks("layer")
        found["blocks: eigsh"] = digest(fh.eigsh(blocks, 2))
        found["blocks: spectrum"] = digest(fh.spectrum(blocks, 1, steps=10, rtol=0.2))
    return found


def main(action: str, path: str) -> int:
    """Record, or compare and print what differs."""
    now = measured()
    if action == "record":
        with open(path, "w") as file:
            json.dump(now, file, indent=1)
        print(f"{len(now)} digests recorded")
        return 0
    with open(path) as file:
        before = json.load(file)
    differing = [name for name in before | now if before.get(name) != now.get(name)]
    for name in differing:
        print(f"differs: {name}")
    print(f"{len(before) - len(differing)} of {len(before)} digests are equal")
    return int(bool(differing))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2]))
