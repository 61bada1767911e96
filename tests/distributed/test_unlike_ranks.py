"""What one rank alone finds: errors, NaN, coupled batches. All ranks then say or do the same."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from fasthessian.distributed import Ranks
from fasthessian.operators import curvature
from tests.support.detached import made

pytestmark = pytest.mark.distributed


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def failure(call):
    """The error of a call as one line."""
    try:
        call()
    except Silent:
        return "Silent"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3, bias=False)


def batches(count=3):
    torch.manual_seed(dist.get_rank())
    return [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(count)]


class Surprise(nn.CrossEntropyLoss):
    """Raises on rank 1 as soon as ``error`` is set."""

    error = None

    def forward(self, z, y):
        if Surprise.error is not None and dist.get_rank() == 1:
            raise Surprise.error
        return super().forward(z, y)


def raising(error, graph):
    """What the ranks say if the loss raises on rank 1, and whether the next product is right."""
    data, model = batches(), linear()
    A = fh.Hessian(model, Surprise(), data, group=dist.group.WORLD, engine=graph)
    v = torch.ones(A.n)
    before = A @ v
    Surprise.error = error
    said = failure(lambda: A @ v)
    Surprise.error = None
    return said, bool((A @ v == before).all())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a target\nis missing"), "ValueError: a target is missing"),
        (Silent(), "Silent"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_an_error_of_one_rank_in_a_product_is_raised_on_all(three, error, words):
    found = three(raising, error, "recompute")
    assert [said for said, _ in found][::2] == [f"UnsupportedError: rank 1 failed: {words}"] * 2
    assert found[1][0].partition(":")[0] == type(error).__name__
    assert all(same for _, same in found)


def misused(case):
    """What the ranks say if rank 2 calls with another argument."""
    data, odd = batches(), dist.get_rank() == 2
    if case == "engine":
        options = {"engine": "fast" if odd else "auto"}
    elif case == "iterator":
        options, data = {}, iter(data) if odd else data
    elif case == "empty":
        options, data = {}, []
    elif case == "criterion":
        options = {}
    criterion = "CE" if case == "criterion" else nn.CrossEntropyLoss()
    return failure(lambda: fh.Hessian(linear(), criterion, data, group=dist.group.WORLD, **options))


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("engine", "engine must be one of auto, retained, "),
        ("iterator", "data is a list_iterator, which can be read only once; pass list(data)"),
    ],
)
def test_a_wrong_argument_of_one_rank_is_named_on_all(three, case, line):
    *others, own = three(misused, case)
    assert others == [others[0]] * 2
    assert others[0].startswith(f"UnsupportedError: rank 2 failed: {line}")
    assert line in own


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("criterion", "InputTypeError: criterion must be callable or None, got str"),
        ("empty", "InputError: no term of the loss counts"),
    ],
)
def test_an_error_of_all_ranks_is_raised_as_it_is(three, case, line):
    for said in three(misused, case):
        assert said.startswith(line) or "or no rank has a batch" in said


def with_nan(kind):
    """Batch 2 of rank 1 gives NaN: in products, or already in the loss."""
    data = batches()
    if dist.get_rank() == 1:
        data[2][0].fill_(0.0 if kind == "product" else torch.nan)
    model = linear()
    loss = {"product": lambda z, y: z.abs().pow(1.5).mean(), "loss": nn.CrossEntropyLoss()}[kind]
    A = fh.Hessian(model, loss, data, group=dist.group.WORLD, weights=lambda batch: len(batch[0]))
    said = [failure(lambda: A @ torch.ones(A.n)), failure(lambda: fh.eigsh(A, 1))]
    if kind == "loss":
        said.append(failure(A.gradient))
        assert A.loss() != A.loss()  # NaN, as in one process
    return said


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("product", "Hessian(n=12, dtype=torch.float32, device=cpu, matvecs=0) returned NaN for "
                    "batch 2 of data"),
        ("loss", "the loss is nan (batch 2 of data); check the parameters, the inputs and the "
                 "targets"),
    ],
)  # fmt: skip
def test_nan_is_named_with_its_rank_and_batch(three, kind, line):
    for rank, said in enumerate(three(with_nan, kind)):
        kinds = "InputError" if rank == 1 else "UnsupportedError"
        for each in said:
            assert each == f"{kinds}: rank 1 failed: {line}"


def coupled_on_rank_1():
    """The row "weights" of the check, for a loss that couples the samples of a batch of rank 1."""
    torch.manual_seed(0)
    model, rank = linear().double(), dist.get_rank()
    data = [(torch.randn(6, 4).double(), torch.full((6,), int(rank == 1 and i))) for i in range(2)]

    def loss(z, y):
        return z.mean(0).square().sum() if y.any() else z.square().sum(1).mean()

    A = fh.Hessian(model, loss, data, group=dist.group.WORLD, weights=lambda batch: 6.0)
    found = A.check()
    return found.ok, found.weights, found.report


def test_the_check_names_the_rank_with_coupled_samples(three):
    found = three(coupled_on_rank_1)
    assert found == [found[0]] * 3
    ok, weights, report = found[0]
    assert not ok and weights > 0.1
    assert "batch 1 of rank 1 is not the mean of its parts" in report
    assert report.count("ok") == 4


def with_kinks():
    """The check compares with forward mode, which only some of the ranks have data for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.zeros(8, 4).double()  # all units are at their kink for one of the batches
    data = [(x + 1e-9, torch.randint(3, (8,)))] if dist.get_rank() else []
    with torch.no_grad():
        model[0].bias.zero_()
    A = fh.Hessian(model, nn.CrossEntropyLoss(), data, group=dist.group.WORLD)
    return A.check().report


