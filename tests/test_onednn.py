"""Networks compute the same in oneDNN's blocked layout as without it."""

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
suited = onednn.is_suited(build_model("resnet20"))
pytestmark = pytest.mark.skipif(not suited, reason="needs a CPU with bf16 in oneDNN")


def gradients(model, output):
    return torch.autograd.grad(output.square().sum(), [*model.parameters()], retain_graph=True)


def test_gradients_of_a_resnet_are_close_to_fp32():
    exact, model, images = small_resnet(), small_resnet(), torch.randn(64, 3, 8, 8)
    with autocast(model, CPU, "bf16"):
        logits = model(images).float()
    pair = gradients(exact, exact(images)), gradients(model, logits)
    assert 0 < distance(*map(dict, map(enumerate, pair))) < 0.3
    assert distance(exact.state_dict(), model.state_dict()) < 0.01  # BatchNorm statistics


KEEP_LAYOUT = F.relu, lambda x: x.relu(), lambda x: x + x
GLOBAL_CONV = nn.Conv2d(4, 4, 8, bias=False)  # (N, 4, 8, 8) -> (N, 4, 1, 1), which broadcasts
BECOME_DENSE = (
    lambda x: x + GLOBAL_CONV(x),
    lambda x: torch.add(x, other=x),
    lambda x: x + 1,
    lambda x: F.max_pool2d(x, 2),
    lambda x: torch.cat([x, x.roll(1, 1)], dim=1)[:, :3],
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4).eval(),
)


def test_which_functions_keep_the_layout():
    model, images = small_resnet(), torch.randn(4, 3, 8, 8)
    with autocast(model, CPU, "bf16"):
        x = model.conv1(images)
        for keeps, functions in ((True, KEEP_LAYOUT), (False, BECOME_DENSE)):
            for function in functions:
                output, expected = function(x), function(x.to_dense())
                assert output.is_mkldnn == keeps
                assert torch.equal(onednn._to_dense(output), expected)
        assert x.is_mkldnn and model.bn1(x).is_mkldnn and model.blocks[0](x).is_mkldnn
        with torch.no_grad():
            assert model.bn1.eval()(x).is_mkldnn
        with pytest.raises(RuntimeError, match="type"):
            model.conv1(images.double())  # as without the layout
        with torch.autocast("cpu", enabled=False):
            assert model.conv1(images).dtype == torch.float32


@pytest.mark.parametrize(
    "uses_layout, options",
    [
        (True, {"stride": 2, "padding": 1, "groups": 2}),
        (True, {"padding": 2, "dilation": 2}),
        (False, {"padding": "same"}),
        (False, {"bias": True}),
    ],
)
def test_convolutions_of_integers_are_exact(uses_layout, options):
    """Small integers: bf16 represents all values and gradients exactly."""
    layer = nn.Conv2d(4, 4, 3, **{"bias": False} | options)
    images = torch.randint(-1, 2, (3, 4, 8, 8)).float()
    for parameter in layer.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape).float()
    with autocast(small_resnet(), CPU, "bf16"):
        output = layer(images)
    assert output.is_mkldnn == uses_layout
    outputs = onednn._to_dense(output), layer(images)
    tensors = [[out, *gradients(layer, out.float().clamp(-1, 1))] for out in outputs]
    assert all(torch.equal(bf16.float(), fp32) for bf16, fp32 in zip(*tensors, strict=True))


def test_training_uses_the_layout_and_detects_divergence(tmp_path):
    """oneDNN's ReLU turns NaN into 0, so the loss does not show a divergence."""
    model, in_layout, settings = small_resnet(), [], SETTINGS | {"precision": "bf16"}
    model.conv1.register_forward_hook(lambda _, inputs, output: in_layout.append(output.is_mkldnn))
    train(model, resident(count=8), [0.1], folder=None, **settings)
    assert in_layout == [True, True, False]  # the last evaluation is in fp32
    with pytest.raises(UserError, match="diverged in epoch 1"):
        train(model, resident(count=8), [1e20], folder=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, arguments", [("mul_", (2,)), ("__setitem__", (0, 0))])
def test_in_place_operations_on_the_layout_are_errors(name, arguments):
    model = small_resnet()
    model.conv1.register_forward_hook(lambda _, inputs, x: getattr(x, name)(*arguments))
    with autocast(model, CPU, "bf16"), pytest.raises(UserError, match=name):
        model(torch.ones(2, 3, 8, 8))


def test_other_networks_do_not_use_the_layout():
    others = [build_model(name, 0.25) for name in ("mlp", "vgg11", "resnet50")]
    assert not any(map(onednn.is_suited, (*others, torch.compile(small_resnet()))))
