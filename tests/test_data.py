import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from common import folder
from common.data import IMAGENET_MEAN, IMAGENET_STD, Resident, Streamed, balanced, epoch_seed, load_data
from common.errors import UserError
from common.glyphs import glyphs


def resident(count=6, size=8, pad=1, flip=False, mean=0.0, std=1 / 255, device="cpu"):
    """A set whose normalised pixels are the raw values, each image filled with its own number but for one corner."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, size, size) + 10
    images[:, :, 0, 0] = 200
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    description = {"classes": 2, "mean": [mean] * 3, "std": [std] * 3}
    labels = torch.arange(count) % 2
    return Resident(*(part.to(device) for part in (padded, labels, images, labels)), pad, flip, description)


def epoch(data, seed, number, batch=4):
    return [(x.clone(), y.clone()) for x, y in data.train_batches(batch, seed, number)]


def test_training_drops_the_last_short_batch_and_evaluation_never_does():
    data = resident(count=10)
    assert [len(x) for x, _ in epoch(data, 0, 0)] == [4, 4] and data.steps(4) == 2
    assert [len(x) for x, _ in data.eval_batches("test", 4)] == [4, 4, 2]
    assert torch.cat([x for x, _ in data.eval_batches("train", 4)])[:, 0, 4, 4].tolist() == [
        float(10 + i) for i in range(10)
    ]
    with pytest.raises(UserError, match="batch-size 11"):
        data.steps(11)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    data = resident(count=12)
    first = epoch(data, 1, 5)
    epoch(data, 1, 4)
    torch.rand(10)
    again = epoch(data, 1, 5)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, again))
    for seed, number in ((2, 5), (1, 6)):
        assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, epoch(data, seed, number)))
    assert epoch_seed(0, 1) != epoch_seed(1, 0) != epoch_seed(0, 0, 1)


def test_every_image_is_cropped_by_its_own_offset_with_its_own_label():
    data = resident(count=180, pad=2)
    images, labels = epoch(data, 0, 0, batch=180)[0]
    numbers = (images[:, 0, 4, 4] - 10).round().long()
    assert sorted(numbers.tolist()) == list(range(180)) and numbers.tolist() != list(range(180))
    assert torch.equal(labels, numbers % 2)
    corners = [tuple((image[0] == 200).nonzero()[0].tolist()) if (image[0] == 200).any() else None for image in images]
    seen = {corner for corner in corners if corner}
    # Offsets 0..4 of a crop move the corner pixel to 2 - offset: 0, 1, 2, or out of the picture.
    assert seen == {(y, x) for y in range(3) for x in range(3)}
    for image, corner in zip(images, corners):
        if corner == (2, 1):  # two black rows above, one black column to the left
            assert image[0, :2].eq(0).all() and image[0, :, :1].eq(0).all() and image[0, 2:, 1:].gt(0).all()
            break
    else:
        raise AssertionError("no image was cropped there")


def test_flips_mirror_half_of_the_images_when_the_set_may_be_flipped():
    mirrored = [bool(x[0, 0, 0, -1] == 200) for x, _ in epoch(resident(count=100, pad=0, flip=True), 0, 0, batch=1)]
    assert 30 < sum(mirrored) < 70
    plain = [bool(x[0, 0, 0, -1] == 200) for x, _ in epoch(resident(count=100, pad=0), 0, 0, batch=1)]
    assert not any(plain)


def test_normalisation_by_hand():
    data = resident(mean=0.2, std=0.5)
    images = next(data.eval_batches("test"))[0]
    assert images[3, 1, 4, 4].item() == pytest.approx((13 / 255 - 0.2) / 0.5)
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32


def test_balanced_takes_equally_of_every_class_and_always_the_same():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    chosen = balanced(labels, 30)
    assert torch.bincount(labels[chosen]).tolist() == [10, 10, 10]
    assert torch.equal(chosen, balanced(labels, 30)) and len(set(chosen.tolist())) == 30
    assert torch.bincount(labels[chosen[:15]]).min() >= 2  # mixed, as is any part of it
    assert torch.bincount(labels[balanced(labels, 31)]).sum() == 31
    assert torch.bincount(labels[balanced(labels, 90)]).tolist() == [40, 30, 20]  # small classes give what they have
    assert balanced(labels, 1000).sort().values.tolist() == list(range(100))
    assert torch.bincount(labels[balanced(labels, 1000)[-30:]], minlength=3).min() >= 2  # the largest class is not last
    many = balanced(torch.arange(1000).repeat_interleave(3), 2000)[:250] // 3  # a batch of ImageNet
    assert many.min() < 50 and many.max() > 950 and 150 < many.unique().numel()


def test_images_in_order_of_class_are_limited_to_batches_of_all_classes(pictures):
    """In a batch of few classes activations vary less, and BatchNorm statistics from it would be too small."""
    small, streamed = load_data("folder", str(pictures), image_size=8), Streamed(pictures, torch.device("cpu"), 0)
    assert small.train_labels.tolist() == [0] * 6 + [1] * 6
    part = load_data("folder", str(pictures), image_size=8, limit_train=8)  # whose places training draws: they stay
    assert part.train_labels.tolist() == [0] * 4 + [1] * 4
    for data in (small, streamed):
        for limit in (8, 12, 100):
            batches = [set(labels.tolist()) for _, labels in data.eval_batches("train", 4, limit)]
            assert batches == [{0, 1}] * min(limit // 4, 3)


def test_glyphs_are_the_same_from_the_same_seed_and_not_flipped():
    first, again, other = (glyphs(8, seed, (40, 20)) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again)) and not np.array_equal(first[0], other[0])
    assert (
        first[0].shape == (40, 3, 8, 8) and first[0].dtype == np.uint8 and not np.array_equal(first[0][:20], first[2])
    )
    assert np.bincount(first[1]).tolist() == [4] * 10
    loaded = load_data("glyphs", image_size=8, limit_train=100)
    assert (
        not loaded.flip
        and loaded.description["checksum"]
        and len(loaded.train) == 100
        and loaded.input_shape == (3, 8, 8)
    )
    with pytest.raises(UserError, match="not the checkpoint's"):
        load_data("glyphs", image_size=8, expected=loaded.description | {"checksum": "0"})


@pytest.fixture
def pictures(tmp_path):
    """Class folders of random images: train and val, two classes, 12 px."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(256, size=(12, 12, 3), dtype=np.uint8)).save(
                    tmp_path / split / name / f"{i}.png"
                )
    return tmp_path


