"""The axes of networks: those that a person would name, and for every network that what they allow
is right.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.align.axes import find_axes
from common.align.permutation import check_same_function, inverse, permute, random_permutation
from common.errors import UserError
from common.models import build_model
from tests.conftest import same


def tell_apart(model, inputs, seed=0):
    """Make every channel of `model` count and differ from the others, at the inputs' scale."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point() and (value.dim() == 1 or value.std() == 0):
            value.add_(torch.rand(value.shape, generator=generator) * 0.5)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None  # the statistics of these inputs
    with torch.no_grad():
        model(inputs)
    return model.eval()


def check_axes(model, input_shape, alone=6):
    """Random permutations of all axes keep the output; one of a single tensor changes it.

    Returns the axes.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, *input_shape, generator=generator)
    tell_apart(model, inputs)
    axes, state = find_axes(model, input_shape), model.state_dict()
    assert axes.dims.keys() == state.keys()
    assert sorted(axis for group in axes.groups for axis in group.axes) == sorted(axes.sizes)
    for seed in (0, 1):
        permutation = random_permutation(axes, seed)
        after = permute(state, axes.dims, permutation)
        check_same_function(model, state, after, inputs[:2])
        assert same(permute(after, axes.dims, inverse(permutation)), state)
    live = [(name, place.dim) for name, places in axes.dims.items() for place in places]
    live = list(dict.fromkeys(live))
    # In double, as a single tensor's part may be small, and rounding is not it.
    model, images = model.double(), inputs[:2].double()
    state = model.state_dict()
    with torch.no_grad():
        expected = model(images)
        for i in torch.randperm(len(live), generator=generator)[:alone].tolist():
            name, dim = live[i]
            one = state | {name: state[name].roll(state[name].shape[dim] // 3 or 1, dim)}
            changed = torch.func.functional_call(model, one, images, tie_weights=False)
            assert (changed - expected).abs().max() > 1e-9 * expected.abs().max(), name
    return axes


class Network(nn.Module):
    """Computes `function(self, x)`, with modules, parameters and tensors of the given names."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def between(body, channels=8):
    """A body, or a list of modules, between a convolution to 8 channels and a linear layer."""
    body = nn.Sequential(*body) if isinstance(body, list) else body
    ends = {"conv": nn.Conv2d(3, 8, 3, padding=1, bias=False), "fc": nn.Linear(channels, 3)}
    return Network(lambda net, x: net.fc(net.body(net.conv(x)).mean((2, 3))), **ends, body=body)


def used_twice(hidden):
    """The layer `two` comes twice."""
    one, two, fc = nn.Linear(3, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)

    def forward(net, x):
        return net.fc(F.relu(net.two(F.relu(net.two(F.relu(net.one(x)))))))

    return Network(forward, one=one, two=two, fc=fc)


# ---------------------------------------------------------------- the axes that a person would name


def layout(axes, name):
    """Of the dimensions of a tensor the axis along it, with its channels and entries of each."""
    return {place.dim: (place.axis, *place.positions.shape) for place in axes.dims[name]}


@pytest.mark.parametrize(
    "name, width, size",
    [("mlp", 0.125, 8), ("vgg11", 0.125, 64), ("resnet20", 0.5, 8), ("resnet50", 0.125, 32)],
)
def test_every_tensor_of_our_networks_moves_with_the_others(name, width, size):
    check_axes(build_model(name, width, 10, (3, size, size)), (3, size, size), alone=999)


def test_a_sum_with_the_input_pins_its_axis_and_says_why():
    conv, fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)
    model = Network(lambda net, x: net.fc((net.conv(x) + x).mean((2, 3))), conv=conv, fc=fc)
    axes = find_axes(model, (3, 8, 8))
    assert axes.sizes == {} and "add" in axes.pinned["conv"][1]


def test_a_layer_that_is_used_twice_ties_its_axes():
    assert check_axes(used_twice(5), (3,)).sizes == {"one": 5}


# ---------------------------------------------------------------- what networks are made of


