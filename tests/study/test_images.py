import gzip

import numpy as np
import pytest
import torch

from fasthessian.study.augment import crop_and_flip
from fasthessian.study.data import IDX, cifar, fashion_mnist, load, subset
from tests.support.cifar_files import TEN, binary10, needs_digits


def idx_bytes(array, lengths=None):
    """An IDX file of uint8 with the array, whose header may say other lengths."""
    lengths = array.shape if lengths is None else lengths
    head = bytes((0, 0, 8, len(lengths))) + b"".join(n.to_bytes(4, "big") for n in lengths)
    return head + array.astype(np.uint8).tobytes()


def mnist(folder, compressed=False, labels=(3, 1, 4, 1, 5)):
    """Five training images and two test images in IDX files; returns the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    arrays = pixels[:5], np.array(labels), pixels[5:], np.array([9, 0])
    for name, array in zip(IDX, arrays, strict=True):
        content = idx_bytes(array)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return pixels


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_padded_repeated_and_normalised(tmp_path, compressed):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    pixels = mnist(folder, compressed)
    data = load(folder)
    assert (data.name, data.classes, data.flips) == ("fashion-mnist", 10, False)
    assert data.train_y.tolist() == [3, 1, 4, 1, 5] and data.test_y.tolist() == [9, 0]
    assert data.train_x.shape == (5, 3, 32, 32) and data.train_x.dtype == torch.float32
    inside = data.train_x[:, :, 2:-2, 2:-2].double()
    assert abs(inside.mean()) < 1e-6 and abs(inside.std(correction=0) - 1) < 1e-6
    mean, std = pixels[:5].mean(), pixels[:5].std()
    for x, raw in ((data.train_x, pixels[:5]), (data.test_x, pixels[5:])):
        expected = np.pad(raw, ((0, 0), (2, 2), (2, 2)))
        for channel in range(3):
            back = x[:, channel].double() * std + mean
            assert np.abs(back.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (IDX[0], b"\0\0\x0d\x03" + bytes(12), "begins with the bytes 00 00 0d 03, not 00 00 08 03"),
        (IDX[1], b"\0", "begins with the bytes 00, not 00 00 08 01"),
        (IDX[0], idx_bytes(np.zeros((5, 8, 8))), r"shape \(5, 8, 8\), not \(N, 28, 28\)"),
        (IDX[1], idx_bytes(np.zeros(0)), r"shape \(0,\), not \(N\) with N >= 1"),
        (IDX[1], idx_bytes(np.zeros(4), (5,)), "has 4 bytes of values, not 5"),
        (IDX[1], idx_bytes(np.zeros(4)), "has 4 labels for the 5 images of train-images"),
        (IDX[3], idx_bytes(np.array([1, 10])), r"record 1: label 10 is not in 0\.\.9"),
        (IDX[0], idx_bytes(np.full((5, 28, 28), 7)), "all pixels of .* are 7"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_a_bad_idx_file_is_refused_in_one_line(tmp_path, name, content, words):
    mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as info:
        fashion_mnist(tmp_path)
    assert "\n" not in str(info.value) and name in str(info.value)


def test_a_missing_or_damaged_compressed_file_is_refused(tmp_path):
    mnist(tmp_path, compressed=True)
    path = tmp_path / f"{IDX[2]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{IDX[2]}.gz is damaged"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"lacks {IDX[2]} or {IDX[2]}.gz"):
        load(tmp_path)


def test_a_folder_is_known_by_its_files(tmp_path):
    binary10(tmp_path)
    assert load(tmp_path).name == "CIFAR-10" and load(tmp_path).flips
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_3\.bin"):
        load(tmp_path)


def test_other_folders_are_refused_with_what_they_hold_and_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="holds nothing; accepted are CIFAR-10") as info:
        load(tmp_path)
    for name in ("data_batch_1.bin", "data_batch_1,", "train.bin", "train)", "idx3-ubyte", ".gz"):
        assert name.strip(",)") in str(info.value)
    for name in "abcde":
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds a, b, c, d, \.\.\.; accepted are"):
        load(tmp_path)


@needs_digits
def test_the_digits_need_no_folder(tmp_path):
    with pytest.raises(
        ValueError, match="none is not a folder; give a folder of images, or digits"
    ):
        load(tmp_path / "none")
    mnist(tmp_path)
    assert load(tmp_path).classes == 10
    data = load("digits")
    assert data.name == "digits" and not data.flips
    assert data.fingerprint == load().fingerprint


def test_data_of_one_class_are_refused(tmp_path):
    mnist(tmp_path, labels=(4, 4, 4, 4, 4))
    with pytest.raises(ValueError, match=r"all 5 training images of .* have the label 4") as info:
        load(tmp_path)
    assert "\n" not in str(info.value)


def test_the_fingerprint_is_that_of_images_and_labels(tmp_path):
    binary10(tmp_path)
    first = cifar(tmp_path).fingerprint
    assert first == cifar(tmp_path).fingerprint and len(first) == 16
    path = tmp_path / f"{TEN[5]}.bin"
    raw = bytearray(path.read_bytes())
    for place in (0, 3072):  # a label, then a pixel
        changed = raw.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert cifar(tmp_path).fingerprint != first
    path.write_bytes(raw)
    assert cifar(tmp_path).fingerprint == first


def test_subsets_are_fixed_nested_and_without_repetition():
    x, y = torch.arange(10.0), torch.arange(10)
    every = torch.cat([labels for _, labels in subset(x, y, None, 4)])
    assert sorted(every.tolist()) == list(range(10)) and every.tolist() != list(range(10))
    some = subset(x, y, 7, 4)
    assert [len(labels) for _, labels in some] == [4, 3]
    assert torch.equal(torch.cat([labels for _, labels in some]), every[:7])
    assert all(torch.equal(images, labels.float()) for images, labels in some)
    assert not torch.equal(subset(x, y, None, 10, seed=1)[0][1], every)
    for samples in (0, 11):
        with pytest.raises(ValueError, match=rf"samples={samples} is not in 1\.\.10"):
            subset(x, y, samples, 4)
    with pytest.raises(ValueError, match="batch_size=0 is below 1"):
        subset(x, y, 3, 0)


def test_crops_and_flips_are_those_of_each_image():
    x = torch.arange(1, 1 + 200 * 2 * 5 * 6).float().reshape(200, 2, 5, 6)
    found = crop_and_flip(x, torch.Generator().manual_seed(1), padding=2)
    assert found.shape == x.shape
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for image, large in zip(found, padded, strict=True):
        matches = [
            (down, right, flip)
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
            if torch.equal(
                image.flip(-1) if flip else image, large[:, down : down + 5, right : right + 6]
            )
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 45  # of 50: 50 (1 - 1/50)^200 = 0.9 are expected to be missing
    moved = crop_and_flip(x, torch.Generator().manual_seed(1), padding=2, flip=False)
    plain = [torch.equal(a, b) for a, b in zip(moved, found, strict=True)]
    assert 70 < sum(plain) < 130  # half of 200, within four standard errors


def test_the_same_seed_makes_the_same_crops_and_the_next_batch_has_others():
    x = torch.randn(4, 3, 8, 8)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (crop_and_flip(x, generator) for generator in generators)
    assert torch.equal(first, second)
    assert not torch.equal(crop_and_flip(x, generators[0]), first)
    # the option leaves the state of the generator as it is, so that runs see the same crops
    crop_and_flip(x, generators[1], flip=False)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
