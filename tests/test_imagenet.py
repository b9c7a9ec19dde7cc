"""Stages 1 to 4 of ResNet50 on JPEGs of odd sizes, grey, CMYK and turned, in one process.

In two processes: tests/test_distributed.py.
"""

import os
import shutil
import signal

import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps

from common.data import Streamed
from common.vision import torchvision
from tests.conftest import (
    ending_at,
    fork,
    forks,
    imagenet1,
    refuse,
    result,
    same,
    start,
    state,
    succeed,
    weights,
)

CPU = torch.device("cpu")


def test_every_stage_trains_resnet50(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path, dirs_exist_ok=True)
    assert "permuted" in succeed("analyze.results", tmp_path)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert rows["arm"].tolist() == ["lth", "naive", "permuted"]
    assert set(rows["model"]) == {"resnet50"} and set(rows["dataset"]) == {"imagenet"}
    assert result(imagenet / "dense/seed0")["images"] == {"train": 18, "test": 14}
    for arm, masks in (("naive", "imp/seed0"), ("permuted", "align/activation/seed0-seed1")):
        final = state(imagenet / f"sparse/{arm}/s0.20_k001/final.pt")
        assert same(final["mask"], state(imagenet / masks / "mask_0.20.pt")["mask"])
        assert all(
            (final["state_dict"][name][~kept] == 0).all() for name, kept in final["mask"].items()
        )


def test_pictures_are_read_as_torchvision_reads_them_whatever_the_workers(imagenet):
    """Grey and CMYK become RGB; what EXIF says of the orientation is not heeded."""
    alone, helped = (Streamed(imagenet / "data", CPU, workers) for workers in (0, 2))
    for split, folder in (("train", "train"), ("test", "val")):
        ours = alone.plain[split]
        theirs = torchvision.datasets.ImageFolder(imagenet / "data" / folder, ours.transform)
        batches = [list(data.eval_batches(split, 5)) for data in (alone, helped)]
        pixels = [torch.cat([images for images, _ in some]) for some in batches]
        assert torch.equal(*pixels) and ours.samples == theirs.samples
        assert all(torch.equal(one[0], two[0]) for one, two in zip(ours, theirs, strict=True))
    turned = Image.open(imagenet / "data/val/cat/3.JPEG")
    assert ImageOps.exif_transpose(turned).size == turned.size[::-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_jpeg_is_named_in_one_line(imagenet, tmp_path, workers):
    shutil.copytree(imagenet / "data", tmp_path / "data")
    corrupt = tmp_path / "data/train/dog/4.JPEG"
    corrupt.write_bytes(corrupt.read_bytes()[:-200])
    more = ("--batch-size", 9, "--workers", workers)
    refuse(
        imagenet1(tmp_path, tmp_path / "dense", *more), f"{corrupt} is no image that can be read"
    )


@forks
def test_a_run_that_is_cut_off_within_an_epoch_goes_on_there(imagenet, tmp_path):
    """Killed beside its workers; ended by SIGTERM; and once more when only evaluation is left."""
    run, found = imagenet1(imagenet, tmp_path, "--checkpoint-minutes", 0), []
    for step, sent in ((1, signal.SIGKILL), (2, signal.SIGTERM), (4, signal.SIGTERM)):
        with ending_at(1, step, lambda: os.kill(os.getpid(), sent)):
            process = fork(start, *run, "--workers", 2)
            process.join()
        cut = state(tmp_path / "seed0/resume.pt")
        found.append((process.exitcode, len(cut["rows"]), cut["step"]))
    assert found == [(-signal.SIGKILL, 1, 1), (130, 1, 3), (130, 1, 4)]
    assert "goes on after epoch 1 and 4 steps" in succeed(*run)
    one, two = (folder / "seed0" for folder in (imagenet / "dense", tmp_path))
    for epoch in (1, 2):
        assert same(*(weights(folder / f"epoch_000{epoch}.pt") for folder in (one, two)))
    logs = [pd.read_csv(folder / "log.csv").drop(columns="seconds") for folder in (one, two)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