def test_the_check_sums_forward_mode_over_the_ranks(three):
    reports = three(with_kinks)
    assert reports == [reports[0]] * 3
    assert "kinks: forward mode agrees to" in reports[0]


def own_mode(blind):
    """A model that detaches in eval mode; rank 2 has no data, and rank 1 does not notice."""
    original = curvature.prepare
    model, criterion, batch = made("gate", always=False)
    whole = fh.Hessian(made("gate", always=True)[0], criterion, batch)
    if blind and dist.get_rank() == 1:

        def prepare(A):
            words = original(A)
            A._evaluation.mode = "eval"
            A._kept.forget()
            return words.partition(";")[0]

        curvature.prepare = prepare
    try:
        data = batch if dist.get_rank() < 2 else []
        A = fh.Hessian(model, criterion, data, group=dist.group.WORLD)
    finally:
        curvature.prepare = original
    v = torch.ones(A.n, dtype=A.dtype)
    error = float((A @ v - whole @ v).norm() / (whole @ v).norm())
    return A._evaluation.mode, "own modules have the flags of training" in A.engine, error


@pytest.mark.parametrize("blind", [False, True])
def test_all_ranks_take_the_mode_that_one_needs(three, blind):
    for mode, said, error in three(own_mode, blind):
        assert mode == "own" and said and error < 1e-12


class Moody(nn.Module):
    """Detaches a part of its output in eval mode; with large inputs training changes the output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        z = self.layer(x)
        slow = z if self.training else z.detach()
        return (z + slow) * (2.0 if self.training and bool((x > 9).any()) else 1.0)


def moody():
    torch.manual_seed(0)
    model, x = Moody().double(), torch.randn(5, 4).double()
    x[0, 0] += 10 * (dist.get_rank() == 1)
    data, criterion = (x, torch.tensor([0, 1, 2, 0, 1])), nn.CrossEntropyLoss()
    group = dist.group.WORLD
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 1 is warned of the detached part
        said = failure(lambda: fh.Hessian(model, criterion, data, group=group))
    return said, fh.Hessian(model, criterion, data, group=group, mode="train").check().ok


def test_a_loss_that_is_another_one_in_the_mode_of_other_ranks_is_refused(three):
    for rank, (said, ok) in enumerate(three(moody)):
        assert said.startswith("UnsupportedError: rank 1 failed: the loss of a batch is ")
        assert said.endswith("detach a part of the loss in eval mode; use mode='train'")
        assert ok, rank


def of_groups():
    """Overlapping groups, a group of one, limits of time, and a group that is destroyed."""
    rank, data, criterion = dist.get_rank(), batches(), nn.CrossEntropyLoss()
    left, right = dist.new_group([0, 1]), dist.new_group([1, 2])
    alone = [dist.new_group([r]) for r in range(3)][rank]
    values = []
    for group, members in ((left, (0, 1)), (right, (1, 2)), (alone, (rank,))):
        if rank in members:
            A = fh.Hessian(linear(), criterion, data, group=Ranks(group, timeout=20.0))
            values.append(fh.eigsh(A, 1).values.tolist())
    said, outside = "", right if rank == 0 else left
    if rank != 1:
        said = failure(lambda: fh.Hessian(linear(), criterion, data, group=outside))
    A = fh.Hessian(linear(), criterion, data, group=alone)
    dist.destroy_process_group(alone)
    return values, said, failure(lambda: A @ torch.ones(A.n))


def test_groups_may_overlap_or_have_one_rank_and_a_destroyed_one_is_refused(three):
    found = three(of_groups)
    assert found[0][0][0] == found[1][0][0] and found[1][0][1] == found[2][0][0]
    assert len({str(each) for values, *_ in found for each in values}) == 5
    for rank, (_, outside, destroyed) in enumerate(found):
        assert rank == 1 or outside.startswith("InputError: group must hold this rank")
        assert destroyed.startswith("UnsupportedError: group was destroyed after the operator was")