def test_folder_reads_pixels_labels_and_statistics(pictures):
    data = load_data("folder", str(pictures))
    expected = np.asarray(Image.open(pictures / "train/dog/2.png")).transpose(2, 0, 1)
    pad = data.pad
    assert pad == 1 and np.array_equal(data.train[6 + 2, :, pad:-pad, pad:-pad].numpy(), expected)
    assert data.train_labels.tolist() == [0] * 6 + [1] * 6 and data.test_labels.tolist() == [0] * 3 + [1] * 3
    assert data.description["class_names"] == ["cat", "dog"] and data.description["classes"] == 2
    pixels = data.train[:, :, pad:-pad, pad:-pad].double().transpose(0, 1).flatten(1) / 255
    assert data.description["mean"] == pytest.approx(pixels.mean(1).tolist())
    assert data.description["std"] == pytest.approx(pixels.std(1, correction=0).tolist())
    assert data.flip


def test_folder_keeps_the_decoded_images_and_notices_a_change(pictures, monkeypatch):
    first = load_data("folder", str(pictures), image_size=8)
    with monkeypatch.context() as patched:
        patched.setattr(folder, "_decode", lambda *_, **__: pytest.fail("decoded again"))
        again = load_data("folder", str(pictures), image_size=8)
    assert torch.equal(first.train, again.train) and torch.equal(first.test, again.test)
    native = load_data("folder", str(pictures))
    with monkeypatch.context() as patched:  # a later stage asks for the size that the checkpoint names
        patched.setattr(folder, "_decode", lambda *_, **__: pytest.fail("decoded again"))
        assert torch.equal(load_data("folder", str(pictures), image_size=12).train, native.train)
    Image.new("RGB", (12, 12), "red").save(pictures / "train/cat/0.png")
    os.utime(pictures / "train/cat/0.png", (1, 1))
    changed = load_data("folder", str(pictures), image_size=8)
    assert changed.train[0, 0, 1:-1, 1:-1].eq(255).all() and torch.equal(changed.train[1:], first.train[1:])
    with pytest.raises(UserError, match="checksum differs"):
        load_data("folder", str(pictures), image_size=8, expected=first.description)
    cache = next(pictures.glob(".decoded-8.pt"))
    cache.write_bytes(cache.read_bytes()[:100])  # a cache that was cut off is made again
    assert torch.equal(load_data("folder", str(pictures), image_size=8).train, changed.train)


