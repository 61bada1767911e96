"""The data of a problem, divided over ranks: the numbers of one process, in every form."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

from fasthessian.app import problems
from fasthessian.app.analysis import analyze
from fasthessian.app.division import digest, divided
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Problem, Settings, load
from fasthessian.distributed.ranks import ranks_of
from fasthessian.operators.loss.batches import samples

pytestmark = pytest.mark.distributed
SMALL = {"steps": 8, "top": 2, "bottom": 1, "trace_rtol": 0.5, "points": 3}


class Stream(IterableDataset):
    """Samples that have no index."""

    def __init__(self, x, y):
        self.samples = list(zip(x, y, strict=True))

    def __iter__(self):
        return iter(self.samples)


def pairs(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def loss_of_pair(model, batch):
    """A loss of (model, batch), for which a list of tensors may be several batches."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def coupled(outputs, targets):
    return nn.functional.cross_entropy(outputs - outputs.mean(0) ** 2, targets)


def problem(form):
    """26 samples in one of many forms, the same on all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(26, 4).double(), torch.randint(3, (26,))
    dataset = TensorDataset(x, y)
    criterion = {"coupled": coupled, "tensors of a pair": loss_of_pair}.get(form)
    data = {
        "batch": (x, y),
        "list of one": [(x, y)],
        "two": pairs(x, y, 15),
        "batches": pairs(x, y, 5),
        "tensors": [x, y],
        "tensors of a pair": [x, y],
        "coupled": (x, y),
        "uncuttable": [(x, y)],
        "loader": DataLoader(dataset, 4),
        "shuffled": DataLoader(dataset, 4, shuffle=True, generator=torch.Generator()),
        "stream": DataLoader(Stream(x, y), 4),
        "no batches": DataLoader(pairs(x, y, 7), batch_size=None),
    }[form]
    if form == "uncuttable":
        data[0] = (data[0][0].to_sparse(), data[0][1])
        model[0] = Sparse(model[0])
    return Problem("mine", model, criterion or nn.CrossEntropyLoss(), data, {})


class Sparse(nn.Module):
    """A linear layer of a sparse input, which cannot be cut."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.to_dense())


FORMS = {  # how two ranks divide the 26 samples
    "batch": ("batches cut into shares of samples", [13, 13]),
    "list of one": ("batches cut into shares of samples", [13, 13]),
    "two": ("whole batches, 2 in all", [15, 11]),
    "batches": ("whole batches, 6 in all", [15, 11]),
    "tensors": ("batches cut into shares of samples", [13, 13]),
    "tensors of a pair": ("all on rank 0: a list of tensors may be one batch or several", [26, 0]),
    "coupled": ("whole batches, 1 in all, which are not cut: microbatch", [26, 0]),
    "uncuttable": ("whole batches, 1 in all, which are not cut: microbatch must be", [26, 0]),
    "loader": ("whole batches of the DataLoader, 7 in all", [12, 14]),
    "shuffled": ("whole batches of the DataLoader, 7 in all", None),
    "stream": ("each rank takes one of every 2 batches of the loader", [14, 12]),
    "no batches": ("each rank takes one of every 2 batches of the loader", [14, 12]),
}


def quiet(title, at_most=None):
    return lambda done, total: None


def numbers(found):
    """All numbers of an analysis as one vector."""
    parts = [found.top.values, found.bottom.values, found.density.nodes, found.density.weights]
    parts += [found.landscape.losses, found.trace.samples]
    flat = [part.flatten().double() for part in parts]
    return torch.cat([*flat, torch.tensor([found.loss, found.gradient_norm, found.trace.value])])


def compared(form, options):
    """How far the numbers are from those of one process, and how the data were divided."""
    asked = AnalysisOptions(**{**SMALL, **options})
    found = analyze(problem(form), asked, quiet, dist.group.WORLD)
    whole = analyze(problem(form), dataclasses.replace(asked, sharded=None), quiet)
    assert whole.distribution is None
    distance = float((numbers(found) - numbers(whole)).abs().max())
    shared = found.distribution
    assert (shared.ranks, shared.backend) == (dist.get_world_size(), "gloo")
    return distance, shared.division, list(shared.terms), list(shared.batches), shared.sharded


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_one_process(two, form):
    words, terms = FORMS[form]
    for distance, division, found, *_ in two(compared, form, {}):
        assert distance < 1e-9
        assert division.startswith(words)
        assert found == terms if terms else sum(found) == 26


