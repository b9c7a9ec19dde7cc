import copy
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from analyze.lib.lines import interpolate, metrics_along, rescale
from common.masking import layer_weights
from common.models import build_model


def test_line_by_hand():
    source = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}
    target = {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(5)}
    found = interpolate(source, target, 0.25)
    assert found["w"].tolist() == [0.25, 3] and found["n"] == 5


@pytest.mark.parametrize("name, size", [("mlp", 8), ("vgg11", 32)])
def test_rescaling_brings_every_hidden_layer_to_the_goal(name, size):
    models = [build_model(name, 0.125, 10, (3, size, size), seed).eval() for seed in (0, 1, 2)]
    images = torch.randn(40, 3, size, size)
    ends = [rescale(model, images) for model in models[:2]]
    goal = interpolate(*ends, 0.25)
    rescale(models[2], images, goal)
    found = rescale(models[2], images)
    assert len(found) == len(layer_weights(models[2])) - 1  # not the output
    for key, values in found.items():
        for value, *pair in zip(values, ends[0][key], ends[1][key], strict=True):
            assert torch.allclose(value, 0.75 * pair[0] + 0.25 * pair[1], atol=1e-4), key


def test_statistics_of_a_layer_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(2, 1))
    model[0].weight.data, model[0].bias.data = torch.full((1, 1, 1, 1), 2.0), torch.ones(1)
    # 3, 5, 7 and 9 come out.
    found = rescale(model, torch.tensor([[1.0, 2], [3, 4]]).view(2, 1, 1, 2))["0"]
    assert [float(one) for one in found] == pytest.approx([6, 5**0.5])


@pytest.mark.parametrize("name, width", [("mlp", 0.125), ("resnet20", 0.25)])
def test_repair_at_the_endpoints_changes_nothing_and_interpolation_meets_them(name, width):
    model, images = build_model(name, width, 10, (3, 8, 8)), torch.randn(40, 3, 8, 8)
    if name == "resnet20":
        update_bn([images], model)
    source, labels = copy.deepcopy(model.state_dict()), torch.randint(10, (40,))
    noisy = {
        key: value + 0.3 * torch.randn_like(value)
        for key, value in source.items()
        if value.dim() > 1
    }

    def along(test):
        readers = partial(iter, [(test, labels[20:])]), partial(iter, [(images, labels)])
        rows = metrics_along(model, source, source | noisy, (0.0, 0.5), *readers)
        return pd.DataFrame(rows).set_index(["alpha", "repair"])

    table = along(images[:20])
    loss = table["test_loss"]
    assert loss[0.0, True] == pytest.approx(loss[0.0, False], rel=1e-4)
    assert loss[0.5, True] != pytest.approx(loss[0.5, False], rel=1e-4)
    # REPAIR looks at training images alone.
    assert along(torch.randn(20, 3, 8, 8))["train_loss"].equals(table["train_loss"])
