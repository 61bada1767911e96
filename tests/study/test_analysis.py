import copy
import dataclasses

import pytest
import torch
from torch.nn import functional as F

import fasthessian as fh
from fasthessian.study import analysis
from fasthessian.study.analysis import GROUPS, batches, measure, of_sum, shared, surface
from fasthessian.study.data import ImageData
from fasthessian.study.networks import Network, Run
from fasthessian.study.recipes import RECIPES

RECIPE = dataclasses.replace(
    RECIPES["laptop"], images=14, spectrum_images=10, analysis_batch=6, top=2, steps=14, points=3,
    width=1,
)  # fmt: skip
CASES = [("no-bn-stage3", "eval"), ("resnet", "train")]


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, 8, 8, generator=generator)
    y = torch.arange(20) % 3
    return ImageData(x, y, x[:2], y[:2], 3, "random")


def network(variant):
    torch.manual_seed(4)
    model = Network(8, variant).make(3, RECIPE.width)
    for name, buffer in model.named_buffers():  # running statistics that differ from a batch's
        if name.endswith("running_var"):
            buffer.mul_(0.8)
    return model.train(), Run(Network(8, variant), 3, 0.1)


def exact(model, parts, mode):
    """The loss in float64 as a function of all parameters (n,), these, and the accuracy."""
    model = copy.deepcopy(model).double().train(mode == "train")
    parts = [(x.double(), y) for x, y in parts]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def logits(theta, x):
        values = (v.view(s) for v, s in zip(theta.split(sizes), shapes.values(), strict=True))
        state = dict(zip(shapes, values, strict=True))
        state |= {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(model, state, x)

    count = sum(len(y) for _, y in parts)

    def loss(theta):
        return sum(F.cross_entropy(logits(theta, x), y, reduction="sum") for x, y in parts) / count

    right = sum(int((logits(theta, x).argmax(1) == y).sum()) for x, y in parts)
    return loss, theta, right / count


def dense(loss, theta):
    return torch.autograd.functional.hessian(loss, theta, vectorize=True)


@pytest.mark.parametrize(("variant", "mode"), CASES)
def test_a_measurement_agrees_with_the_dense_hessians(variant, mode):
    model, run = network(variant)
    before = copy.deepcopy(model.state_dict())
    every, some = (batches(data(), n, RECIPE, model) for n in (14, 10))
    loss, theta, accuracy = exact(model, every, mode)
    calls, start = [], torch.sin(torch.arange(2.0 * len(theta))).view(2, -1)
    found, vectors = measure(
        run, 5, mode, model, data(), RECIPE, start, progress=lambda *call: calls.append(call)
    )
    g = torch.autograd.functional.jacobian(loss, theta)
    H = dense(loss, theta)
    shapes = model.named_parameters()
    stages = [name.split(".")[0].split("_")[0] for name, p in shapes for _ in range(p.numel())]
    assert (found.run, found.epoch, found.mode) == (run, 5, mode)
    assert (found.images, found.spectrum_images) == (14, 10)
    assert found.loss == pytest.approx(float(loss(theta)), rel=1e-5)
    assert found.accuracy == accuracy
    assert found.weight_norm == pytest.approx(float(theta.norm()), rel=1e-6)
    assert found.gradient_norm == pytest.approx(float(g.norm()), rel=1e-4)
    assert found.trace_interval[0] < float(H.trace()) < found.trace_interval[1]
    assert found.stages == ("stem", "stage1", "stage2", "stage3", "head")
    for i, name in enumerate(found.stages):
        at = torch.tensor([stage == name for stage in stages])
        assert int(found.stage_sizes[i]) == int(at.sum())
        middle = float(found.stage_low[i] + found.stage_high[i]) / 2
        half = float(found.stage_high[i] - found.stage_low[i]) / 2
        assert middle == pytest.approx(float(found.stage_traces[i]), abs=1e-6 * half)
        assert abs(middle - float(H.diagonal()[at].sum())) < 2 * half
    H = dense(*exact(model, some, mode)[:2])
    values = torch.linalg.eigvalsh(H).flip(0)
    assert found.converged
    torch.testing.assert_close(found.top, values[:2], rtol=1e-3, atol=0)
    residuals = (vectors.double() @ H - found.top[:, None] * vectors.double()).norm(dim=1)
    assert (residuals < 2e-3 * found.top).all()
    B = fh.Hessian(model, torch.nn.CrossEntropyLoss(), some, mode=mode)
    assert torch.equal(vectors, fh.eigsh(B, 2, "LA", start=start, seed=run.seed).vectors)
    assert float(found.weights.sum()) == pytest.approx(1)
    assert float(found.nodes.max()) == pytest.approx(float(values[0]), rel=1e-2)
    assert len(found.nodes) == RECIPE.steps and found.matvecs > RECIPE.steps
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    assert len({total for _, total in calls}) == 1 and len(calls) > found.matvecs
    assert model.training and all(
        torch.equal(x, before[name]) for name, x in model.state_dict().items()
    )


def test_the_trace_of_the_whole_is_the_sum_of_its_stages():
    model, run = network("no-bn-stage3")
    found, _ = measure(run, 5, "eval", model, data(), RECIPE)
    halves = (found.stage_high - found.stage_low) / 2
    low, high = found.trace_interval
    assert found.trace == pytest.approx(float(found.stage_traces.sum()), rel=1e-12)
    assert (high - low) / 2 == pytest.approx(float(halves.norm()), rel=1e-9)
    assert (high + low) / 2 == pytest.approx(found.trace, rel=1e-9)


def test_with_running_statistics_batches_are_split_for_the_traces(monkeypatch):
    recipe = dataclasses.replace(RECIPE, images=20, analysis_batch=10)
    asked = {}

    def trace(blocks, **options):
        asked[mode] = {block._batches().total for block in blocks.values()}, options
        return fh.trace(blocks, **options)

    monkeypatch.setattr(analysis, "trace", trace)
    for mode in ("eval", "train"):
        model, run = network("resnet")
        measure(run, 5, mode, model, data(), recipe)
    assert asked["eval"][0] == {6} and asked["train"][0] == {2}  # 4 + 4 + 2 images, and 10
    assert asked["eval"][1]["max_matvecs"] == 6 and asked["train"][1]["max_matvecs"] == 16
    assert {options["sampling"] for _, options in asked.values()} == {"per-batch"}
    assert shared(50000, "eval", RECIPES["paper"]) == 97
    assert shared(10**6, "eval", RECIPES["paper"]) == RECIPES["paper"].analysis_batch


@pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
def test_the_interval_of_a_sum_covers_it():
    """Coverage over 300 seeds; stages of three layers, whose blocks have elements between them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 7), torch.nn.Tanh(),
        torch.nn.Linear(7, 4),
    ).double()  # fmt: skip
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 4
    parts = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 40, 2)]
    A = fh.Hessian(model, torch.nn.CrossEntropyLoss(), parts)
    exact = sum(float(A @ e @ e) for e in torch.eye(A.n, dtype=torch.float64))
    covered = 0
    for seed in range(300):
        found = fh.trace(
            A.blocks({"0": "^0", "2": "^2", "4": "^4"}), sampling="per-batch", max_matvecs=1,
            rtol=1e-9, seed=seed, method="hutchinson",
        )  # fmt: skip
        low, high = of_sum(found.values())[1]
        covered += low < exact < high
    assert 276 <= covered <= 296  # 95 % of 300, and 2.3 standard deviations of it


def test_all_networks_see_the_same_images_of_the_training():
    model, _ = network("resnet")
    few, most = (batches(data(), n, RECIPE, model) for n in (7, None))
    trained = dataclasses.replace(RECIPE, train_images=9)
    of_training = torch.cat([x for x, _ in batches(data(), None, trained, model)])
    assert [len(y) for _, y in few] == [6, 1] and sum(len(y) for _, y in most) == 20
    x = torch.cat([x for x, _ in most])
    assert torch.equal(torch.cat([x for x, _ in few]), x[:7]) and torch.equal(of_training, x[:9])
    with pytest.raises(ValueError, match=r"21 is not in 1\.\.20"):
        batches(data(), 21, RECIPE, model)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_landscape_is_the_loss_of_the_spectrums_images(mode):
    model, _ = network("resnet")
    n = sum(p.numel() for p in model.parameters())
    vectors = torch.linalg.qr(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)))[0].T
    found = surface(model, mode, data(), RECIPE, vectors.contiguous())
    loss, theta, *_ = exact(model, batches(data(), 10, RECIPE, model), mode)
    assert found.alphas.tolist() == found.betas.tolist() == [-RECIPE.span, 0, RECIPE.span]
    for i, j in ((1, 1), (2, 1), (0, 2)):
        at = theta + float(found.alphas[i]) * vectors[0] + float(found.betas[j]) * vectors[1]
        assert float(found.losses[i, j]) == pytest.approx(float(loss(at)), rel=1e-5)


def test_every_parameter_belongs_to_one_stage():
    for variant in ("resnet", "no-bn", "no-res"):
        model, _ = network(variant)
        for name, _ in model.named_parameters():
            assert sum(name.startswith(stage) for stage in GROUPS) == 1
