"""Ranks that differ in model, options or versions are named in one line, on all ranks."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fasthessian as fh
from fasthessian.operators import common

pytestmark = pytest.mark.distributed


def net(**changed):
    """A model, its criterion and a batch."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, changed.get("out", 3))]
    return nn.Sequential(*layers).to(changed.get("dtype", torch.float32))


def build(model, criterion=None, make=fh.Hessian, **options):
    dtype = next(model.parameters()).dtype
    batch = torch.randn(6, 4, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2])
    criterion = criterion or nn.CrossEntropyLoss()
    return make(model, criterion, batch, group=dist.group.WORLD, **options)


def of_weights(model):
    with torch.no_grad():
        model[2].weight[1, 2] += 1e-6
        model[2].bias.zero_()
    build(model)


def of_statistics(model):
    model[1].running_mean[3] = 0.5
    build(model)


def of_names(model):
    build(nn.Sequential(*model, nn.Identity()).append(nn.Linear(3, 3)))


def of_versions(model):
    before, common.__version__ = common.__version__, "0.0.1"
    try:
        build(model)
    finally:
        common.__version__ = before


# what one rank does while the others call ``build(net())``, and how the line begins
DIFFERENT = {
    "values": (of_weights, "values of parameter 2.weight", ""),
    "buffers": (of_statistics, "values of buffer 1.running_mean", ""),
    "names": (of_names, "number of parameters", "6 on ranks 0 and 2, 8 on rank 1"),
    "shapes": (lambda model: build(net(out=4)), "parameter 4",
               "2.weight (3, 5) torch.float32 on ranks 0 and 2, 2.weight (4, 5)"),
    "dtype": (lambda model: build(net(dtype=torch.float64)), "parameter 0",
              "0.weight (5, 4) torch.float32 on ranks 0 and 2, 0.weight (5, 4) torch.float64"),
    "class": (lambda model: build(model, make=fh.GaussNewton), "operator",
              "Hessian on ranks 0 and 2, GaussNewton on rank 1"),
    "engine": (lambda model: build(model, engine="recompute"), "engine",
               "'auto' on ranks 0 and 2, 'recompute' on rank 1"),
    "decay": (lambda model: build(model, weight_decay=0.1), "weight_decay",
              "0.0 on ranks 0 and 2, 0.1 on rank 1"),
    "criterion": (lambda model: build(model, nn.CrossEntropyLoss(label_smoothing=0.1)),
                  "criterion", "CrossEntropyLoss(ignore_index=-100, label_smoothing=0.0, "),
    "version": (of_versions, "version of fasthessian", f"{fh.__version__} on ranks 0 and 2"),
}  # fmt: skip


def message(case):
    """The error of this rank if rank 1 differs. The same call on all ranks then works."""
    model, line = net(), "no error"
    try:
        DIFFERENT[case][0](model) if dist.get_rank() == 1 else build(model)
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
    build(net())
    return line


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_rank_that_differs_is_named_on_all_ranks(three, case):
    _, name, values = DIFFERENT[case]
    lines = set(three(message, case))
    assert len(lines) == 1
    (line,) = lines
    if values:
        assert line.startswith(
            f"InputError: group needs the same {name} on all ranks, got {values}"
        )
        assert line.endswith("; make the same call with the same model and versions on all ranks")
    else:
        assert line.startswith(
            f"InputError: group needs the same {name} on all ranks, but those of rank 1 differ "
            f"from those of ranks 0 and 2; copy those of rank 0: torch.distributed.broadcast("
        )


def follow():
    """The advice: the tensors of rank 0 are copied; then the ranks have the same matrix."""
    model = net()
    with torch.no_grad():
        model[2].weight += dist.get_rank()
        model[1].running_mean += dist.get_rank()
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, 0)
    return fh.eigsh(build(model), 1).values.tolist()


def test_the_tensors_of_rank_0_can_be_copied(three):
    first, *others = three(follow)
    assert others == [first, first]


def trained():
    """What an algorithm says if a rank was trained on after its operator was built."""
    model = net()
    A = build(model)
    fh.density(A, steps=2, probes=1)
    if dist.get_rank() == 2:
        with torch.no_grad():
            model[0].bias.add_(1e-3)
    try:
        fh.eigsh(A, 1)
    except ValueError as error:
        return str(error)


def test_values_are_compared_again_when_an_algorithm_starts(three):
    for line in three(trained):
        assert line.startswith(
            "group needs the same values of parameter 0.bias on all ranks, but those of rank 2 "
        )


def other_seed():
    """What an algorithm says if rank 1 passes another seed."""
    A = build(net())
    try:
        fh.eigsh(A, 1, seed=int(dist.get_rank() == 1))
    except ValueError as error:
        return str(error)


def test_an_algorithm_needs_the_same_arguments_on_all_ranks(three):
    for line in three(other_seed):
        assert line == (
            "group needs the same seed of eigsh on all ranks, got 0 on ranks 0 and 2, 1 on rank 1; "
            "make the same call with the same model and versions on all ranks"
        )


def statistics_in_training():
    """In training mode the statistics of the batch serve, and those of the ranks may differ."""
    model = net()
    model[1].running_mean += dist.get_rank()
    return build(model, mode="train").n


def test_statistics_may_differ_in_training_mode(three):
    assert three(statistics_in_training) == [53] * 3


def with_other_instructions():
    original = torch.backends.cpu.get_cpu_capability
    torch.backends.cpu.get_cpu_capability = lambda: ("AVX2", "AVX512")[dist.get_rank() % 2]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build(net())
    finally:
        torch.backends.cpu.get_cpu_capability = original
    return [str(warning.message) for warning in caught]


def test_other_vector_instructions_are_warned_of(three):
    for found in three(with_other_instructions):
        assert found == [
            "the CPUs of the ranks have different vector instructions (AVX2 on ranks 0 and 2, "
            "AVX512 on rank 1): rounding may differ between ranks"
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_a_checksum_sees_each_number_and_its_position(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (7, 11), generator=generator).to(dtype)
    x[2, 3], x[5, 9] = 1, 0
    before = int(common._checksum(x))
    assert int(common._checksum(x.clone())) == before
    assert int(common._checksum(x.t().contiguous().t())) == before
    x[2, 3], x[5, 9] = 0, 1
    assert int(common._checksum(x)) != before


def test_a_checksum_does_not_depend_on_the_chunks(monkeypatch):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = int(common._checksum(x))
    monkeypatch.setattr(common, "CHUNK", 64)
    assert int(common._checksum(x)) == whole
