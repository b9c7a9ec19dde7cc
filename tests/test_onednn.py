"""Networks in oneDNN's layout compute what they compute outside of it."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from common.models import build_model
from common.runtime import onednn
from common.runtime.device import autocast
from common.training import train
from tests.conftest import small_resnet
from tests.test_data import resident
from tests.test_training import SETTINGS

CPU = torch.device("cpu")
suited = onednn.suits(build_model("resnet20"))
pytestmark = pytest.mark.skipif(not suited, reason="no oneDNN in bf16 here")


class Mixture(nn.Module):
    """Operations that stay in the layout, leave it, come back, and never enter."""

    in_onednn = True

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False)
        self.biased = nn.Conv2d(4, 4, 1)
        self.same = nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.dilated = nn.Conv2d(8, 4, 3, padding=2, dilation=2, bias=False)
        self.whole = nn.Conv2d(4, 4, 4, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = F.relu(self.strided(x)) + F.max_pool2d(x, 2)
        y += self.strided(x) + self.whole(self.strided(x))  # broadcasts
        z = torch.add(torch.cat([self.strided(x), y], 1)[:, :4], other=self.strided(x))
        joined = torch.cat([self.biased(y), y.roll(1, 1)], dim=1)
        return (self.dilated(joined) + self.same(y) + z + 1).amax((2, 3))


def test_whole_numbers_go_through_exactly():
    """Weights so small and whole that bf16 holds all values exactly."""
    generator, model = torch.Generator().manual_seed(1), Mixture()
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
        parameter.data[torch.rand(parameter.shape, generator=generator) < 0.7] = 0
    images = torch.randint(-1, 2, (3, 2, 8, 8), generator=generator).float()
    expected = model(images)
    assert 4 < expected.abs().max() < 256
    with autocast(model, CPU, "bf16"):
        logits = model(images)
    assert torch.equal(logits.float(), expected)
    for some, others in zip(*(gradients(model, out.float()) for out in (logits, expected))):
        assert torch.allclose(some, others, rtol=0.02, atol=0.02 * float(others.abs().max()))


def gradients(model, output):
    return torch.autograd.grad(output.square().sum(), [*model.parameters()], retain_graph=True)


def test_a_step_of_resnet20_is_as_near_to_fp32_as_outside():
    exact, images = build_model("resnet20", 0.5, 10, (3, 16, 16)), torch.randn(32, 3, 16, 16)
    inside, outside, steps = copy.deepcopy(exact), copy.deepcopy(exact), []
    outside_of_it = torch.autocast("cpu", torch.bfloat16)
    ways = ((exact, contextlib.nullcontext()), (outside, outside_of_it))
    for model, precision in (*ways, (inside, autocast(inside, CPU, "bf16"))):
        with precision:
            logits = model(images).float()
        steps.append(torch.cat([*map(torch.flatten, gradients(model, logits))]))
    as_near, near = ((step - steps[0]).norm() / steps[0].norm() for step in steps[1:])
    assert near < 1.5 * as_near < 1 and near != as_near
    for one, other in zip(inside.buffers(), exact.buffers()):
        assert torch.allclose(one, other, rtol=0.02, atol=0.02)


def test_what_stays_in_the_layout():
    model, images = small_resnet(), torch.randn(4, 3, 8, 8)
    norm, plain = model.bn1, nn.BatchNorm2d(4, affine=False)
    with autocast(model, CPU, "bf16"):
        x = model.conv1(images)
        stay = [x, norm(x), F.relu(x), torch.relu(x), x.relu(), x + x, x.add(x), torch.add(x, x)]
        assert all(value.is_mkldnn for value in (*stay, model.blocks[0](x)))
        leave = [plain(x), norm.eval()(x), x + 1, x * x, x + x.sum((2, 3), keepdim=True)]
        assert not any(value.is_mkldnn for value in (*leave, F.max_pool2d(x, 2)))
        with torch.no_grad():
            assert norm(x).is_mkldnn
        (stay[1] + plain(x)).sum().backward()
        with pytest.raises(RuntimeError, match="type"):
            model.conv1(images.double())  # as outside
        with torch.autocast("cpu", enabled=False):
            assert model.conv1(images).dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_is_in_the_layout_and_diverging_is_an_error(tmp_path, precision):
    """oneDNN's ReLU makes zeros of NaN, so that a loss tells nothing."""
    model, seen, settings = small_resnet(), [], SETTINGS | {"precision": precision}
    model.conv1.register_forward_hook(lambda _, inputs, output: seen.append(output.is_mkldnn))
    train(model, resident(count=8), [0.1], folder=None, **settings)
    assert seen == [precision == "bf16"] * 2 + [False]  # evaluation is in fp32
    with pytest.raises(UserError, match="diverged in epoch 1"):
        train(model, resident(count=8), [1e20], folder=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def clear(x):
    x[:, 0] = 0


@pytest.mark.parametrize("change, name", [(lambda x: x.mul_(2), "mul_"), (clear, "__setitem__")])
def test_what_would_change_the_layout_in_place_is_an_error(change, name):
    model = small_resnet()
    model.conv1.register_forward_hook(lambda layer, inputs, output: change(output) and None)
    with autocast(model, CPU, "bf16"), pytest.raises(UserError, match=name):
        model(torch.ones(2, 3, 8, 8))


def test_networks_that_gain_nothing_stay_outside():
    compiled = small_resnet()
    compiled._orig_mod = nn.Identity()
    others = [build_model(name, 0.25) for name in ("mlp", "vgg11", "resnet50")]
    assert not any(map(onednn.suits, (*others, compiled)))
