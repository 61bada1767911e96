import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fasthessian.study.data import cifar, digits
from fasthessian.study.sgd import evaluate, train
from tests.support.cifar_files import TEN, binary10, images, needs_digits


def python10(folder, protocol):
    made = {}
    for seed, name in enumerate(TEN):
        pixels, labels = images(2, seed), [seed, 9 - seed]
        content = {b"data": pixels, b"labels": labels, b"batch_label": b"part"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
        made[name] = pixels, labels
    return made


def bytes_back(x):
    """Undo the normalisation of CIFAR-10."""
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)
    std = torch.tensor([0.2470, 0.2435, 0.2616]).reshape(3, 1, 1)
    return ((x * std + mean) * 255).round().to(torch.uint8).reshape(len(x), -1).numpy()


def one_line(folder, *words):
    with pytest.raises(ValueError) as info:
        cifar(folder)
    text = str(info.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_binary_ten(tmp_path):
    made = binary10(tmp_path)
    data = cifar(tmp_path)
    assert (data.name, data.classes) == ("CIFAR-10", 10)
    assert data.train_x.shape == (9, 3, 32, 32) and data.train_x.dtype == torch.float32
    assert np.array_equal(bytes_back(data.train_x), np.concatenate([made[n][0] for n in TEN[:5]]))
    assert data.train_y.tolist() == [y for n in TEN[:5] for y in made[n][1]]
    assert np.array_equal(bytes_back(data.test_x), made["test_batch"][0])
    assert data.test_y.dtype == torch.int64


def test_planes_are_red_green_blue_in_rows(tmp_path):
    binary10(tmp_path)
    record = np.zeros(3073, dtype=np.uint8)
    record[1 + 1024 + 32 * 3 + 5] = 255  # green, row 3, column 5
    (tmp_path / "test_batch.bin").write_bytes(record.tobytes())
    pixels = bytes_back(cifar(tmp_path).test_x).reshape(3, 32, 32)
    assert np.argwhere(pixels).tolist() == [[1, 3, 5]]


def test_binary_hundred_takes_the_fine_label(tmp_path):
    for name, count in (("train", 3), ("test", 2)):
        coarse, fine = np.full(count, 7, np.uint8), 97 + np.arange(count, dtype=np.uint8)
        (tmp_path / f"{name}.bin").write_bytes(np.c_[coarse, fine, images(count, 0)].tobytes())
    data = cifar(tmp_path)
    assert (data.name, data.classes) == ("CIFAR-100", 100)
    assert data.train_y.tolist() == [97, 98, 99]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_python_ten(tmp_path, protocol):
    made = python10(tmp_path, protocol)
    data = cifar(tmp_path)
    assert data.classes == 10
    assert np.array_equal(bytes_back(data.train_x), np.concatenate([made[n][0] for n in TEN[:5]]))
    assert data.test_y.tolist() == made["test_batch"][1]


def test_python_hundred(tmp_path):
    for name in ("train", "test"):
        content = {"data": images(2, 0), "fine_labels": [99, 0], "coarse_labels": [1, 2]}
        (tmp_path / name).write_bytes(pickle.dumps(content))
    assert cifar(tmp_path).train_y.tolist() == [99, 0]


def test_python_two_pickle_of_the_official_archive(tmp_path):
    """Python 2's cPickle, protocol 2: raw byte strings and the old module of _reconstruct."""
    python10(tmp_path, 2)
    pixels = images(1, 5).tobytes()
    stream = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff"
        b"\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(pixels).to_bytes(4, "little")
        + pixels
        + b"tbU\x06labels]K\x06au."
    )
    (tmp_path / "test_batch").write_bytes(stream)
    data = cifar(tmp_path)
    assert bytes_back(data.test_x).tobytes() == pixels
    assert data.test_y.tolist() == [6]


