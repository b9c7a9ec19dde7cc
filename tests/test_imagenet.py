"""All stages on ImageNet's file format, in one process.

With a world size of 2: tests/test_distributed.py.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time

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
    save_images,
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
    """JPEGs of various sizes: RGB, greyscale and CMYK in turn, with an EXIF rotation."""
    root = tmp_path_factory.mktemp("jpegs")
    save_images(root / "data", (4, 4), train=9, val=7)
    for path in root.rglob("*.png"):
        number, exif = int(path.stem), Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image = Image.open(path).resize((30 + 23 * number, 250 - 17 * number))
        image = image.convert(("RGB", "L", "CMYK")[number % 3])
        image.save(path.with_suffix(".JPEG"), exif=exif)
        path.unlink()
    return root


def test_all_stages_run_with_resnet50(tmp_path):
    save_images(tmp_path / "data", (30, 40), train=2, val=2)
    source, target = (tmp_path / f"dense/seed{seed}" for seed in (0, 1))
    imp, aligned, flags = tmp_path / "imp", tmp_path / "align", f"{JPEGS} --sparsity 0.2"
    succeed(*imagenet1(tmp_path, tmp_path / "dense", "--epochs 1 --seed 0 1"))
    succeed(*stage2(source, imp, flags))
    succeed(*stage3(source, target, imp, aligned, "--workers 0"))
    for arm, masks in (("naive", imp), ("permuted", aligned)):
        succeed(*stage4(arm, target, masks, tmp_path / "sparse" / arm, flags, "--rewind 0"))
    succeed("analyze.results", tmp_path)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert rows["arm"].tolist() == ["naive", "permuted"] and set(rows["dataset"]) == {"imagenet"}
    assert rows["test_top5"].tolist() == [100] * 2  # there are two classes
    assert result(source)["images"] == {"train": 4, "test": 4}


def test_images_equal_torchvisions_imagefolder(jpegs):
    """Greyscale and CMYK become RGB; the EXIF orientation is ignored."""
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    steps.append(transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    dataset = torchvision.datasets.ImageFolder(jpegs / "data/val", transforms.Compose(steps))
    expected = torch.stack([image for image, _ in dataset])
    batches = Streamed(jpegs / "data", torch.device("cpu"), 0).eval_batches("test", 5)
    assert torch.allclose(torch.cat([images for images, _ in batches]), expected, atol=1e-5)
    rotated = Image.open(jpegs / "data/val/cat/3.JPEG")
    assert ImageOps.exif_transpose(rotated).size == rotated.size[::-1]


def test_each_image_of_an_epoch_has_its_own_random_crop(tmp_path):
    save_images(tmp_path / "data", (30, 40), train=3, val=1)
    first, *others = (tmp_path / "data/train").rglob("*.png")
    for path in others:
        shutil.copy(first, path)
    data = Streamed(tmp_path / "data", torch.device("cpu"), 0)
    ((images, _),) = data.train_batches(6, seed=0, epoch=0)
    assert len(images.sum((1, 2, 3)).unique()) == 6


def test_a_corrupt_jpeg_is_named_in_the_error(jpegs, tmp_path):
    """The error is raised in a DataLoader worker."""
    shutil.copytree(jpegs / "data", tmp_path / "data")
    corrupt = tmp_path / "data/train/dog/4.JPEG"
    corrupt.write_bytes(corrupt.read_bytes()[:-200])
    command = imagenet1(tmp_path, tmp_path / "dense", MLP, "--batch-size 9 --workers 2")
    refuse(command, f"{corrupt} cannot be read as an image")


@forks
@pytest.mark.parametrize("to_group, step", [(True, 2), (False, 1)])
def test_sigterm_to_all_processes_stops_the_run(jpegs, tmp_path, capfd, to_group, step):
    """Sent to the process group, as by torchrun, it does not end the data workers. Sent to every
    process, as by SLURM, it does: none is left to load the next step, and the last save is resumed.
    """

    def end_all():
        pids = [worker.pid for worker in multiprocessing.active_children()]
        targets = [-os.getpid()] if to_group else [os.getpid(), *pids]
        subprocess.run(["kill", "-TERM", "--", *map(str, targets)])
        time.sleep(2)  # until PyTorch notices

    def child():
        os.setsid()
        start(*command)

    command = imagenet1(jpegs, tmp_path / "dense", MLP, "--checkpoint-minutes 0 --workers 2")
    with ending_at(0, 1, end_all):
        process = fork(child)
        process.join()
    assert process.exitcode == 130
    assert "Traceback" not in (err := capfd.readouterr().err) and "again to resume" in err
    assert f"resumes after {step} steps" in succeed(*command)


@forks
def test_a_run_interrupted_within_an_epoch_resumes_there(jpegs, tmp_path):
    """It is killed with live workers, then interrupted when only the evaluation is left."""
    command = imagenet1(jpegs, tmp_path / "interrupted", MLP, "--checkpoint-minutes 0")
    with ending_at(1, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        process = fork(start, *command, "--workers", 2)
        process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(InterruptedError), ending_at(1, 4, interrupt):
        call(*command)
    assert "resumes after epoch 1 and 4 steps" in succeed(*command)
    succeed(*imagenet1(jpegs, tmp_path / "uninterrupted", MLP))
    same_files(tmp_path / "interrupted", tmp_path / "uninterrupted")
