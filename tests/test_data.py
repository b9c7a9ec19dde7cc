import dataclasses
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import Resident, Streamed, balanced_indices, derived_seed, folder, load_data
from common.data.glyphs import read_glyphs
from common.errors import UserError
from common.vision import torchvision
from tests.conftest import save_images

CPU = torch.device("cpu")


def resident(count=6, pad=1, flip=False, mean=0.0, std=1 / 255, device="cpu"):
    """A data set of 8 px images whose normalised pixels equal the raw values.

    Image i is filled with i + 10, except for one corner.
    """
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8) + 10
    images[:, :, 0, 0] = 200
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    description = {"name": "test", "classes": 2, "mean": [mean] * 3, "std": [std] * 3}
    labels = torch.arange(count) % 2
    tensors = (tensor.to(device) for tensor in (padded, labels, images, labels))
    return Resident(*tensors, pad, flip, description)


def load(data_dir=None, name="folder", image_size=8, **spec):
    return load_data({"name": name, "image_size": image_size} | spec, data_dir and str(data_dir))


def epoch(data, seed, number, batch_size=4):
    return list(data.train_batches(batch_size, seed, number))


def equal(left, right):
    """Whether two lists of batches are equal."""
    tensors = (itertools.chain(*batches) for batches in (left, right))
    return len(left) == len(right) and all(map(torch.equal, *tensors))


def test_training_drops_the_last_short_batch_and_evaluation_never_does():
    data = resident(count=10)
    assert [len(x) for x, _ in epoch(data, 0, 0)] == [4, 4] and data.steps(4) == 2
    assert [len(x) for x, _ in data.eval_batches("test", 4)] == [4, 4, 2]
    pixels = torch.cat([x for x, _ in data.eval_batches("train", 4)])[:, 0, 4, 4]
    assert pixels.tolist() == list(range(10, 20))


def test_batches_depend_only_on_seed_and_epoch():
    data = resident(count=12)
    first = epoch(data, 1, 5)
    epoch(data, 1, 4)
    assert equal(first, epoch(data, 1, 5))
    assert not equal(first, epoch(data, 2, 5)) and not equal(first, epoch(data, 1, 6))
    assert derived_seed(0, 1) != derived_seed(1, 0) != derived_seed(0, 0, 1)


def test_a_batch_is_cropped_and_flipped_as_planned():
    data = resident(count=100, pad=2, flip=True)
    noise = torch.randint(256, data.train.shape, dtype=torch.uint8)  # all crops differ
    data = dataclasses.replace(data, train=noise)
    order, y, x, flipped = data.plan_epoch(0, 3)
    assert sorted(order.tolist()) == list(range(100)) != order.tolist()
    assert set(zip(y.tolist(), x.tolist())) == {*itertools.product(range(5), repeat=2)}
    assert 30 < flipped.sum() < 70
    ((images, labels),) = epoch(data, 0, 3, batch_size=100)
    assert torch.equal(labels, data.train_labels[order])
    for index, image in zip(order, images):
        crop = data.train[index, :, y[index] :, x[index] :][:, :8, :8].float()
        assert torch.equal(image.round(), crop.flip(2) if flipped[index] else crop)
    assert not resident(count=100, flip=False).plan_epoch(0, 3)[3].any()


def test_normalisation_by_hand():
    data = resident(mean=0.2, std=0.5)
    images = next(data.eval_batches("test"))[0]
    assert images[3, 1, 4, 4].item() == pytest.approx((13 / 255 - 0.2) / 0.5)
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


def test_balanced_indices_are_reproducible_and_equally_many_per_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    for limit, counts in ((30, [10, 10, 10]), (90, [40, 30, 20]), (1000, [50, 30, 20])):
        indices = balanced_indices(labels, limit)  # all images of small classes
        assert torch.equal(indices, balanced_indices(labels, limit))
        assert len(indices.unique()) == len(indices)
        assert torch.bincount(labels[indices]).tolist() == counts
        assert {*labels[indices[-15:]].tolist()} == {0, 1, 2}  # shuffled