@pytest.mark.slow
def test_more_ranks_than_batches(three):
    """Shares are contiguous, so that a Fisher matrix draws the targets of one process."""
    for form, options in (("two", {"matrix": "fisher"}), ("batch", {"sharded": True})):
        for distance, division, terms, batches, sharded in three(compared, form, options):
            assert distance < 1e-9 and division == "batches cut into shares of samples"
            assert terms == [8, 9, 9] and sharded == ("sharded" in options)
            assert batches == ([1, 2, 1] if form == "two" else [1, 1, 1])


def test_in_training_mode_batches_are_not_cut(two):
    for distance, division, terms, *_ in two(compared, "batch", {"mode": "train"}):
        assert distance < 1e-9 and terms == [26, 0]
        assert division.endswith("not cut: in training mode their samples may be coupled")


def shares_of(form):
    """What this rank gets where the ranks have brought different data."""
    asked, ranks = problem("batch"), ranks_of(dist.group.WORLD)
    x, y = asked.data
    own = slice(0, 10) if ranks.rank == 0 else slice(10, None)
    if form == "sampler":
        dataset = TensorDataset(x, y)
        data = DataLoader(dataset, 3, sampler=DistributedSampler(dataset))
    elif form == "loader":
        data = DataLoader(TensorDataset(x[own], y[own]), 4)
    else:
        data = [(x[own], y[own])]
    given = Problem("mine", asked.model, asked.criterion, data, {})
    share, words = divided(given, AnalysisOptions(), ranks)
    return share.data is data, words, sum(map(samples, share.data))


@pytest.mark.parametrize("form", ["sampler", "loader", "memory"])
def test_different_data_are_shares_already(two, form):
    found = two(shares_of, form)
    assert all(kept for kept, *_ in found)
    expected = {
        "sampler": "each rank has a DistributedSampler",
        "loader": "each rank brings data of its own",
        "memory": "each rank brings data of its own",
    }
    assert {words for _, words, _ in found} == {expected[form]}
    assert [count for *_, count in found] == ([13, 13] if form == "sampler" else [10, 16])


class Counting(Dataset):
    """Counts how many samples are read."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 20

    def __getitem__(self, i):
        self.read += 1
        return torch.full((4,), float(i)).double(), i % 3


def read_by_one_pass():
    asked = problem("batch")
    loader = DataLoader(Counting(), 2, shuffle=True)
    given = Problem("mine", asked.model, asked.criterion, loader, {})
    share, _ = divided(given, AnalysisOptions(), ranks_of(dist.group.WORLD))
    before = loader.dataset.read
    seen = [{float(v) for v in torch.cat([x[:, 0] for x, _ in share.data])} for _ in range(2)]
    return [sorted(s) for s in seen], loader.dataset.read - before


def test_a_rank_reads_its_samples_of_a_shuffled_loader_alone(two):
    (first, read), (second, _) = two(read_by_one_pass)
    assert first[0] == first[1] and second[0] == second[1]  # the same in each pass
    assert sorted([*first[0], *second[0]]) == [float(i) for i in range(20)]
    assert read == 2 * len(first[0])


def test_a_digest_tells_batches_apart():
    x = torch.arange(6.0)
    different = [x, x.double(), x.view(2, 3), x + 1, [x, "a"], [x, "b"], (x, 1), (x, 2), None]
    assert len({digest(item) for item in different}) == len(different)
    assert digest({"x": x.bfloat16()}) == digest({"x": x.bfloat16()})
    assert digest(x.view(2, 3).t()) == digest(x.view(2, 3).t().clone())


def trained():
    """The parameters after a training that rounds in another way on the second rank."""
    ranks, original = ranks_of(dist.group.WORLD), problems.train

    def train(model, *args, **options):
        history = original(model, *args, **options)
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-6 * ranks.rank
        return history

    settings = Settings(epochs=1, train_images=100, samples=30)
    problems.train = train
    try:
        many = load("mlp-digits", settings, None, ranks).model.state_dict()
    finally:
        problems.train = original
    one = load("mlp-digits", settings).model.state_dict()
    return all(torch.equal(many[name], one[name]) for name in one)


def test_all_ranks_go_on_with_the_model_of_the_first_rank(two):
    assert two(trained) == [True, True]
