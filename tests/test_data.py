import dataclasses
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import Resident, Streamed, balanced, derived_seed, folder, load_data
from common.data.glyphs import read_glyphs
from common.errors import UserError
from common.vision import torchvision
from tests.conftest import save_pictures

CPU = torch.device("cpu")


def resident(count=6, pad=1, flip=False, mean=0.0, std=1 / 255, device="cpu"):
    """A set of 8 px whose normalised pixels are the raw values.

    Each image is filled with its own number but for one corner.
    """
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8) + 10
    images[:, :, 0, 0] = 200
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    description = {"name": "test", "classes": 2, "mean": [mean] * 3, "std": [std] * 3}
    labels = torch.arange(count) % 2
    tensors = (part.to(device) for part in (padded, labels, images, labels))
    return Resident(*tensors, pad, flip, description)


def load(data_dir=None, name="folder", image_size=8, **wanted):
    return load_data({"name": name, "image_size": image_size} | wanted, data_dir and str(data_dir))


def epoch(data, seed, number, batch=4):
    return list(data.train_batches(batch, seed, number))


def equal(some, others):
    """Whether two lists of batches are the same."""
    parts = (itertools.chain(*batches) for batches in (some, others))
    return len(some) == len(others) and all(map(torch.equal, *parts))


def test_training_drops_the_last_short_batch_and_evaluation_never_does():
    data = resident(count=10)
    assert [len(x) for x, _ in epoch(data, 0, 0)] == [4, 4] and data.steps(4) == 2
    assert [len(x) for x, _ in data.eval_batches("test", 4)] == [4, 4, 2]
    pixels = torch.cat([x for x, _ in data.eval_batches("train", 4)])[:, 0, 4, 4]
    assert pixels.tolist() == list(range(10, 20))


def test_an_epoch_depends_on_seed_and_epoch_alone():
    data = resident(count=12)
    first = epoch(data, 1, 5)
    epoch(data, 1, 4)
    assert equal(first, epoch(data, 1, 5))
    assert not equal(first, epoch(data, 2, 5)) and not equal(first, epoch(data, 1, 6))
    assert derived_seed(0, 1) != derived_seed(1, 0) != derived_seed(0, 0, 1)


def test_a_batch_is_cropped_and_mirrored_as_drawn():
    data = resident(count=100, pad=2, flip=True)
    noise = torch.randint(256, data.train.shape, dtype=torch.uint8)  # no two crops alike
    data = dataclasses.replace(data, train=noise)
    order, y, x, mirror = data.draw(0, 3)
    assert sorted(order.tolist()) == list(range(100)) != order.tolist()
    assert set(zip(y.tolist(), x.tolist())) == {*itertools.product(range(5), repeat=2)}
    assert 30 < mirror.sum() < 70
    ((images, labels),) = epoch(data, 0, 3, batch=100)
    assert torch.equal(labels, data.train_labels[order])
    for image, found in zip(order, images):
        window = data.train[image, :, y[image] :, x[image] :][:, :8, :8].float()
        assert torch.equal(found.round(), window.flip(2) if mirror[image] else window)
    assert not resident(count=100).draw(0, 3)[3].any()  # a set that may not be flipped


def test_normalisation_by_hand():
    data = resident(mean=0.2, std=0.5)
    images = next(data.eval_batches("test"))[0]
    assert images[3, 1, 4, 4].item() == pytest.approx((13 / 255 - 0.2) / 0.5)
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


def test_balanced_takes_equally_of_every_class_and_always_the_same():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    for limit, counts in ((30, [10, 10, 10]), (90, [40, 30, 20]), (1000, [50, 30, 20])):
        chosen = balanced(labels, limit)  # small classes give all they have
        assert torch.equal(chosen, balanced(labels, limit))
        assert len(chosen.unique()) == len(chosen)
        assert torch.bincount(labels[chosen]).tolist() == counts
        assert {*labels[chosen[-15:]].tolist()} == {0, 1, 2}  # mixed, as is any part of it


def test_images_in_order_of_class_are_limited_to_batches_of_all_classes(pictures):
    """In batches of few classes activations vary less, and so would BatchNorm's statistics."""
    small, streamed = load(pictures), Streamed(pictures, CPU, 0)
    part = load(pictures, limit_train=8)  # whose places training draws: they stay
    assert part.train_labels.tolist() == [0] * 4 + [1] * 4
    for data in (small, streamed):
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
    checkpoints = loaded.description | {"mean": [0.5] * 3}
    assert load_data(checkpoints).description == checkpoints
    with pytest.raises(UserError, match="checksum differs"):
        load_data(loaded.description | {"checksum": "another"})


@pytest.fixture
def pictures(tmp_path):
    save_pictures(tmp_path, train=6, val=3)
    return tmp_path


