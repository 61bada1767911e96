import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasthessian.results import record
from fasthessian.study import weights
from fasthessian.study.data import ImageData
from fasthessian.study.networks import Network, Run
from fasthessian.study.recipes import RECIPES
from fasthessian.study.records import DIVERGED, TRAINED, UNTRAINED, Training
from fasthessian.study.training import train_run

RUN = Run(Network(8), 1, 0.1)
RECIPE = RECIPES["laptop"].changed(
    epochs=4, batch_size=8, width=2, drops=(2,), checkpoints=(0, 2, 4), train_images=20
)
WEIGHTS = ["epoch-000.safetensors", "epoch-002.safetensors", "epoch-004.safetensors"]
FILES = [*WEIGHTS, "state.safetensors", "training.json"]


def images(scale=1.0):
    """Two classes of 8x8 noise with a different mean; 24 to train and 6 to test."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(30) % 2
    x = torch.randn(30, 3, 8, 8, generator=generator) + scale * (2 * y - 1).reshape(-1, 1, 1, 1)
    return ImageData(x[:24], y[:24], x[24:], y[24:], 2, "noise")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a training that nobody stopped, and its record."""
    folder = tmp_path_factory.mktemp("whole") / "runs" / RUN.name
    return folder, train_run(RUN, RECIPE, images(), folder)


def same(folder, whole, found):
    """Assert that weights, state and record of two trainings have the same bits."""
    assert sorted(path.name for path in folder.glob("[!.]*")) == FILES
    for name in WEIGHTS:
        assert (folder / name).read_bytes() == (whole[0] / name).read_bytes(), name
    states = [weights.read(path / "state.safetensors")[0] for path in (folder, whole[0])]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    records = [{**each.to_json(), "seconds": 0} for each in (found, whole[1])]
    assert records[0] == records[1]


def kill_at_the_second_state(folder):
    """Train until the second state is in its temporary file; the process then kills itself."""
    replace = os.replace
    states = []

    def killing(source, target):
        states.extend([target] if "state" in str(target) else [])
        if len(states) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killing
    train_run(RUN, RECIPE, images(), folder)


def test_killed_and_started_again_has_the_same_weights_to_the_bit(tmp_path, whole):
    root = Path(__file__).parents[2]
    code = (
        "import sys; from tests.study import test_train_run as here; "
        "here.kill_at_the_second_state(sys.argv[1])"
    )
    call = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert call.returncode == -signal.SIGKILL
    _, about = weights.read(tmp_path / "state.safetensors")
    assert about["settings"]["run"] == RUN.name
    state, _ = weights.read(tmp_path / "state.safetensors")
    assert len(state["history"]) == 1 and not (tmp_path / "training.json").exists()
    same(tmp_path, whole, train_run(RUN, RECIPE, images(), tmp_path))


def test_a_full_disk_at_any_write_loses_nothing(tmp_path, whole, monkeypatch):
    replace, written, failed = os.replace, [], set()

    def full_once(source, target):
        write = Path(target).name, written.count(Path(target).name)
        if write not in failed:
            failed.add(write)
            raise OSError(28, "No space left on device")
        written.append(write[0])
        replace(source, target)

    monkeypatch.setattr(record.os, "replace", full_once)
    for _ in range(12):
        with contextlib.suppress(OSError):
            found = train_run(RUN, RECIPE, images(), tmp_path)
        assert not list(tmp_path.glob(".*"))  # no temporary file is left
    assert {(name, 0) for name in FILES} | {("state.safetensors", 3)} <= failed
    same(tmp_path, whole, found)


def test_a_training_that_ended_is_only_read(whole, monkeypatch):
    monkeypatch.setattr(record.os, "replace", None)
    before = {name: (whole[0] / name).stat().st_mtime_ns for name in FILES}
    again = train_run(RUN, RECIPE, images(), whole[0])
    assert again.to_json() == whole[1].to_json()
    assert before == {name: (whole[0] / name).stat().st_mtime_ns for name in FILES}


def test_the_record_says_what_happened_in_each_epoch(whole):
    folder, found = whole
    assert found.to_json() == json.loads((folder / "training.json").read_text())
    assert found.run == RUN and found.status == TRAINED
    assert found.rates.tolist() == [0.1, 0.1, 0.01, 0.01]
    assert found.train_accuracy[-1].item() == 19 / 20  # of 20 images, while the weights change
    model = RUN.network.make(2, 2)
    weights.load(folder / WEIGHTS[-1], model)
    with torch.no_grad():
        x, y = images().test_x, images().test_y
        logits = model.eval()(x)
        norm = sum(p.double().square().sum() for p in model.parameters()).sqrt()
    assert found.test_loss[-1].item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5
    )
    assert found.test_accuracy[-1] == (logits.argmax(1) == y).double().mean()
    assert found.weight_norm[-1].item() == pytest.approx(norm.item(), rel=1e-12)