def test_folder_refuses_what_is_wrong_with_one_line(pictures, tmp_path):
    with pytest.raises(UserError, match="no such data folder"):
        load_data("folder", str(tmp_path / "nowhere"))
    Image.new("RGB", (20, 10)).save(pictures / "train/cat/0.png")
    with pytest.raises(UserError, match="image-size"):
        load_data("folder", str(pictures))
    assert load_data("folder", str(pictures), image_size=8).input_shape == (3, 8, 8)
    (pictures / "train/cat/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cat/1\.png is no image"):
        load_data("folder", str(pictures), image_size=9)
    (pictures / "train/cat/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cat/0\.png is no image"):
        load_data("folder", str(pictures))
    (pictures / "train/cat/9.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"cat/9\.png cannot be read"):
        load_data("folder", str(pictures), image_size=8)
    (pictures / "train/emu").mkdir()
    with pytest.raises(UserError, match="differ: emu"):
        load_data("folder", str(pictures), image_size=8)
    (pictures / "val/emu").mkdir()
    with pytest.raises(UserError, match="no images in .*emu"):
        load_data("folder", str(pictures), image_size=8)


def test_a_picture_of_more_than_8_bits_is_refused_rather_than_clipped(pictures):
    Image.fromarray(np.full((12, 12), 3000, np.uint16)).save(pictures / "train/cat/3.png")
    with pytest.raises(UserError, match=r"cat/3\.png has more than 8 bits"):
        load_data("folder", str(pictures), image_size=8)


def test_imagenet_takes_val_and_not_its_unlabelled_test(pictures):
    (pictures / "test").mkdir()
    Image.new("RGB", (12, 12)).save(pictures / "test/0.png")
    data = Streamed(pictures, torch.device("cpu"), 0)
    assert [path for path, _ in data.plain["test"].samples][0] == str(pictures / "val/cat/0.png")
    (pictures / "train/.ipynb_checkpoints").mkdir()  # would be class 0 and move all others
    Image.new("RGB", (12, 12)).save(pictures / "train/.ipynb_checkpoints/0.png")
    with pytest.raises(UserError, match=r"no class: remove \.ipynb_checkpoints"):
        Streamed(pictures, torch.device("cpu"), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_of_imagenet_is_named(pictures, workers):
    (pictures / "val/dog/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^\S*/val/dog/1\.png is no image that can be read: [^\n]*$"):
        list(Streamed(pictures, torch.device("cpu"), workers).eval_batches())


def test_cifar_is_asked_for_by_name_and_a_missing_network_is_one_line(tmp_path, monkeypatch):
    from common.vision import torchvision

    def offline(self, root, train=True, download=False):
        raise OSError("no network") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", offline)
    with pytest.raises(UserError, match="cifar10 is not in .* could not be downloaded .no network"):
        load_data("cifar10", str(tmp_path))


def test_cifar_svhn_and_cifar100_are_read_as_torchvision_holds_them(tmp_path, monkeypatch):
    from common.vision import torchvision

    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(20) % 10).tolist()

    def cifar(self, root, train=True, download=False):
        self.data, self.targets, self.classes = pixels, labels, [f"class{i}" for i in range(10)]

    def svhn(self, root, split="train", download=False):
        self.data, self.labels = pixels.transpose(0, 3, 1, 2), np.array(labels)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "__init__", cifar)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "__init__", cifar)
    monkeypatch.setattr(torchvision.datasets.SVHN, "__init__", svhn)
    for name, flip in (("cifar10", True), ("cifar100", True), ("svhn", False)):
        data = load_data(name, str(tmp_path))
        assert np.array_equal(data.test.numpy(), pixels.transpose(0, 3, 1, 2)) and data.test_labels.tolist() == labels
        assert data.pad == 4 and data.flip == flip and data.description["classes"] == 10
    assert load_data("cifar10", str(tmp_path), image_size=16).input_shape == (3, 16, 16)


def test_imagenet_streams_the_same_batches_whatever_the_workers(pictures):
    from torchvision import transforms

    alone, helped = (Streamed(pictures, torch.device("cpu"), workers) for workers in (0, 2))
    one, two = (list(data.train_batches(5, seed=0, epoch=1)) for data in (alone, helped))
    assert len(one) == 2 and one[0][0].shape == (5, 3, 224, 224)  # 12 images: the last 2 are dropped
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two))
    assert not torch.equal(one[0][0], next(alone.train_batches(5, seed=0, epoch=2))[0])
    assert sum(len(y) for _, y in alone.eval_batches("test", 4)) == 6
    assert torch.bincount(torch.cat([y for _, y in alone.eval_batches("train", limit=4)])).tolist() == [2, 2]
    # As torchvision makes them, which the data set does on the device but for the decoding.
    kinds = alone.plain["test"].transform.transforms[:2]
    expected = transforms.Compose([*kinds, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    image = Image.open(alone.plain["test"].samples[0][0]).convert("RGB")
    assert torch.allclose(next(alone.eval_batches("test", 4))[0][0], expected(image), atol=1e-5)
    with pytest.raises(UserError, match="imagenet"):
        load_data("imagenet", str(pictures), limit_train=3)


def test_a_batch_is_cropped_and_mirrored_as_drawn():
    data = resident(count=12, pad=2, flip=True)
    data = dataclasses.replace(
        data, train=torch.randint(256, data.train.shape, dtype=torch.uint8)
    )  # no two crops alike
    order, y, x, mirror = data.draw(0, 3)
    (images, labels), *_ = data.train_batches(12, 0, 3)
    assert (y != x).any() and mirror.any() and not mirror.all()
    for place, image in enumerate(order):
        top, left = int(y[image]), int(x[image])
        expected = data.train[image, :, top : top + 8, left : left + 8].float()
        assert torch.equal(images[place].round(), expected.flip(2) if mirror[image] else expected)
        assert labels[place] == data.train_labels[image]