def test_folder_reads_pixels_labels_and_statistics(pictures):
    data, paths = load(pictures, image_size=None), sorted(pictures.glob("train/*/*"))
    expected = np.stack([Image.open(path) for path in paths]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.train[:, :, 1:-1, 1:-1], expected)
    assert data.train[:, :, 0].eq(0).all() and data.flip  # black around
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6
    assert data.test_labels.tolist() == [0] * 3 + [1] * 3
    about = data.description
    assert about["class_names"] == ["cat", "dog"]
    for moment in ("mean", "std"):
        by_hand = getattr(expected / 255, moment)((0, 2, 3))
        assert about[moment] == pytest.approx(by_hand.tolist())


def test_folder_tells_what_it_leaves_out(pictures, capsys):
    for name in ("a.gif", "notes.txt", ".hidden.txt"):
        (pictures / "train/cat" / name).write_text("")
    assert len(load(pictures).train) == 12
    assert "2 files of " in capsys.readouterr().out


def test_folder_keeps_the_decoded_images_and_notices_a_change(pictures, monkeypatch):
    picture = pictures / "train/cat/0.png"
    Image.new("RGB", (12, 12), "red").save(picture)
    first = load(pictures)
    with monkeypatch.context() as patched:
        patched.setattr(folder, "read_picture", lambda _: pytest.fail("decoded again"))
        assert torch.equal(first.train, load(pictures).train)
    Image.new("RGB", (12, 12), "lime").save(picture)  # as many bytes
    os.utime(picture, (0, 0))
    changed = load(pictures)
    assert changed.train[0, 1, 1:-1, 1:-1].eq(255).all()
    cache = pictures / ".decoded-8.pt"
    cache.write_bytes(cache.read_bytes()[:100])  # a cache that was cut off is made again
    assert torch.equal(load(pictures).train, changed.train)
    Image.new("RGB", (20, 20)).save(picture)  # of another size
    with pytest.raises(UserError, match="checksum differs"):
        load_data(first.description | {"data_dir": "elsewhere"}, str(pictures))


def test_folder_refuses_what_is_wrong_with_one_line(pictures):
    def refused(words, size=8):
        with pytest.raises(UserError, match=words):
            load(pictures, image_size=size)

    cat, emu = pictures / "train/cat", pictures / "train/emu"
    Image.new("RGB", (20, 10)).save(cat / "0.png")
    refused("image-size", None)
    assert load(pictures).input_shape == (3, 8, 8)
    Image.fromarray(np.full((12, 12), 3000, np.uint16)).save(cat / "2.png")  # no 8-bit clipping
    refused(r"cat/2\.png has more than 8 bits")
    (cat / "1.png").write_bytes(b"no image")
    refused(r"cat/1\.png is no image")
    (cat / "9.png").symlink_to("nowhere.png")
    refused(r"cat/9\.png is no image that can be read")
    emu.mkdir()
    refused("no valid file for the classes emu")
    Image.new("RGB", (12, 12)).save(emu / "0.png")
    refused("differ: emu")


def test_imagenet_takes_val_and_not_its_unlabelled_test(pictures):
    (pictures / "test").mkdir()
    Image.new("RGB", (12, 12)).save(pictures / "test/0.png")
    (first, _), *_ = Streamed(pictures, CPU, 0).plain["test"].samples
    assert first == str(pictures / "val/cat/0.png")


def test_imagenet_streams_the_same_batches_whatever_the_workers(pictures):
    alone, helped = (Streamed(pictures, CPU, workers) for workers in (0, 2))
    one, two = (epoch(data, 0, 1, batch=5) for data in (alone, helped))
    assert len(one) == 2 and one[0][0].shape == (5, 3, 224, 224)  # of 12 images 2 are dropped
    assert equal(one, two) and not equal(one, epoch(alone, 0, 2, batch=5))
    alone.augmented.transform = alone.plain["test"].transform
    # The order of an epoch is its own, too.
    assert not equal(*(epoch(alone, 0, number, batch=12) for number in (1, 2)))
    with pytest.raises(UserError, match="imagenet"):
        load(pictures, "imagenet", 224, limit_train=3)


@pytest.mark.parametrize("name, flip", [("cifar10", True), ("cifar100", True), ("svhn", False)])
def test_downloads_are_read_as_torchvision_holds_them(tmp_path, monkeypatch, name, flip):
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8).numpy()

    def held(self, *_, **__):
        self.classes, self.labels, self.targets = [*"abcde"], np.arange(5), [*range(5)]
        self.data = pixels if name == "svhn" else pixels.transpose(0, 2, 3, 1)

    def offline(self, root, download=False, **_):
        raise OSError("no network") if download else RuntimeError("Dataset not found")

    kind = getattr(torchvision.datasets, name.upper())
    monkeypatch.setattr(kind, "__init__", held)
    data = load("nowhere", name, None)
    assert np.array_equal(data.test.numpy(), pixels) and data.test_labels.tolist() == [*range(5)]
    assert data.pad == 4 and data.flip == flip
    assert load("nowhere", name, 16).input_shape == (3, 16, 16)
    monkeypatch.setattr(kind, "__init__", offline)
    with pytest.raises(UserError, match="is not in .* could not be downloaded .no network"):
        load(tmp_path / "wrong/place", name)
    assert not list(tmp_path.iterdir())
