"""The collectives that a plan names are those that a step makes, counted below the package."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from fasthessian.distributed import ranks as module
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.sharding import sharded_operator
from fasthessian.krylov.three_term import ThreeTerm
from fasthessian.planning.steps import KrylovSize

pytestmark = pytest.mark.distributed
ROWS = 5


def collectives_and_bytes(dtype, basis, sharded):
    """Of the sixth step: each collective with the bytes handed to it, n, and the local basis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).to(getattr(torch, dtype))
    x, y = torch.randn(24, 7, dtype=next(model.parameters()).dtype), torch.randint(5, (24,))
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    A = fh.Hessian(model, nn.CrossEntropyLoss(), (x[mine], y[mine]), group=dist.group.WORLD)
    options = {"seed": 0} if basis == "none" else {"seed": 0, "basis": basis}
    kind = ThreeTerm if basis == "none" else Lanczos
    run = kind(sharded_operator(A, sharded), 20, **options)
    calls = []

    def counting(name, original, position):
        def call(*args, **keywords):
            calls.append((name, args[position].nbytes))
            return original(*args, **keywords)

        return call

    with A._kept.run(), pytest.MonkeyPatch.context() as patch:
        for _ in range(ROWS):
            run.step()
        patch.setattr(module, "_gather", counting("all_gather", module._gather, 1))
        patch.setattr(module, "_scatter", counting("reduce_scatter", module._scatter, 1))
        patch.setattr(dist, "all_reduce", counting("all_reduce", dist.all_reduce, 0))
        run.step()
    stored = None if basis == "none" else run.state.basis.stored
    return calls, A.n, None if stored is None else stored.shape[1] * stored.element_size()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("basis", ["full", "compressed", "none"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_step_makes_the_collectives_that_are_planned(two, four, dtype, basis, sharded):
    for ranks in (two, four):
        for calls, n, row in ranks(collectives_and_bytes, dtype, basis, sharded):
            planned = KrylovSize(n, ranks.size, 20, 0, dtype, basis, sharded)
            assert calls == list(planned.collectives(ROWS))
            assert row is None or row == planned.row_bytes
