"""Initialisation of every network, and that it learns at the paper's settings in a few steps."""

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


def colour_patterns(_, image_size):
    """A data set with ten classes of four random colours each, plus noise."""
    colours = 128 + 60 * nn.functional.interpolate(torch.randn(10, 3, 2, 2), image_size or 32)

    def images(count):
        labels = torch.arange(count) % 10
        noisy = colours[labels] + 40 * torch.randn(count, *colours.shape[1:])
        return noisy.clamp(0, 255).byte(), labels

    return *images(640), *images(100), list("0123456789"), None


@pytest.fixture
def learn(monkeypatch, tmp_path):
    """Train a dense network on `colour_patterns`, by the defaults of stage 1 plus some flags."""
    monkeypatch.setitem(SMALL_IMAGES, "glyphs", colour_patterns)
    return lambda flags: succeed("train_dense --device cpu --out", tmp_path, flags)


MODELS = (
    "--model mlp --epochs 3",
    "--model vgg11 --width 0.25 --epochs 3",
    "--model resnet20 --image-size 16 --epochs 6",
)


@pytest.mark.parametrize("flags", MODELS)
def test_a_network_learns_at_the_defaults_of_stage_1(learn, tmp_path, flags):
    """In the best epoch: at a learning rate of 0.08 the loss on such simple images rises again."""
    learn(flags)
    losses = pd.read_csv(tmp_path / "seed0/log.csv")["test_loss"]
    assert losses.min() < 0.9 * math.log(10)  # the loss at chance level


def test_a_run_that_ends_at_chance_says_so(learn, tmp_path):
    for seed, lr in enumerate((1e-9, 0.02)):
        out = learn(f"--model mlp --width 0.25 --epochs 1 --seed {seed} --lr {lr}")
        assert ("has hardly learned" in out) == (lr < 0.01)


def test_a_sparse_run_that_diverges_is_a_result(runs, ends, tmp_path):
    root = shutil.copytree(runs, tmp_path / "R")
    converged, diverged = (root / "sparse/naive" / name for name in ("seed0-seed1", "diverged"))
    command = stage4("naive", *ends[1:], diverged, "--rewind 1 --sparsity 0.7 --lr 1000000.0")
    assert "diverged in epoch 2" in succeed(*command)
    run = diverged / "s0.70_k001"
    # JSON has no NaN.
    record = json.loads((run / "result.json").read_text(), parse_constant=pytest.fail)
    assert record["diverged"] == 2 and record["test_loss"] is None and 0 <= record["test_acc"] < 50
    assert pd.read_csv(run / "log.csv")["epoch"].tolist() == [2]  # the last epoch
    assert not list(run.glob("*.pt"))
    assert "nothing to do" in succeed(*command)
    assert result(converged / run.name)["diverged"] is None
    shutil.rmtree(converged / run.name)
    out = succeed("analyze.results", root)
    assert "1 of 24 runs diverged" in out and f"{run} in epoch 2" in out
    assert pd.read_csv(root / "results.csv")["diverged"].dropna().tolist() == [2]


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20"])
def test_initial_weights_have_the_documented_variance(name):
    """Variance 2 / fan-in, in VGG11 2 / fan-out; ResNet20 has PyTorch's default bias."""
    model = build_model(name, 1, 10, (3, 32, 32), seed=1)
    for layer in model.modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        weights, fan_in = layer.weight.detach(), layer.weight[0].numel()
        expected = (2 / fan_in) ** 0.5
        if name == "vgg11":  # 3x3 convolutions and a linear layer
            expected = (2 / (len(weights) * 9)) ** 0.5 if weights.dim() == 4 else 0.01
        tolerance = 5 / (2 * weights.numel()) ** 0.5  # five standard errors
        assert float(weights.std() / expected) == pytest.approx(1, abs=tolerance), layer
        if layer.bias is not None:
            largest = float(layer.bias.detach().abs().max())
            assert 0 < largest <= fan_in**-0.5 if name == "resnet20" else largest == 0, layer


def test_resnet50_of_width_1_is_torchvisions():
    with seeded(3):
        expected = torchvision.models.resnet50(num_classes=10).state_dict()
    assert same(build_model("resnet50", 1, 10, (3, 64, 64), seed=3).state_dict(), expected)