def test_limited_evaluation_batches_mix_the_classes(image_folder):
    """Files are sorted by class; in batches of one class, BatchNorm statistics would be biased."""
    subset = load(image_folder, limit_train=8)  # keeps the order, as training shuffles
    assert subset.train_labels.tolist() == [0] * 4 + [1] * 4
    for data in (load(image_folder), Streamed(image_folder, CPU, 0)):
        for limit in (8, 100):
            batches = [set(labels.tolist()) for _, labels in data.eval_batches("train", 4, limit)]
            assert batches == [{0, 1}] * min(limit // 4, 3)


def test_glyphs_are_the_same_from_the_same_seed_and_not_flipped():
    first, again, other = (read_glyphs(8, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first[:4], again)) and not torch.equal(first[0], other[0])
    images, labels, test, *_ = first
    assert not torch.equal(images[:200], test) and labels.bincount().tolist() == [50] * 10
    loaded = load(name="glyphs", limit_train=100)
    assert len(loaded.train) == 100 and not loaded.flip
    from_checkpoint = loaded.description | {"mean": [0.5] * 3}
    assert load_data(from_checkpoint).description == from_checkpoint
    with pytest.raises(UserError, match="checksum differs: use the versions of Pillow"):
        load_data(loaded.description | {"checksum": "another"})
    with pytest.raises(UserError, match="images differs"):
        load_data(loaded.description | {"images": {"train": 99, "test": 200}})


@pytest.fixture
def image_folder(tmp_path):
    save_images(tmp_path, train=6, val=3)
    return tmp_path


def test_folder_reads_pixels_labels_and_statistics(image_folder):
    data, paths = load(image_folder, image_size=None), sorted(image_folder.glob("train/*/*"))
    expected = np.stack([Image.open(path) for path in paths]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.train[:, :, 1:-1, 1:-1], expected)
    assert data.train[:, :, 0].eq(0).all() and data.flip  # zero padding
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6
    assert data.test_labels.tolist() == [0] * 3 + [1] * 3
    assert data.description["class_names"] == ["cat", "dog"]
    for statistic in ("mean", "std"):
        by_hand = getattr(expected / 255, statistic)((0, 2, 3))
        assert data.description[statistic] == pytest.approx(by_hand.tolist())


def test_folder_reports_ignored_files(image_folder, capsys):
    for name in ("a.gif", "notes.txt", ".hidden.txt"):
        (image_folder / "train/cat" / name).write_text("")
    assert len(load(image_folder).train) == 12
    assert "ignored 2 files of " in capsys.readouterr().out


def test_folder_caches_decoded_images_and_detects_changes(image_folder, monkeypatch):
    image_file = image_folder / "train/cat/0.png"
    Image.new("RGB", (12, 12), "red").save(image_file)
    first = load(image_folder)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "read_image", lambda _: pytest.fail("decoded again"))
        assert torch.equal(first.train, load(image_folder).train)
    Image.new("RGB", (12, 12), "lime").save(image_file)  # as many bytes as before
    os.utime(image_file, (0, 0))
    changed = load(image_folder)
    assert changed.train[0, 1, 1:-1, 1:-1].eq(255).all()
    cache = image_folder / ".decoded-8.pt"
    cache.write_bytes(cache.read_bytes()[:100])  # a truncated cache is replaced
    assert torch.equal(load(image_folder).train, changed.train)
    Image.new("RGB", (20, 20)).save(image_file)  # another file size
    with pytest.raises(UserError, match="checksum differs: pass the --data-dir"):
        load_data(first.description | {"data_dir": "elsewhere"}, str(image_folder))


def test_folder_refuses_bad_images_and_classes(image_folder):
    def refused(message, size=8):
        with pytest.raises(UserError, match=message):
            load(image_folder, image_size=size)

    cat, emu = image_folder / "train/cat", image_folder / "train/emu"
    Image.new("RGB", (20, 10)).save(cat / "0.png")
    refused("image-size", None)
    assert load(image_folder).input_shape == (3, 8, 8)
    Image.fromarray(np.full((12, 12), 3000, np.uint16)).save(cat / "2.png")
    refused(r"cat/2\.png has more than 8 bits")
    (cat / "1.png").write_bytes(b"no image")
    refused(r"cat/1\.png cannot be read as an image")
    (cat / "9.png").symlink_to("nowhere.png")
    refused(r"cat/9\.png cannot be read as an image")
    emu.mkdir()
    refused("no valid file for the classes emu")
    Image.new("RGB", (12, 12)).save(emu / "0.png")
    refused("differ: emu")


def test_imagenet_evaluates_on_val_instead_of_the_unlabelled_test(image_folder):
    (image_folder / "test").mkdir()
    Image.new("RGB", (12, 12)).save(image_folder / "test/0.png")
    (first, _), *_ = Streamed(image_folder, CPU, 0).eval_sets["test"].samples
    assert first == str(image_folder / "val/cat/0.png")


def test_imagenet_batches_do_not_depend_on_the_workers(image_folder):
    without_workers, with_workers = (Streamed(image_folder, CPU, workers) for workers in (0, 2))
    batches = epoch(without_workers, 0, 1, batch_size=5)
    assert len(batches) == 2 and batches[0][0].shape == (5, 3, 224, 224)  # 2 of 12 are dropped
    assert equal(batches, epoch(with_workers, 0, 1, batch_size=5))
    assert not equal(batches, epoch(without_workers, 0, 2, batch_size=5))
    # Without augmentation, epochs still differ in order.
    without_workers.train_set.transform = without_workers.eval_sets["test"].transform
    assert not equal(*(epoch(without_workers, 0, number, batch_size=12) for number in (1, 2)))
    with pytest.raises(UserError, match="imagenet"):
        load(image_folder, "imagenet", 224, limit_train=3)


@pytest.mark.parametrize("name, flip", [("cifar10", True), ("cifar100", True), ("svhn", False)])
def test_downloads_are_read_from_torchvisions_arrays(tmp_path, monkeypatch, name, flip):
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8).numpy()

    def fake_init(self, *_, **__):
        self.classes, self.labels, self.targets = [*"abcde"], np.arange(5), [*range(5)]
        self.data = pixels if name == "svhn" else pixels.transpose(0, 2, 3, 1)

    def offline(self, root, download=False, **_):
        raise OSError("no network") if download else RuntimeError("Dataset not found")

    dataset_class = getattr(torchvision.datasets, name.upper())
    monkeypatch.setattr(dataset_class, "__init__", fake_init)
    data = load("nowhere", name, None)
    assert np.array_equal(data.test.numpy(), pixels) and data.test_labels.tolist() == [*range(5)]
    assert data.pad == 4 and data.flip == flip
    assert load("nowhere", name, 16).input_shape == (3, 16, 16)
    monkeypatch.setattr(dataset_class, "__init__", offline)
    with pytest.raises(UserError, match="is not in .* could not be downloaded .no network"):
        load(tmp_path / "wrong/place", name)
    assert not list(tmp_path.iterdir())
