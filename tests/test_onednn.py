"""Networks in oneDNN's layout compute what they compute outside of it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from analyze.repair import recompute_batch_norm
from common import onednn
from common.errors import UserError
from common.models import build_model
from common.training import computing, train
from tests.test_data import resident

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not onednn.suits(build_model("resnet20")), reason="no oneDNN in bf16 here")


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
        y = F.relu(self.strided(x)) + F.conv2d(x, self.strided.weight, stride=2, padding=1, groups=2)
        y += F.max_pool2d(x, 2)
        y = y + self.strided(x)
        w = self.strided(x)
        y += w + self.whole(w)  # broadcasts
        assert y.shape[1:] == (4, 4, 4) and y.size(1) == 4
        z = torch.add(torch.cat([self.strided(x), y], 1)[:, :4], other=self.strided(x))
        y = self.dilated(torch.cat([self.biased(y), y.roll(1, 1)], dim=1)) + self.same(y) + z
        return self.out((y + 1).amax((2, 3)))


def integers(model):
    """Weights so small and whole that bf16 holds all values exactly."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
        parameter.data[torch.rand(parameter.shape, generator=generator) < 0.7] = 0
    return model


def gradients(model, images, labels, precision, blocked=True):
    """Logits and gradients of one step."""
    context = (
        computing(model, CPU, precision) if blocked else torch.autocast("cpu", torch.bfloat16, precision == "bf16")
    )
    model.zero_grad()
    with context:
        logits = model(images).float()
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def test_whole_numbers_go_through_exactly():
    model = integers(Mixture())
    images = torch.randint(-1, 2, (3, 2, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    seen = []
    for layer in (model.first, model.strided, model.biased, model.same, model.dilated, model.whole):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.is_mkldnn))
    expected = model(images)
    assert not any(seen) and expected.abs().max() > 4 and expected.abs().max() < 256
    seen.clear()
    with computing(model, CPU, "bf16"):
        logits = model(images)
    assert torch.equal(logits.float(), expected)
    assert seen == [True] * 7 + [False, True, False]  # the order of forward: a bias and "same" stay outside
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(out.float().square().sum(), weights) for out in (logits, expected))
    for some, others in zip(ours, theirs):
        assert torch.allclose(some, others, rtol=0.02, atol=0.02 * float(others.abs().max()))
    assert sum(float(one.abs().sum()) > 0 for one in theirs) == len(weights)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_step_of_resnet20_is_as_near_to_fp32_as_outside(form):
    model = build_model("resnet20", 0.5, 10, (3, 16, 16), seed=1).to(memory_format=form)
    images, labels = torch.randn(32, 3, 16, 16).to(memory_format=form), torch.arange(32) % 10
    models = [copy.deepcopy(model) for _ in range(3)]
    (exact, expected), (ours, inside), (theirs, outside) = (
        gradients(one, images, labels, precision, blocked)
        for one, precision, blocked in zip(models, ("fp32", "bf16", "bf16"), (True, True, False))
    )

    def error(some, others):
        some, others = (torch.cat([part.flatten() for part in parts]) for parts in (some, others))
        return float(((some - others).norm() / others.norm()).detach())

    assert not torch.equal(ours, theirs)  # the layout was used
    assert error([ours], [exact]) < 1.5 * error([theirs], [exact]) < 0.1
    assert error(inside, expected) < 1.5 * error(outside, expected) < 1
    for name, value in models[1].named_buffers():
        assert torch.allclose(value, models[0].get_buffer(name), rtol=0.02, atol=0.02), name
    for one in models:
        one.eval()
    with torch.no_grad(), computing(models[1], CPU, "bf16"):
        ours = models[1](images).float()
    assert error([ours], [models[0](images)]) < 0.05


