"""ImageNet's part of all stages: JPEGs of odd sizes, grey, CMYK and turned, in one process.

In two processes: tests/test_distributed.py.
"""

import os
import shutil
import signal

import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from common.data import Streamed
from common.vision import torchvision
from tests.conftest import (
    JPEGS,
    call,
    ending_at,
    fork,
    forks,
    imagenet1,
    interrupt,
    refuse,
    result,
    same_files,
    save_pictures,
    stage2,
    stage3,
    stage4,
    start,
    succeed,
)

transforms = torchvision.transforms
MLP = "--model mlp --width 0.015625"


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Of odd sizes, in turn RGB, grey and CMYK, and turned by EXIF."""
    root = tmp_path_factory.mktemp("jpegs")
    save_pictures(root / "data", (4, 4), train=9, val=7)
    for path in root.rglob("*.png"):
        number, exif = int(path.stem), Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image = Image.open(path).resize((30 + 23 * number, 250 - 17 * number))
        image = image.convert(("RGB", "L", "CMYK")[number % 3])
        image.save(path.with_suffix(".JPEG"), exif=exif)
        path.unlink()
    return root


def test_every_stage_trains_resnet50(tmp_path):
    save_pictures(tmp_path / "data", (30, 40), train=2, val=2)
    source, target = (tmp_path / f"dense/seed{seed}" for seed in (0, 1))
    imp, aligned, few = tmp_path / "imp", tmp_path / "align", f"{JPEGS} --sparsity 0.2"
    succeed(*imagenet1(tmp_path, tmp_path / "dense", "--epochs 1 --seed 0 1"))
    succeed(*stage2(source, imp, few))
    succeed(*stage3(source, target, imp, aligned, "--workers 0"))
    for arm, masks in (("naive", imp), ("permuted", aligned)):
        succeed(*stage4(arm, target, masks, tmp_path / "sparse" / arm, few, "--rewind 0"))
    succeed("analyze.results", tmp_path)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert rows["arm"].tolist() == ["naive", "permuted"] and set(rows["dataset"]) == {"imagenet"}
    assert rows["test_top5"].tolist() == [100] * 2  # of two classes
    assert result(source)["images"] == {"train": 4, "test": 4}


def test_pictures_are_read_as_torchvision_reads_them(jpegs):
    """Grey and CMYK become RGB; what EXIF says of the orientation is not heeded."""
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = torchvision.datasets.ImageFolder(jpegs / "data/val", transforms.Compose(steps))
    ours = [x for x, _ in Streamed(jpegs / "data", torch.device("cpu"), 0).eval_batches("test", 5)]
    theirs = torch.stack([image for image, _ in theirs])
    assert torch.allclose(torch.cat(ours), theirs, atol=1e-5)
    turned = Image.open(jpegs / "data/val/cat/3.JPEG")
    assert ImageOps.exif_transpose(turned).size == turned.size[::-1]


def test_each_image_of_an_epoch_is_cropped_for_itself(tmp_path):
    save_pictures(tmp_path / "data", (30, 40), train=3, val=1)
    first, *others = (tmp_path / "data/train").rglob("*.png")
    for path in others:
        shutil.copy(first, path)
    data = Streamed(tmp_path / "data", torch.device("cpu"), 0)
    (batch, _), *_ = data.train_batches(6, seed=0, epoch=0)
    assert len(batch.sum((1, 2, 3)).unique()) == 6


def test_a_corrupt_jpeg_is_named_in_one_line(jpegs, tmp_path):
    """Which a worker reads."""
    shutil.copytree(jpegs / "data", tmp_path / "data")
    corrupt = tmp_path / "data/train/dog/4.JPEG"
    corrupt.write_bytes(corrupt.read_bytes()[:-200])
    run = imagenet1(tmp_path, tmp_path / "dense", MLP, "--batch-size 9 --workers 2")
    refuse(run, f"{corrupt} is no image that can be read")


@forks
def test_a_run_that_is_cut_off_within_an_epoch_goes_on_there(jpegs, tmp_path):
    """Killed beside its workers, and then interrupted when only evaluation is left."""
    run = imagenet1(jpegs, tmp_path / "cut", MLP, "--checkpoint-minutes 0")
    with ending_at(1, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        process = fork(start, *run, "--workers", 2)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(InterruptedError), ending_at(1, 4, interrupt):
        call(*run)
    assert "resumes after epoch 1 and 4 steps" in succeed(*run)
    succeed(*imagenet1(jpegs, tmp_path / "whole", MLP))
    same_files(tmp_path / "cut", tmp_path / "whole")