def test_a_grouped_convolution_moves_in_blocks():
    model = Network(
        lambda net, x: net.three(F.relu(net.two(F.relu(net.one(x))))).mean((2, 3)),
        one=nn.Conv2d(3, 8, 1),
        two=nn.Conv2d(8, 12, 3, groups=4),
        three=nn.Conv2d(12, 5, 1),
    )
    axes = check_axes(model, (3, 6, 6))
    assert axes.sizes == {"one": 8, "two": 12} and axes.groups == ((("one", "two"), 4),)
    assert layout(axes, "two.weight") == {0: ("two", 12, 1), 1: ("one", 8, 1)}
    # Group 1 goes first with its channels swapped, the others follow in order: by hand.
    swap = torch.tensor([3, 2, 0, 1, 4, 5, 6, 7])
    move = torch.tensor([3, 4, 5, 0, 1, 2, *range(6, 12)])
    state, images = model.state_dict(), torch.randn(2, 3, 6, 6)
    moved = permute(state, axes.dims, {"one": swap, "two": move})
    assert torch.equal(moved["two.weight"][0], state["two.weight"][3].flip(0))
    assert torch.equal(moved["two.weight"][3], state["two.weight"][0])
    assert torch.equal(moved["one.weight"], state["one.weight"][swap])
    check_same_function(model, state, moved, images)
    across = torch.tensor([2, 1, 0, 3, 4, 5, 6, 7])  # a channel that changes its group
    moved = permute(state, axes.dims, {"one": across})
    with pytest.raises(RuntimeError, match="another function"):
        check_same_function(model, state, moved, images)


def squeeze_excite(net, x):
    """As timm and others write it."""
    b, c, _, _ = x.size()
    y = F.relu(net.squeeze(x.view(b, c, -1).mean(2)))
    return x * torch.sigmoid(net.excite(y)).view(b, c, 1, 1).expand_as(x)


def layer_scale(net, x):
    """ConvNeXt's way: channels last, a scale that the forward pass reads itself."""
    y = F.gelu(net.fc(net.norm(x.permute(0, 2, 3, 1)))) * net.gamma
    return x + y.permute(0, 3, 1, 2)


def option_a(net, x):
    """The shortcut of He et al. for CIFAR: every second pixel, zero channels."""
    return F.relu(net.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0))


def channelwise(net, x):
    """A parameter as second operand, and one that is spread out first."""
    y = torch.clamp(x.sigmoid().pow(net.power), min=net.floor * 0.5)
    mean = y.mean(axis=(2, 3), keepdim=True)
    return torch.cat([y * net.floor.expand_as(y), y - mean], axis=1)


def across_channels(net, x):
    """A convolution that slides over the channels themselves (Wang et al. 2020)."""
    y = net.gate(x.mean((2, 3)).unsqueeze(1))
    return x * torch.sigmoid(y).squeeze(1)[:, :, None, None]


def turn():
    return Network(lambda net, x: x.permute(0, 2, 3, 1))


def parameter(*shape):
    return nn.Parameter(torch.rand(*shape) + 1)


conv, norm = nn.Conv2d, nn.GroupNorm


def inside_blocks(net, x):
    """Heads that each have a temperature, and values in the other order of dimensions."""
    q, v = net.q(x.mean(3)).unflatten(1, (4, 2)), net.v(x.mean(3)).unflatten(1, (4, 3))
    scores = torch.einsum("bhcq,bhck->bhqk", q, q) * net.temperature
    return torch.einsum("bhqk,bhck->bhcq", scores.softmax(-1), v).flatten(1, 2)[..., None]


class Standardised(nn.Conv2d):
    """Weights standardised on the fly (Qiao et al. 2019)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * self.weight.new_ones(()), self.bias, groups=self.groups)


def shuffled(net, x):
    """ShuffleNet's: two groups interleaved, each half of the result read by a layer of its own."""
    y = net.one(x).view(-1, 2, 4, 8, 8).transpose(1, 2).flatten(1, 2)
    return torch.cat([net.low(y[:, :4]), net.high(y[:, 4:])], 1)


def parts_apart(net, x):
    """Quarters of the channels, and nothing but what happens to them tells them apart."""
    one, two, three, four = (net.norm(x) * net.norm(x).sum(3, keepdim=True)).chunk(4, 1)
    pooled = F.max_pool2d(three, 3, 1, 1), F.avg_pool2d(four, 3, 1, 1)
    return torch.cat([one.relu(), two.sigmoid(), *pooled], 1)


def selective(net, x):
    """A share for each channel of two paths (Li et al. 2019), which are in order."""
    share = net.share(x.mean((2, 3))).unflatten(1, (2, 6)).softmax(1)[..., None, None]
    return (torch.stack([net.one(x), net.two(x)], 1) * share).sum(1)