def test_what_stays_in_the_layout():
    model, images = build_model("resnet20", 0.25, 10, (3, 8, 8)), torch.randn(4, 3, 8, 8)
    norm, plain = model.bn1, nn.BatchNorm2d(4, affine=False)
    with computing(model, CPU, "bf16"):
        x = model.conv1(images)
        for value in (
            x,
            norm(x),
            F.relu(x),
            torch.relu(x),
            x.relu(),
            x + x,
            x.add(x),
            torch.add(x, x),
            model.blocks[0](x),
        ):
            assert value.is_mkldnn
        for value in (plain(x), norm.eval()(x), x + 1, x * x, x + x.sum((2, 3), keepdim=True), F.max_pool2d(x, 2)):
            assert not value.is_mkldnn
        with torch.no_grad():
            assert norm(x).is_mkldnn
        (norm(x) + plain(x)).sum().backward()
        for other in (images[0], images.double()):
            assert not F.conv2d(other, model.conv1.weight.to(other.dtype), None, (1, 1), (1, 1), (1, 1), 1).is_mkldnn
        with pytest.raises(RuntimeError, match="type"):
            model.conv1(images.double())  # as outside
        with torch.autocast("cpu", enabled=False):
            assert model.conv1(images).dtype == torch.float32
        seen, x = [], model.conv1(images)
        x.register_hook(seen.append)
        x.sum().backward()
        assert len(seen) == 1


def test_training_evaluation_and_repair_are_in_the_layout(tmp_path):
    data = resident(count=8, pad=1)
    model = build_model("resnet20", 0.25, 2, data.input_shape)
    seen = []
    model.conv1.register_forward_hook(lambda layer, inputs, output: seen.append(output.is_mkldnn))
    about = {"name": "test", "folder": tmp_path, "seed": 0, "batch_size": 4, "momentum": 0.9, "weight_decay": 0.01}
    train(model, data, [0.1], precision="bf16", **about)
    recompute_batch_norm(model, [images for images, _ in data.eval_batches("train")], "bf16")
    assert seen == [True] * 4 and model.conv1.weight.is_contiguous()  # two steps, an evaluation, and REPAIR


def test_a_network_that_diverges_is_an_error(tmp_path):
    """oneDNN's ReLU makes zeros of what is no number, so that a loss tells nothing."""
    data = resident(count=8, pad=1)
    about = {"name": "test", "folder": tmp_path, "seed": 0, "batch_size": 4, "momentum": 0.9, "weight_decay": 0.01}
    for precision in ("bf16", "fp32"):
        model = build_model("resnet20", 0.25, 2, data.input_shape)
        with pytest.raises(UserError, match="diverged in epoch 1"):
            train(model, data, [1e20], precision=precision, **about)
    assert not list(tmp_path.iterdir())


def double(x):
    x.mul_(2)


def clear(x):
    x[:, 0] = 0


@pytest.mark.parametrize(("change", "name"), [(double, "mul_"), (clear, "__setitem__")])
def test_what_would_change_the_layout_in_place_is_an_error(change, name):
    class Careless(Mixture):
        def forward(self, x):
            x = self.first(x)
            change(x)
            return x

    model = Careless()
    model(torch.ones(1, 2, 8, 8))
    with computing(model, CPU, "bf16"), pytest.raises(UserError, match=name):
        model(torch.ones(1, 2, 8, 8))


def test_networks_that_gain_nothing_stay_outside():
    assert onednn.suits(build_model("resnet20", 1))
    for name in ("mlp", "vgg11", "resnet50"):
        assert not onednn.suits(build_model(name, 0.25))
    compiled = build_model("resnet20", 1)
    compiled._orig_mod = nn.Identity()
    assert not onednn.suits(compiled)
    model = build_model("resnet20", 0.25, 10, (3, 8, 8))
    with computing(model, CPU, "fp32"):
        assert torch.equal(model(torch.ones(2, 3, 8, 8)), model(torch.ones(2, 3, 8, 8)))
        assert not model.conv1(torch.ones(1, 3, 8, 8)).is_mkldnn