def test_a_file_cut_short(tmp_path):
    binary10(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    one_line(tmp_path, "data_batch_3.bin", "3072 bytes", "3073", "cut short")
    path.write_bytes(b"")
    one_line(tmp_path, "data_batch_3.bin", "0 bytes")


def test_a_missing_file_or_folder(tmp_path):
    one_line(tmp_path, "no CIFAR file", "data_batch_1.bin")
    binary10(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    one_line(tmp_path, "lacks data_batch_2.bin, test_batch.bin")
    one_line(tmp_path / "absent", "absent is not a folder")


def test_labels_out_of_range(tmp_path):
    binary10(tmp_path)
    record = np.zeros((2, 3073), dtype=np.uint8)
    record[1, 0] = 10
    (tmp_path / "data_batch_5.bin").write_bytes(record.tobytes())
    one_line(tmp_path, "data_batch_5.bin, record 1: label 10 is not in 0..9")


@pytest.mark.parametrize("head", [(20, 0), (0, 100)])
def test_labels_out_of_range_hundred(tmp_path, head):
    for name in ("train", "test"):
        (tmp_path / f"{name}.bin").write_bytes(bytes([*head]) + bytes(3072))
    one_line(tmp_path, "train.bin", f"label {max(head)} is not in")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": images(2, 0)}, "no entry 'labels'"),
        ({"data": images(2, 0), "labels": [1]}, "label for each of 2"),
        ({"data": images(2, 0), "labels": [1, 10]}, "label 10"),
        ({"data": images(2, 0), "labels": [1, -1]}, "label -1"),
        ({"data": images(2, 0), "labels": [1, 1.5]}, "label for each"),
        ({"data": images(2, 0), "labels": [1, [2]]}, "label for each"),
        ({"data": images(2, 0)[:, 1:], "labels": [1, 2]}, "uint8 (2, 3071)"),
        ({"data": images(2, 0).astype(float), "labels": [1, 2]}, "float64 (2, 3072)"),
        ({"data": [1, 2], "labels": [1, 2]}, "images list"),
        ([1, 2], "holds a list"),
    ],
)
def test_wrong_contents_of_the_python_layout(tmp_path, content, words):
    python10(tmp_path, 4)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content))
    one_line(tmp_path, "data_batch_1", words)


class Malicious:
    def __reduce__(self):
        return print, ("this must never be printed",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    python10(tmp_path, 4)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({"data": Malicious()}))
    one_line(tmp_path, "data_batch_1", "builtins.print", "not allowed")
    assert capsys.readouterr().out == ""


def test_a_pickle_cut_short(tmp_path):
    python10(tmp_path, 2)
    path = tmp_path / "test_batch"
    path.write_bytes(path.read_bytes()[:-100])
    one_line(tmp_path, "test_batch", "not a CIFAR python file")


@needs_digits
def test_digits_are_split_normalised_and_repeatable():
    data = digits(seed=1)
    assert data.train_x.shape == (1437, 3, 32, 32) and data.test_x.shape == (360, 3, 32, 32)
    assert abs(data.train_x.mean()) < 1e-5 and abs(data.train_x.std() - 1) < 1e-3
    assert torch.equal(data.train_x[:, 0], data.train_x[:, 2])
    again, other = digits(seed=1), digits(seed=2)
    assert torch.equal(data.train_x, again.train_x) and torch.equal(data.test_y, again.test_y)
    assert not torch.equal(data.train_y, other.train_y)
    assert digits(size=8, channels=1).train_x.shape == (1437, 1, 8, 8)


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@needs_digits
def test_training_learns_repeats_and_leaves_the_global_generator_alone():
    data = digits(size=8, channels=1)
    runs = []
    for _ in range(2):
        model = small_model()
        state = torch.get_rng_state()
        steps = []
        history = train(
            model, data.train_x, data.train_y, epochs=3, limit=500, seed=4,
            progress=lambda done, total: steps.append((done, total)),  # noqa: B023
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        assert steps[-1] == (24, 24) and len(steps) == 24
        runs.append((history, model[1].weight.detach().clone()))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert history[-1].loss < history[0].loss
    assert evaluate(model, data.test_x, data.test_y).accuracy > 0.85
    assert not model.training and all(p.grad is None for p in model.parameters())


@needs_digits
def test_no_epochs_leave_the_model_and_bad_sizes_are_refused():
    data = digits(size=8, channels=1)
    model = small_model()
    before = model[1].weight.detach().clone()
    assert train(model, data.train_x, data.train_y, epochs=0) == []
    assert torch.equal(model[1].weight, before)
    for bad in ({"epochs": -1}, {"epochs": 1, "batch_size": 0}, {"epochs": 1, "limit": 0}):
        with pytest.raises(ValueError, match="is below"):
            train(model, data.train_x, data.train_y, **bad)
    with pytest.raises(ValueError, match="diverged at lr=1e"):
        train(model, 1e30 * data.train_x, data.train_y, epochs=2, lr=1e30)


def test_evaluate_is_the_mean_and_restores_the_flags():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    model[0].eval()
    x, y = torch.randn(7, 3), torch.randint(4, (7,))
    found = evaluate(model, x, y, batch_size=3)
    assert [m.training for m in model.modules()] == [True, False, True]
    model.eval()
    assert found.loss == pytest.approx(nn.functional.cross_entropy(model(x), y).item())
    assert found.accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())