def blocks_of_blocks(net, x):
    """Pairs of channels are weighed by their sum, against the other pair of their half."""
    y = x.unflatten(1, (2, 2, 2))
    return (y * y.sum(3, keepdim=True).softmax(2)).flatten(1, 3)


CASES = {
    "group norm": ([norm(4, 8), nn.ReLU()], 8, {("conv",): 4}),
    "one group": ([norm(1, 8), nn.PReLU(8)], 8, {("conv",): 1}),
    "instance norm": (
        [nn.InstanceNorm2d(8, affine=True), nn.SiLU(), nn.MaxPool2d(2)],
        8,
        {("conv",): 1},
    ),
    "multiplier": ([conv(8, 24, 3, groups=8), nn.ReLU6()], 24, {("conv", "body.0"): 8}),
    "depthwise": ([conv(8, 8, 3, groups=8), nn.Hardswish()], 8, {("conv",): 1}),
    "grouped": ([conv(8, 8, 3, groups=2), nn.ReLU(), norm(2, 8)], 8, {("conv", "body.0"): 2}),
    # Halves of a block of the norm: channels stay in them, and the blocks move.
    "groups in groups": (
        [norm(4, 8), nn.ReLU(), conv(8, 8, 1, groups=2)],
        8,
        {("conv", "conv.1", "body.2"): 2},
    ),
    "groups in groups, of tied channels": (
        Network(
            lambda net, x: net.after(net.one(net.before(x)) + x),
            before=norm(4, 8),
            one=conv(8, 8, 1),
            after=norm(2, 8),
        ),
        8,
        {("conv", "conv.1"): 2},
    ),
    "squeeze-excite": (
        Network(squeeze_excite, squeeze=nn.Linear(8, 4), excite=nn.Linear(4, 8)),
        8,
        {("conv",): 1, ("body.squeeze",): 1},
    ),
    "channelwise": (
        Network(channelwise, power=parameter(8, 1, 1), floor=parameter(8, 1, 1)),
        16,
        {("conv",): 1},
    ),
    "layer scale": (
        Network(layer_scale, norm=nn.LayerNorm(8), fc=nn.Linear(8, 8), gamma=parameter(8)),
        8,
        {("conv",): 1},
    ),
    "dense": (
        Network(lambda net, x: torch.cat([F.relu(net.a(x)), x], 1), a=conv(8, 5, 1)),
        13,
        {("conv",): 1, ("body.a",): 1},
    ),
    # What is added to constant channels only may trade places.
    "option A": (
        Network(option_a, conv=conv(8, 16, 3, stride=2, padding=1)),
        16,
        {("conv",): 1, ("body.conv",): 1},
    ),
    "a part": (Network(lambda net, x: F.relu(x[:, 4:])), 4, {("conv",): 1, ("conv.1",): 1}),
    "a part that is summed": (
        Network(lambda net, x: x * x[:, :4].sum(1, keepdim=True).sigmoid()),
        8,
        {("conv",): 1, ("conv.1",): 1},
    ),
    "parts that are treated differently": (
        Network(parts_apart, norm=nn.BatchNorm2d(8)),
        8,
        {(axis,): 1 for axis in ("conv", "conv.1", "conv.2", "conv.3")},
    ),
    "selective kernel": (
        Network(selective, one=conv(8, 6, 1), two=conv(8, 6, 1), share=nn.Linear(8, 12)),
        6,
        {("conv",): 1, ("body.share",): 6},
    ),
    "one filter for all": (
        Network(
            lambda net, x: F.conv2d(x, net.blur.to(x.dtype), groups=8), blur=torch.ones(8, 1, 3, 3)
        ),
        8,
        {("conv",): 1},
    ),
    "blocks of blocks": (  # of which only the innermost are free
        Network(blocks_of_blocks),
        8,
        {(axis,): 1 for axis in ("conv", "conv.1", "conv.2", "conv.3")},
    ),
    "channel shuffle": (
        Network(shuffled, one=conv(8, 8, 1), low=conv(4, 3, 1), high=conv(4, 3, 1)),
        6,
        {(axis,): 1 for axis in ("conv", "body.one", "body.one.2", "body.low", "body.high")},
    ),
    "heads": (
        Network(
            inside_blocks,
            q=nn.Conv1d(8, 8, 1),
            v=nn.Conv1d(8, 12, 1),
            temperature=parameter(4, 1, 1),
        ),
        12,
        {("conv",): 1, ("body.q", "body.v", "body.temperature"): 4},
    ),
    "functional": (
        Network(
            lambda net, x: F.conv2d(x, net.weight * 2, net.bias),
            **vars(conv(8, 6, 1))["_parameters"],
        ),
        6,
        {("conv",): 1, ("body",): 1},
    ),
    "weight norm": (
        [nn.utils.parametrizations.weight_norm(conv(8, 6, 1))],
        6,
        {("conv",): 1, ("body.0",): 1},
    ),
    "weight norm by hooks": (
        [nn.utils.weight_norm(conv(8, 6, 1))],
        6,
        {("conv",): 1, ("body.0",): 1},
    ),
    "standardised": ([Standardised(8, 6, 3)], 6, {("conv",): 1, ("body.0",): 1}),
    "standardised groups": ([Standardised(8, 6, 3, groups=2)], 6, {("conv", "body.0"): 2}),
}


