"""Every network starts as its source says, and learns at the paper's settings in some steps."""

import dataclasses
import itertools
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
from common.runtime.seeding import seeded
from common.training import learning_rates, train
from common.vision import torchvision
from tests.conftest import result, same, sgd, sparse, succeed

GUESSING = math.log(10)


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """A folder of 10 classes of 32 px: four random colours each, under noise."""
    root, random = tmp_path_factory.mktemp("patterns"), np.random.default_rng(0)
    coarse = 60 * random.normal(size=(10, 2, 2, 3)).repeat(16, 1).repeat(16, 2)
    for (label, pattern), split in itertools.product(enumerate(coarse), ("train", "test")):
        folder = root / split / str(label)
        folder.mkdir(parents=True)
        for number in range(64 if split == "train" else 10):
            pixels = 128 + pattern + random.normal(0, 40, (32, 32, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"{number}.png")
    return root


@pytest.fixture
def learn(patterns, tmp_path):
    """Trains a dense network on them, by the defaults of stage 1 but for some flags."""

    def dense(model, *more):
        about = ("--dataset", "folder", "--data-dir", patterns, "--model", *model.split())
        out = ("--device", "cpu", "--out", tmp_path / "dense")
        return succeed("train_dense", *about, *out, *more)

    return dense


def learned(folder):
    """Whether the network of a run was ever better than guessing."""
    return pd.read_csv(folder / "log.csv")["test_loss"].min() < 0.9 * GUESSING


MODELS = ("mlp --epochs 3", "vgg11 --width 0.5 --epochs 5", "resnet20 --image-size 16 --epochs 6")


@pytest.mark.parametrize("model", MODELS)
def test_a_network_learns_at_the_defaults_of_stage_1(learn, tmp_path, model):
    """At some epoch: images as plain as these are forgotten again, at a learning rate of 0.08."""
    learn(model)
    assert learned(tmp_path / "dense/seed0")


def test_vgg11_learns_at_the_defaults_of_stages_2_and_4(learn, tmp_path):
    """Narrow, and its dense network at the sparse stage's learning rate: at 0.08 it may forget."""
    dense, masks, out = (tmp_path / part for part in ("dense/seed0", "imp", "sparse"))
    learn("vgg11 --width 0.25 --lr 0.02 --epochs 10")
    usual = ("--sparsity", 0.3, "--device", "cpu")
    succeed("prune_imp", "--dense", dense, "--epochs", 3, "--out", masks, *usual)
    ends = ("--arm", "lth", "--weights", dense, "--masks", masks, "--rewind", 0, "--out", out)
    succeed("train_sparse", *ends, *usual)
    assert learned(dense) and learned(masks) and learned(out / "s0.30_k000")


def test_a_run_that_ends_at_chance_says_so(learn, tmp_path):
    for lr in (1e-9, 0.02):
        text = learn(f"mlp --width 0.25 --epochs 1 --lr {lr}", "--out", tmp_path / f"{lr}")
        assert ("ends at chance" in text) == (lr < 0.01)


def test_resnet50_learns_at_imagenets_settings(patterns):
    data = load_data("folder", str(patterns), None, None, torch.device("cpu"))
    twice = {"train": data.train.repeat(2, 1, 1, 1), "train_labels": data.train_labels.repeat(2)}
    data = dataclasses.replace(data, **twice)  # or a batch would be larger than the set
    paper = {name: imagenet for name, (_, imagenet) in cli.PAPER["dense"].items()}
    rates = learning_rates(paper["schedule"], paper["lr"], paper["epochs"], paper["warmup"])
    settings = {"name": "resnet50", "folder": None, "seed": 0, "precision": "fp32"}
    settings |= {"batch_size": paper["batch_size"]}
    settings |= {"make_optimiser": sgd(paper["momentum"], paper["weight_decay"])}
    few = rates[:1] * 10  # steps of the first epoch, which has 1,251 on ImageNet
    rows = train(build_model("resnet50", 0.125, 10, data.input_shape), data, few, **settings)
    assert rows[-1]["train_loss"] < 0.9 * GUESSING


def test_a_sparse_run_that_diverges_is_a_result(runs, tmp_path):
    root, names = tmp_path / "R", ("s0.50_k001", "s0.70_k001")
    shutil.copytree(runs, root)
    sane, wild = (root / "sparse/naive" / name for name in ("seed0-seed1", "wild"))
    ends = ("naive", runs / "dense/seed1", runs / "imp/seed0", wild, "--rewind", 1, "--lr", 1e6)
    outcome = sparse(*ends)
    assert outcome.code == 0 and outcome.out.count("diverged in epoch 2") == 2, outcome
    for name in names:
        text = (wild / name / "result.json").read_text()
        found = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
        assert found["diverged"] == 2 and found["test_loss"] is None
        assert 0 <= found["test_acc"] < 50
        assert pd.read_csv(wild / name / "log.csv")["epoch"].tolist() == [2]  # the last it trained
        assert not list((wild / name).glob("*.pt"))
    assert sparse(*ends).out.count("nothing to do") == 2
    assert result(sane / names[0])["diverged"] is None
    for name in names:
        shutil.rmtree(sane / name)
    table = succeed("analyze.results", root)
    assert "2 of 24 runs diverged" in table and f"{wild / names[1]} in epoch 2" in table
    assert pd.read_csv(root / "results.csv")["diverged"].dropna().tolist() == [2, 2]


@pytest.mark.parametrize(
    "name, width", [("mlp", 1), ("vgg11", 1), ("resnet20", 1), ("resnet20", 4)]
)
def test_initial_weights_are_those_of_their_source(name, width):
    """Variances by hand: 2 / fan-in, of VGG11 2 / fan-out. ResNet20 has PyTorch's biases."""
    model = build_model(name, width, 10, (3, 32, 32), seed=1)
    for layer in model.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        weights, fan_in = layer.weight.detach(), layer.weight[0].numel()
        fan = len(weights) * weights[0, 0].numel() if name == "vgg11" else fan_in
        last_of_vgg = name == "vgg11" and isinstance(layer, nn.Linear)
        expected = 0.01 if last_of_vgg else (2 / fan) ** 0.5
        tolerance = 5 / (2 * weights.numel()) ** 0.5  # five standard errors of a deviation
        assert float(weights.std() / expected) == pytest.approx(1, abs=tolerance), layer
        if layer.bias is not None:
            largest = float(layer.bias.detach().abs().max())
            assert 0 < largest <= fan_in**-0.5 if name == "resnet20" else largest == 0, layer


def test_resnet50_of_width_1_is_torchvisions():
    with seeded(3):
        expected = torchvision.models.resnet50(num_classes=10).state_dict()
    assert same(build_model("resnet50", 1, 10, (3, 64, 64), seed=3).state_dict(), expected)
