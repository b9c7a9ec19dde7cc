"""Networks in oneDNN's layout compute what they compute outside of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from analyze.lib.repair import recompute_batch_norm
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
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.first(x))
        again = F.conv2d(x, self.strided.weight, stride=2, padding=1, groups=2)
        y = F.relu(self.strided(x)) + again
        y += F.max_pool2d(x, 2)
        y = y + self.strided(x)
        w = self.strided(x)
        y += w + self.whole(w)  # broadcasts
        assert y.shape[1:] == (4, 4, 4) and y.size(1) == 4
        z = torch.add(torch.cat([self.strided(x), y], 1)[:, :4], other=self.strided(x))
        joined = torch.cat([self.biased(y), y.roll(1, 1)], dim=1)
        y = self.dilated(joined) + self.same(y) + z
        return self.out((y + 1).amax((2, 3)))


def test_whole_numbers_go_through_exactly():
    """Weights so small and whole that bf16 holds all values exactly."""
    generator, model, seen = torch.Generator().manual_seed(0), Mixture(), []
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
        parameter.data[torch.rand(parameter.shape, generator=generator) < 0.7] = 0
    images = torch.randint(-1, 2, (3, 2, 8, 8), generator=generator.manual_seed(1)).float()
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.is_mkldnn))
    expected = model(images)
    assert not any(seen) and 4 < expected.abs().max() < 256
    seen.clear()
    with autocast(model, CPU, "bf16"):
        logits = model(images)
    assert torch.equal(logits.float(), expected)
    # In the order of forward: a bias and "same" stay outside.
    assert seen == [True] * 7 + [False, True, False]
    both = [
        torch.autograd.grad(out.float().square().sum(), [*model.parameters()])
        for out in (logits, expected)
    ]
    for some, others in zip(*both):
        assert torch.allclose(some, others, rtol=0.02, atol=0.02 * float(others.abs().max()))
        assert others.any()


def error(parts, others):
    """Of lists of tensors, relative to `others`."""
    some, others = (torch.cat([part.detach().flatten() for part in one]) for one in (parts, others))
    return float((some - others).norm() / others.norm())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_step_of_resnet20_is_as_near_to_fp32_as_outside(form):
    model = build_model("resnet20", 0.5, 10, (3, 16, 16), seed=1).to(memory_format=form)
    images, labels = torch.randn(32, 3, 16, 16).to(memory_format=form), torch.arange(32) % 10
    exact, inside, _ = models = [copy.deepcopy(model) for _ in range(3)]
    contexts = (
        autocast(exact, CPU, "fp32"),
        autocast(inside, CPU, "bf16"),
        torch.autocast("cpu", torch.bfloat16),
    )
    logits, gradients = [], []
    for one, context in zip(models, contexts):
        with context:
            logits.append(one(images).float())
        F.cross_entropy(logits[-1], labels).backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    expected, ours, theirs = logits
    assert not torch.equal(ours, theirs)  # the layout was used
    assert error([ours], [expected]) < 1.5 * error([theirs], [expected]) < 0.1
    near, as_near = error(gradients[1], gradients[0]), error(gradients[2], gradients[0])
    assert near < 1.5 * as_near < 1
    for name, value in inside.named_buffers():
        assert torch.allclose(value, exact.get_buffer(name), rtol=0.02, atol=0.02), name
    exact.eval(), inside.eval()
    with torch.no_grad(), autocast(inside, CPU, "bf16"):
        ours = inside(images).float()
    assert error([ours], [exact(images)]) < 0.05


def test_what_stays_in_the_layout():
    model, images = small_resnet(), torch.randn(4, 3, 8, 8)
    norm, plain = model.bn1, nn.BatchNorm2d(4, affine=False)
    with autocast(model, CPU, "bf16"):
        x = model.conv1(images)
        stay = [x, norm(x), F.relu(x), torch.relu(x), x.relu(), x + x, x.add(x), torch.add(x, x)]
        assert all(value.is_mkldnn for value in (*stay, model.blocks[0](x)))
        sums = (norm(x) + plain(x)).sum()
        leave = [plain(x), norm.eval()(x), x + 1, x * x, x + x.sum((2, 3), keepdim=True)]
        assert not any(value.is_mkldnn for value in (*leave, F.max_pool2d(x, 2)))
        with torch.no_grad():
            assert norm(x).is_mkldnn
        sums.backward()
        for other in (images[0], images.double()):
            weight = model.conv1.weight.to(other.dtype)
            assert not F.conv2d(other, weight, None, (1, 1), (1, 1), (1, 1), 1).is_mkldnn
        with pytest.raises(RuntimeError, match="type"):
            model.conv1(images.double())  # as outside
        with torch.autocast("cpu", enabled=False):
            assert model.conv1(images).dtype == torch.float32
        seen, x = [], model.conv1(images)
        x.register_hook(seen.append)
        x.sum().backward()
        assert len(seen) == 1


def test_training_is_in_the_layout():
    data, model, seen = resident(count=8), small_resnet(), []
    model.conv1.register_forward_hook(lambda _, inputs, output: seen.append(output.is_mkldnn))
    train(model, data, [0.1], folder=None, **SETTINGS | {"precision": "bf16"})
    assert seen == [True, True, False]  # two steps, and the final evaluation, which is in fp32
    assert model.conv1.weight.is_contiguous()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_network_that_diverges_is_an_error(tmp_path, precision):
    """oneDNN's ReLU makes zeros of NaN, so that a loss tells nothing."""
    settings = SETTINGS | {"precision": precision, "folder": tmp_path}
    with pytest.raises(UserError, match="diverged in epoch 1"):
        train(small_resnet(), resident(count=8), [1e20], **settings)
    assert not list(tmp_path.iterdir())


def double(x):
    x.mul_(2)


def clear(x):
    x[:, 0] = 0


@pytest.mark.parametrize("change, name", [(double, "mul_"), (clear, "__setitem__")])
def test_what_would_change_the_layout_in_place_is_an_error(change, name):
    model = small_resnet()
    model.conv1.register_forward_hook(lambda layer, inputs, output: change(output))
    model(torch.ones(2, 3, 8, 8))
    with autocast(model, CPU, "bf16"), pytest.raises(UserError, match=name):
        model(torch.ones(2, 3, 8, 8))


def test_networks_that_gain_nothing_stay_outside():
    for name in ("mlp", "vgg11", "resnet50"):
        assert not onednn.suits(build_model(name, 0.25))
    compiled, images = build_model("resnet20", 1), torch.ones(2, 3, 8, 8)
    compiled._orig_mod = nn.Identity()
    assert not onednn.suits(compiled)
    model = small_resnet()
    with autocast(model, CPU, "fp32"):
        assert not model.conv1(images).is_mkldnn
