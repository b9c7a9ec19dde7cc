"""Every network learns at its paper's settings: a few dozen steps on images of patterns that are easy to tell apart."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from common import cli
from common.data import load_data
from common.models import build_model
from common.training import learning_rates, train
from tests.conftest import sparse, succeed

GUESSING = math.log(10)
DEVICE = ("--device", "cpu")


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """A folder of 10 classes of 32 px: a coarse random pattern each, under noise as strong."""
    root, random = tmp_path_factory.mktemp("patterns"), np.random.default_rng(0)
    coarse = 40 * random.normal(size=(10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    for split, count in (("train", 192), ("test", 20)):
        for label, pattern in enumerate(coarse):
            (root / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = 128 + pattern + random.normal(0, 40, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / str(label) / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def dense(patterns, tmp_path_factory):
    """Dense runs of the small-image networks, with every default of stage 1 but the number of epochs."""
    root = tmp_path_factory.mktemp("dense")
    for model in ("mlp", "vgg11", "resnet20"):
        about = ("--dataset", "folder", "--data-dir", patterns, "--model", model, "--epochs", EPOCHS)
        succeed("train_dense", *about, "--save-epochs", 0, *DEVICE, "--out", root / model)
    return root


EPOCHS = 4


@pytest.mark.parametrize("model", ["mlp", "vgg11", "resnet20"])
def test_a_network_learns_at_the_defaults_of_stage_1(dense, model):
    assert pd.read_csv(dense / model / "seed0/log.csv")["train_loss"].iloc[-1] < 0.7 * GUESSING


def test_resnet50_learns_at_imagenets_settings(patterns):
    data = load_data("folder", str(patterns), None, None, torch.device("cpu"))
    paper = {name: imagenet for name, (_, imagenet) in cli.PAPER["dense"].items()}
    rates = learning_rates(paper["schedule"], paper["lr"], paper["epochs"], paper["warmup"])[:20]
    settings = {name: paper[name] for name in ("batch_size", "momentum", "weight_decay")}
    model = build_model("resnet50", 0.25, 10, data.input_shape)
    rows = train(model, data, rates, name="resnet50", folder=None, seed=0, precision="fp32", **settings)
    assert rows[-1]["train_loss"] < 0.7 * GUESSING


def test_a_sparse_run_that_diverges_is_a_result(runs, tmp_path):
    def strict(path):
        return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    shutil.copytree(runs, tmp_path / "R")
    ends = ("naive", runs / "dense/seed1", runs / "imp/seed0", tmp_path / "R/sparse/naive/wild")
    cells = ("--sparsity", 0.5, 0.7, "--rewind", 1, "--lr", 1e6)
    outcome = sparse(*ends, *cells)
    assert outcome.code == 0 and outcome.out.count("diverged in epoch 2") == 2, outcome
    for folder in (ends[-1] / "s0.50_k001", ends[-1] / "s0.70_k001"):
        result = strict(folder / "result.json")
        assert result["diverged"] == 2 and result["test_loss"] is None and 0 <= result["test_acc"] < 50
        assert pd.read_csv(folder / "log.csv")["epoch"].tolist() == [2]  # the last that it trained
        assert not (folder / "final.pt").exists() and not (folder / "resume.pt").exists()
    assert sparse(*ends, *cells).out.count("nothing to do") == 2
    sane = tmp_path / "R/sparse/naive/seed0-seed1"
    assert strict(sane / "s0.50_k001/result.json")["diverged"] is None
    for cell in ("s0.50_k001", "s0.70_k001"):
        shutil.rmtree(sane / cell)
    table = succeed("analyze.results", tmp_path / "R")
    assert "2 of 24 runs diverged" in table and f"{folder} in epoch 2" in table
    assert pd.read_csv(tmp_path / "R/results.csv")["diverged"].dropna().tolist() == [2, 2]


def test_a_run_that_ends_at_chance_says_so(patterns, tmp_path):
    about = ("--dataset", "folder", "--data-dir", patterns, "--model", "mlp", "--width", 0.25, "--epochs", 1, *DEVICE)
    hint = "ends at chance"
    assert hint in succeed("train_dense", *about, "--lr", 1e-9, "--out", tmp_path / "slow")
    assert hint not in succeed("train_dense", *about, "--lr", 0.02, "--out", tmp_path / "fast")
