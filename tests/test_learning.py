"""Every network starts as its source says, and learns at the paper's settings in some steps."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from torch import nn

from common.data import SMALL_IMAGES
from common.models import build_model
from common.runtime.seeding import seeded
from common.vision import torchvision
from tests.conftest import result, same, stage4, succeed


def patterns(_, size):
    """Ten classes: four random colours each, under noise."""
    colours = 128 + 60 * nn.functional.interpolate(torch.randn(10, 3, 2, 2), size or 32)

    def images(count):
        labels = torch.arange(count) % 10
        noisy = colours[labels] + 40 * torch.randn(count, *colours.shape[1:])
        return noisy.clamp(0, 255).byte(), labels

    return *images(640), *images(100), list("0123456789"), None


@pytest.fixture
def learn(monkeypatch, tmp_path):
    """Trains a dense network on them, by the defaults of stage 1 but for some flags."""
    monkeypatch.setitem(SMALL_IMAGES, "glyphs", patterns)
    return lambda flags: succeed("train_dense --device cpu --out", tmp_path, flags)


MODELS = (
    "--model mlp --epochs 3",
    "--model vgg11 --width 0.25 --epochs 3",
    "--model resnet20 --image-size 16 --epochs 6",
)


@pytest.mark.parametrize("flags", MODELS)
def test_a_network_learns_at_the_defaults_of_stage_1(learn, tmp_path, flags):
    """In some epoch: at a learning rate of 0.08, images as plain as these are forgotten again."""
    learn(flags)
    losses = pd.read_csv(tmp_path / "seed0/log.csv")["test_loss"]
    assert losses.min() < 0.9 * math.log(10)  # that of guessing


def test_a_run_that_ends_at_chance_says_so(learn, tmp_path):
    for seed, lr in enumerate((1e-9, 0.02)):
        text = learn(f"--model mlp --width 0.25 --epochs 1 --seed {seed} --lr {lr}")
        assert ("has hardly learned" in text) == (lr < 0.01)


def test_a_sparse_run_that_diverges_is_a_result(runs, ends, tmp_path):
    root = shutil.copytree(runs, tmp_path / "R")
    sane, wild = (root / "sparse/naive" / name for name in ("seed0-seed1", "wild"))
    naive = stage4("naive", *ends[1:], wild, "--rewind 1 --sparsity 0.7 --lr 1000000.0")
    assert "diverged in epoch 2" in succeed(*naive)
    cell = wild / "s0.70_k001"
    # NaN is no JSON.
    found = json.loads((cell / "result.json").read_text(), parse_constant=pytest.fail)
    assert found["diverged"] == 2 and found["test_loss"] is None and 0 <= found["test_acc"] < 50
    assert pd.read_csv(cell / "log.csv")["epoch"].tolist() == [2]  # the last it trained
    assert not list(cell.glob("*.pt"))
    assert "nothing to do" in succeed(*naive)
    assert result(sane / cell.name)["diverged"] is None
    shutil.rmtree(sane / cell.name)
    table = succeed("analyze.results", root)
    assert "1 of 24 runs diverged" in table and f"{cell} in epoch 2" in table
    assert pd.read_csv(root / "results.csv")["diverged"].dropna().tolist() == [2]


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20"])
def test_initial_weights_are_those_of_their_source(name):
    """Variances by hand: 2 / fan-in, of VGG11 2 / fan-out. ResNet20 has PyTorch's biases."""
    model = build_model(name, 1, 10, (3, 32, 32), seed=1)
    for layer in model.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        weights, fan_in = layer.weight.detach(), layer.weight[0].numel()
        expected = (2 / fan_in) ** 0.5
        if name == "vgg11":  # a convolution of 3x3, or a linear layer
            expected = (2 / (len(weights) * 9)) ** 0.5 if weights.dim() == 4 else 0.01
        tolerance = 5 / (2 * weights.numel()) ** 0.5  # five standard errors of a deviation
        assert float(weights.std() / expected) == pytest.approx(1, abs=tolerance), layer
        if layer.bias is not None:
            largest = float(layer.bias.detach().abs().max())
            assert 0 < largest <= fan_in**-0.5 if name == "resnet20" else largest == 0, layer


def test_resnet50_of_width_1_is_torchvisions():
    with seeded(3):
        expected = torchvision.models.resnet50(num_classes=10).state_dict()
    assert same(build_model("resnet50", 1, 10, (3, 64, 64), seed=3).state_dict(), expected)