WEIGHTS = {  # what weight matching compares: what layers multiply with, in a module or not
    "functional": "weight bias",
    "standardised": "0.weight 0.bias",
    "weight norm by hooks": "0.bias 0.weight_g 0.weight_v",
    "heads": "q.weight q.bias v.weight v.bias",
    "layer scale": "fc.weight fc.bias",
}


@pytest.mark.parametrize("case", CASES)
def test_what_networks_are_made_of(case):
    body, channels, groups = CASES[case]
    axes = check_axes(between(body, channels), (3, 8, 8), alone=99)
    assert dict(axes.groups) == groups
    assert list(axes.pinned) == ["fc"]
    if case in WEIGHTS:
        ends = {"conv.weight", "fc.weight", "fc.bias"}
        assert {*axes.weights} == ends.union(f"body.{name}" for name in WEIGHTS[case].split())


@pytest.mark.parametrize(
    "body, channels, reason",
    [
        ([nn.LocalResponseNorm(3)], 8, "LocalResponseNorm"),
        ([nn.PixelShuffle(2)], 2, "pixel_shuffle in body.0 (PixelShuffle"),
        (
            Network(lambda net, x: x.permute(0, 2, 3, 1).flatten(1, 2).mean(2)[..., None, None]),
            64,
            None,
        ),
        (
            Network(lambda net, x: x * net.scale, scale=torch.rand(8, 1, 1)),
            8,
            "mul in body (Network, test_axes.py:",
        ),
        (
            Network(across_channels, gate=nn.Conv1d(1, 1, 3, padding=1)),
            8,
            "conv1d in body.gate (Conv1d",
        ),
        ([turn(), nn.AvgPool2d(3, 1, 1), turn(), turn()], 8, "body.1 (AvgPool2d"),
        (Network(lambda net, x: x + x.roll(1, 1)), 8, "tied"),
        (Network(lambda net, x: x.cumsum(1)), 8, "cumsum"),
        (Network(lambda net, x: x.sort(1).values), 8, "sort"),
    ],
)
def test_what_fixes_an_order_pins_it_and_the_reason_says_so(body, channels, reason):
    axes = check_axes(between(body, channels), (3, 8, 8), alone=0)
    if reason is None:
        assert axes.sizes == {"conv": 8}
    else:
        assert "conv" not in axes.sizes and reason in axes.pinned["conv"][1]


def test_readouts_are_before_and_after_the_nonlinearity_and_ahead_of_dropout():
    body = [conv(8, 6, 1), nn.PReLU(6), nn.Dropout(), nn.MaxPool2d(2)]
    model = between(body, 6).train()
    axes = find_axes(model, (3, 8, 8))
    (place,) = axes.readouts["body.0"]
    assert place[:2] == ("dropout", 1) and axes.before["dropout"] == "conv2d_1"
    assert all(module.training for module in model.modules())


def test_a_weight_under_two_names_moves_under_both():
    one = conv(8, 8, 1)
    axes = check_axes(between([one, nn.ReLU(), nn.Sequential(one)]), (3, 8, 8), alone=0)
    assert axes.sizes == {"conv": 8}
    assert layout(axes, "body.2.0.weight") == {dim: ("conv", 8, 1) for dim in (0, 1)}


def test_what_cannot_be_exported_is_refused():
    body = Network(lambda net, x: x if x.sum() > 0 else -x)
    with pytest.raises(UserError, match="torch.export cannot follow Network"):
        find_axes(between(body), (3, 8, 8))