def test_weights_before_training_are_those_of_the_seed(whole):
    before = torch.get_rng_state()
    torch.manual_seed(RUN.seed)
    expected = RUN.network.make(2, 2)
    torch.manual_seed(5)
    model = RUN.network.make(2, 2)
    weights.load(whole[0] / WEIGHTS[0], model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    torch.set_rng_state(before)


def test_the_global_generator_and_cudnn_are_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    state = torch.get_rng_state()
    train_run(RUN, RECIPE.changed(epochs=1), images(), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.backends.cudnn.deterministic


def test_one_step_is_that_of_sgd_with_weight_decay(tmp_path):
    recipe = RECIPE.changed(epochs=1, batch_size=20, checkpoints=(0, 1), augment=False)
    train_run(RUN, recipe, images(), tmp_path)
    model, expected = RUN.network.make(2, 2), RUN.network.make(2, 2)
    weights.load(tmp_path / "epoch-000.safetensors", model)
    weights.load(tmp_path / "epoch-001.safetensors", expected)
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:20]
    logits = model.train()(images().train_x[chosen])
    torch.nn.functional.cross_entropy(logits, images().train_y[chosen]).backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        step = p - 0.1 * (p.grad + 5e-4 * p)  # gradients differ by rounding, about 1e-6
        assert torch.allclose(step, q, rtol=0, atol=2e-6)


def test_a_diverged_training_is_recorded_and_does_not_raise(tmp_path):
    run = Run(Network(8, "no-bn"), 0, 1e4)
    found = train_run(run, RECIPE, images(), tmp_path)
    assert found.status == DIVERGED and len(found.train_loss) < RECIPE.epochs
    assert found.train_loss[-1].isnan() and found.test_accuracy[-1].isnan()
    text = (tmp_path / "training.json").read_text()
    assert "NaN" not in text and Training.from_json(json.loads(text)).status == DIVERGED
    for path in tmp_path.glob("*.safetensors"):
        tensors, _ = weights.read(path)
        assert all(torch.isfinite(t).all() for n, t in tensors.items() if n != "history"), path


def test_a_network_that_does_not_train_is_recorded_as_such(tmp_path):
    found = train_run(Run(Network(8), 0, 1e-9), RECIPE.changed(epochs=1), images(0), tmp_path)
    assert found.status == UNTRAINED and found.train_accuracy[-1] < 0.75


def test_other_settings_are_refused_and_another_folder_works(tmp_path, whole):
    other = RECIPE.changed(batch_size=10, augment=False)
    with pytest.raises(ValueError, match="batch_size=8, augment=True, not batch_size=10") as info:
        train_run(RUN, other, images(), whole[0])
    assert "\n" not in str(info.value) and "epochs" not in str(info.value)
    with pytest.raises(ValueError, match=r"data='.*', not data='"):
        train_run(RUN, RECIPE, images(scale=2.0), whole[0])
    with pytest.raises(ValueError, match=r"lr0\.1', not run='resnet8-seed1-lr0\.2'"):
        train_run(Run(RUN.network, 1, 0.2), RECIPE, images(), whole[0])
    train_run(RUN, RECIPE, images(), whole[0])
    train_run(RUN, other.changed(epochs=1), images(), tmp_path)


def test_a_number_of_the_analysis_may_change(whole):
    other = RECIPE.changed(points=5, images=10, steps=3)
    assert train_run(RUN, other, images(), whole[0]).to_json() == whole[1].to_json()


def test_progress_counts_the_steps_of_the_whole_training_also_after_a_stop(tmp_path):
    class Stop(Exception):
        pass

    calls = []

    def stop(done, total):
        calls.append((done, total))
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        train_run(RUN, RECIPE, images(), tmp_path, stop)
    train_run(RUN, RECIPE, images(), tmp_path, lambda *call: calls.append(call))
    assert calls == [(step, 12) for step in [1, 2, 3, 4, *range(4, 13)]]


def test_more_images_than_the_data_has_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="train_images=25 is above the 24 training images"):
        train_run(RUN, RECIPE.changed(train_images=25), images(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
