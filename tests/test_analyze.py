"""The line between two networks: interpolation and REPAIR."""

import copy
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from analyze.lib.lines import evaluate_line, interpolate, rescale
from common.masking import layer_weights
from common.models import build_model


def test_interpolation_by_hand():
    source = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}
    target = {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(5)}
    state = interpolate(source, target, 0.25)
    assert state["w"].tolist() == [0.25, 3] and state["n"] == 5


@pytest.mark.parametrize("name, size", [("mlp", 8), ("vgg11", 32)])
def test_rescaling_brings_every_hidden_layer_to_the_goal(name, size):
    models = [build_model(name, 0.125, 10, (3, size, size), seed).eval() for seed in (0, 1, 2)]
    images = torch.randn(40, 3, size, size)
    endpoints = [rescale(model, images) for model in models[:2]]
    goal = interpolate(*endpoints, 0.25)
    rescale(models[2], images, goal)
    statistics = rescale(models[2], images)
    assert len(statistics) == len(layer_weights(models[2])) - 1  # not the output
    for name, values in statistics.items():
        for value, *pair in zip(values, endpoints[0][name], endpoints[1][name], strict=True):
            assert torch.allclose(value, 0.75 * pair[0] + 0.25 * pair[1], atol=1e-4), name


def test_statistics_of_a_layer_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(2, 1))
    model[0].weight.data, model[0].bias.data = torch.full((1, 1, 1, 1), 2.0), torch.ones(1)
    # The outputs are 3, 5, 7 and 9.
    statistics = rescale(model, torch.tensor([[1.0, 2], [3, 4]]).view(2, 1, 1, 2))["0"]
    assert [float(value) for value in statistics] == pytest.approx([6, 5**0.5])


@pytest.mark.parametrize("name, width", [("mlp", 0.125), ("resnet20", 0.25)])
def test_repair_at_the_endpoints_changes_nothing_and_interpolation_meets_them(name, width):
    model, images = build_model(name, width, 10, (3, 8, 8)), torch.randn(40, 3, 8, 8)
    if name == "resnet20":
        update_bn([images], model)
    source, labels = copy.deepcopy(model.state_dict()), torch.randint(10, (40,))
    perturbed = {
        key: value + 0.3 * torch.randn_like(value)
        for key, value in source.items()
        if value.dim() > 1
    }

    def evaluate(test):
        loaders = partial(iter, [(test, labels[20:])]), partial(iter, [(images, labels)])
        rows = evaluate_line(model, source, source | perturbed, (0.0, 0.5, 1.0), *loaders)
        return pd.DataFrame(rows).set_index(["alpha", "repair"])

    table = evaluate(images[:20])
    loss = table["test_loss"]
    assert loss[0.0, True] == pytest.approx(loss[0.0, False], rel=1e-4)
    assert loss[0.5, True] != pytest.approx(loss[0.5, False], rel=1e-4)
    if name == "mlp":  # the target's BatchNorm statistics are the source's
        assert loss[1.0, True] == pytest.approx(loss[1.0, False], rel=1e-4)
    # REPAIR uses only training images.
    assert evaluate(torch.randn(20, 3, 8, 8))["train_loss"].equals(table["train_loss"])
