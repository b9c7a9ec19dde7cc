"""Networks in oneDNN's layout compute what they compute outside of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from common.models import build_model
from common.runtime import onednn
from common.runtime.device import autocast
from common.training import train
from tests.conftest import distance, small_resnet
from tests.test_data import resident
from tests.test_training import SETTINGS

CPU = torch.device("cpu")
suited = onednn.suits(build_model("resnet20"))
pytestmark = pytest.mark.skipif(not suited, reason="no oneDNN in bf16 here")


def gradients(model, output):
    return torch.autograd.grad(output.square().sum(), [*model.parameters()], retain_graph=True)


def test_a_step_of_a_resnet_is_near_to_that_in_fp32():
    exact, model, images = small_resnet(), small_resnet(), torch.randn(64, 3, 8, 8)
    with autocast(model, CPU, "bf16"):
        logits = model(images).float()
    steps = gradients(exact, exact(images)), gradients(model, logits)
    assert 0 < distance(*map(dict, map(enumerate, steps))) < 0.3
    assert distance(exact.state_dict(), model.state_dict()) < 0.01  # of BatchNorm's statistics


STAY = F.relu, lambda x: x.relu(), lambda x: x + x
WHOLE = nn.Conv2d(4, 4, 8, bias=False)  # of 8 px: its output is a number a channel
LEAVE = (
    lambda x: x + WHOLE(x),
    lambda x: torch.add(x, other=x),
    lambda x: x + 1,
    lambda x: F.max_pool2d(x, 2),
    lambda x: torch.cat([x, x.roll(1, 1)], dim=1)[:, :3],
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4).eval(),
)


def test_what_stays_in_the_layout_and_what_leaves_it():
    model, images = small_resnet(), torch.randn(4, 3, 8, 8)
    with autocast(model, CPU, "bf16"):
        x = model.conv1(images)
        for stays, functions in ((True, STAY), (False, LEAVE)):
            for function in functions:
                value, expected = function(x), function(x.to_dense())
                assert value.is_mkldnn == stays
                assert torch.equal(onednn._plain(value), expected)
        assert x.is_mkldnn and model.bn1(x).is_mkldnn and model.blocks[0](x).is_mkldnn
        with torch.no_grad():
            assert model.bn1.eval()(x).is_mkldnn
        with pytest.raises(RuntimeError, match="type"):
            model.conv1(images.double())  # as outside
        with torch.autocast("cpu", enabled=False):
            assert model.conv1(images).dtype == torch.float32


@pytest.mark.parametrize(
    "enters, how",
    [
        (True, {"stride": 2, "padding": 1, "groups": 2}),
        (True, {"padding": 2, "dilation": 2}),
        (False, {"padding": "same"}),
        (False, {"bias": True}),
    ],
)
def test_convolutions_of_whole_numbers_are_exact(enters, how):
    """Weights so small and whole that bf16 holds all values, and gradients, exactly."""
    layer = nn.Conv2d(4, 4, 3, **{"bias": False} | how)
    images = torch.randint(-1, 2, (3, 4, 8, 8)).float()
    for parameter in layer.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape).float()
    with autocast(small_resnet(), CPU, "bf16"):
        found = layer(images)
    assert found.is_mkldnn == enters
    outputs = onednn._plain(found), layer(images)
    ends = [[out, *gradients(layer, out.float().clamp(-1, 1))] for out in outputs]
    assert all(torch.equal(one.float(), other) for one, other in zip(*ends, strict=True))


def test_training_is_in_the_layout_and_diverging_is_an_error(tmp_path):
    """oneDNN's ReLU makes zeros of NaN, so that a loss tells nothing."""
    model, seen, settings = small_resnet(), [], SETTINGS | {"precision": "bf16"}
    model.conv1.register_forward_hook(lambda _, inputs, output: seen.append(output.is_mkldnn))
    train(model, resident(count=8), [0.1], folder=None, **settings)
    assert seen == [True, True, False]  # evaluation is in fp32
    with pytest.raises(UserError, match="diverged in epoch 1"):
        train(model, resident(count=8), [1e20], folder=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, arguments", [("mul_", (2,)), ("__setitem__", (0, 0))])
def test_what_would_change_the_layout_in_place_is_an_error(name, arguments):
    model = small_resnet()
    model.conv1.register_forward_hook(lambda _, inputs, x: getattr(x, name)(*arguments))
    with autocast(model, CPU, "bf16"), pytest.raises(UserError, match=name):
        model(torch.ones(2, 3, 8, 8))


def test_networks_that_gain_nothing_stay_outside():
    others = [build_model(name, 0.25) for name in ("mlp", "vgg11", "resnet50")]
    assert not any(map(onednn.suits, (*others, torch.compile(small_resnet()))))
