"""Every network starts as its source says, and learns at the paper's settings in some steps."""

import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch import nn

from common.models import build_model
from common.runtime.seeding import seeded
from common.vision import torchvision
from tests.conftest import result, same, sparse, succeed

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

    def dense(flags):
        usual = f"--dataset folder --data-dir {patterns} --device cpu --out {tmp_path}/dense"
        return succeed("train_dense", usual, flags)

    return dense


def learned(folder):
    """Whether the network of a run was ever better than guessing."""
    return pd.read_csv(folder / "log.csv")["test_loss"].min() < 0.9 * GUESSING


MODELS = (
    "--model mlp --epochs 3",
    "--model vgg11 --width 0.25 --epochs 7",
    "--model resnet20 --image-size 16 --epochs 6",
)


@pytest.mark.parametrize("model", MODELS)
def test_a_network_learns_at_the_defaults_of_stage_1(learn, tmp_path, model):
    """At some epoch: images as plain as these are forgotten again, at a learning rate of 0.08."""
    learn(model)
    assert learned(tmp_path / "dense/seed0")


def test_a_run_that_ends_at_chance_says_so(learn, tmp_path):
    for lr in (1e-9, 0.02):
        text = learn(f"--model mlp --width 0.25 --epochs 1 --lr {lr} --out {tmp_path}/{lr}")
        assert ("ends at chance" in text) == (lr < 0.01)


def test_a_sparse_run_that_diverges_is_a_result(runs, ends, tmp_path):
    root = shutil.copytree(runs, tmp_path / "R")
    sane, wild = (root / "sparse/naive" / name for name in ("seed0-seed1", "wild"))
    naive = ("naive", *ends[1:], wild, "--rewind 1 --sparsity 0.7 --lr 1000000.0")
    outcome, cell = sparse(*naive), wild / "s0.70_k001"
    assert outcome.code == 0 and "diverged in epoch 2" in outcome.out, outcome
    # NaN is no JSON.
    found = json.loads((cell / "result.json").read_text(), parse_constant=pytest.fail)
    assert found["diverged"] == 2 and found["test_loss"] is None and 0 <= found["test_acc"] < 50
    assert pd.read_csv(cell / "log.csv")["epoch"].tolist() == [2]  # the last it trained
    assert not list(cell.glob("*.pt"))
    assert "nothing to do" in sparse(*naive).out
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
        if name == "vgg11":
            convolution = weights.dim() == 4
            expected = (2 / (len(weights) * 9)) ** 0.5 if convolution else 0.01
        tolerance = 5 / (2 * weights.numel()) ** 0.5  # five standard errors of a deviation
        assert float(weights.std() / expected) == pytest.approx(1, abs=tolerance), layer
        if layer.bias is not None:
            largest = float(layer.bias.detach().abs().max())
            assert 0 < largest <= fan_in**-0.5 if name == "resnet20" else largest == 0, layer


def test_resnet50_of_width_1_is_torchvisions():
    with seeded(3):
        expected = torchvision.models.resnet50(num_classes=10).state_dict()
    assert same(build_model("resnet50", 1, 10, (3, 64, 64), seed=3).state_dict(), expected)
