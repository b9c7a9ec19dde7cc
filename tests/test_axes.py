"""The axes of networks: the expected ones, along which permuting keeps the function."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from common.align.axes import find_axes
from common.align.permutation import check_same_function, inverse, permute, random_permutation
from common.errors import UserError
from common.models import build_model
from tests.conftest import same

conv, norm = nn.Conv2d, nn.GroupNorm
our_models = pytest.mark.parametrize(
    "name, width, size",
    [("mlp", 0.25, 8), ("vgg11", 0.125, 64), ("resnet20", 0.5, 16), ("resnet50", 0.125, 64)],
)


def make_channels_distinct(model, inputs):
    """Randomise constant parameters and set BatchNorm statistics, so that all channels differ."""
    for value in model.state_dict().values():
        if value.is_floating_point() and (value.dim() == 1 or len(value.unique()) == 1):
            value.add_(torch.rand(value.shape) * 0.5)
    update_bn([inputs], model.eval())
    return model


def check_axes(model, input_shape, single=6):
    """Find the axes, and check them: random permutations of all axes keep the output, and permuting
    a tensor along one dimension alone changes it, for `single` random choices.
    """
    inputs = torch.randn(8, *input_shape)
    make_channels_distinct(model, inputs)
    axes, state, images = find_axes(model, input_shape), model.state_dict(), inputs[:2]
    assert axes.dims.keys() == state.keys()
    assert sorted(axis for group in axes.groups for axis in group.axes) == sorted(axes.sizes)
    for seed in (0, 1):
        permutation = random_permutation(axes, seed)
        permuted = permute(state, axes.dims, permutation)
        check_same_function(model, state, permuted, images)
        assert same(permute(permuted, axes.dims, inverse(permutation)), state)
    dims = sorted({(name, place.dim) for name in axes.dims for place in axes.dims[name]})
    for i in torch.randperm(len(dims))[:single].tolist():
        name, dim = dims[i]
        rolled = state | {name: state[name].roll(state[name].shape[dim] // 3 or 1, dim)}
        with pytest.raises(RuntimeError, match="another function"):
            check_same_function(model, state, rolled, images)
    return axes


class Network(nn.Module):
    """Computes `function(self, x)`; `parts` are its modules, parameters and constants."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def wrap(body):
    """Put a body, or a list of modules, between a convolution to 8 channels and a linear layer."""
    body = nn.Sequential(*body) if isinstance(body, list) else body
    channels = body(torch.rand(2, 8, 8, 8)).shape[1]
    ends = {"conv": nn.Conv2d(3, 8, 3, padding=1, bias=False), "fc": nn.Linear(channels, 3)}
    return Network(lambda net, x: net.fc(net.body(net.conv(x)).mean((2, 3))), **ends, body=body)


def layout(axes, name):
    """For each dimension of a tensor: the axis, its number of channels, and entries per channel."""
    return {place.dim: (place.axis, *place.positions.shape) for place in axes.dims[name]}


# ---------------------------------------------------------------- building blocks of networks


@our_models
def test_every_tensor_of_our_models_moves_with_the_others(name, width, size):
    check_axes(build_model(name, width, 10, (3, size, size)), (3, size, size), single=999)


def test_a_grouped_convolution_moves_in_blocks():
    grouped = conv(8, 12, 3, groups=4)
    model = nn.Sequential(
        conv(3, 8, 1), nn.ReLU(), grouped, nn.ReLU(), conv(12, 5, 1), nn.Flatten()
    )
    axes = check_axes(model, (3, 3, 3))
    assert axes.sizes == {"0": 8, "2": 12} and axes.groups == ((("0", "2"), 4),)
    assert layout(axes, "2.weight") == {0: ("2", 12, 1), 1: ("0", 8, 1)}
    # By hand: exchange groups 0 and 1, and the two input channels of group 1.
    index_in = torch.tensor([3, 2, 0, 1, 4, 5, 6, 7])
    index_out = torch.tensor([3, 4, 5, 0, 1, 2, *range(6, 12)])
    state = model.state_dict()
    permuted = permute(state, axes.dims, {"0": index_in, "2": index_out})
    assert torch.equal(permuted["2.weight"][0], state["2.weight"][3].flip(0))
    assert torch.equal(permuted["2.weight"][3], state["2.weight"][0])
    check_same_function(model, state, permuted, torch.randn(2, 3, 3, 3))


def option_a(net, x):
    """The shortcut of He et al. for CIFAR: every second pixel, padded with zero channels."""
    return F.relu(net.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0))


def channelwise(net, x):
    """Parameters as exponent, as bound, and expanded."""
    y = torch.clamp(x.sigmoid().pow(net.power), min=net.floor * 0.5)
    mean = y.mean(axis=(2, 3), keepdim=True)
    return torch.cat([y * net.floor.expand_as(y), y - mean], axis=1)


def across_channels(net, x):
    """A convolution along the channel dimension (ECA, Wang et al. 2020)."""
    y = net.gate(x.mean((2, 3)).unsqueeze(1))
    return x * torch.sigmoid(y).squeeze(1)[:, :, None, None]


def rotate_dims():
    return Network(lambda net, x: x.permute(0, 2, 3, 1))


def parameter(*shape):
    return nn.Parameter(torch.rand(*shape) + 1)


def attention(net, x):
    """A temperature for each head; the channels of a head precede the sequence dimension."""
    q, v = net.q(x.mean(3)).unflatten(1, (4, 2)), net.v(x.mean(3)).unflatten(1, (4, 3))
    scores = torch.einsum("bhcq,bhck->bhqk", q, q) * net.temperature
    return torch.einsum("bhqk,bhck->bhcq", scores.softmax(-1), v).flatten(1, 2)[..., None]


def normalised_in_halves(net, x):
    """InstanceNorm over each half of the channels, flattened into one channel."""
    return F.instance_norm(x.unflatten(1, (2, 4)).flatten(2)).view_as(x).relu()


def weighted(net, x):
    """Two paths with learned scalar weights (Tan et al. 2020), and an empty tensor in a cat."""
    y = net.share[0] * net.one(x) + net.share[1] * net.two(x)
    return torch.cat([y[:, :0], y], 1)


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight * self.weight.new_ones(()), self.bias, groups=self.groups)


def different_quarters(net, x):
    """The quarters of the channels differ only in the operators that are applied to them."""
    a, b, c, d = (net.norm(x) * net.norm(x).sum(3, keepdim=True)).chunk(4, 1)
    pooled = F.max_pool2d(c, 3, 1, 1), F.avg_pool2d(d, 3, 1, 1)
    return torch.cat([a.relu(), b.sigmoid(), *pooled], 1)


def flipped_half(net, x):
    """Half of the channels are mirrored horizontally."""
    a, b = x.chunk(2, 1)
    return net.conv(torch.cat([a, b.flip(3)], 1)).relu()


def recurrent(net, x):
    """An LSTM over the pixels."""
    return net.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2)[..., None]


def frozen(net, x):
    with torch.no_grad():
        return F.pixel_unshuffle(net.conv(x), 2)


def selective(net, x):
    """A softmax over two paths for each channel (Li et al. 2019)."""
    share = net.share(x.mean((2, 3))).unflatten(1, (2, 6)).softmax(1)[..., None, None]
    return (torch.stack([net.one(x), net.two(x)], 1) * share).sum(1)


def nested_blocks(net, x):
    """Each pair of channels is weighted by a softmax of its sum over the two pairs of its half."""
    y = x.unflatten(1, (2, 2, 2))
    return (y * y.sum(3, keepdim=True).softmax(2)).flatten(1, 3)


# A body and its axes: "a+b:4" are two that move together in 4 blocks. tests/test_zoo.py has whole
# networks.
CASES = {
    "channel by channel": (
        [norm(1, 8), nn.PReLU(8), nn.InstanceNorm2d(8, affine=True), nn.SiLU(), nn.MaxPool2d(2)],
        "conv",
    ),
    "multiplier": ([conv(8, 24, 3, groups=8), nn.ReLU6()], "conv+body.0:8"),
    # The convolution's groups are halves of the norm's: channels stay in their half.
    "groups in groups": ([norm(4, 8), nn.ReLU(), conv(8, 8, 1, groups=2)], "conv+conv.1+body.2:2"),
    "groups in groups, of tied channels": (
        Network(
            lambda net, x: net.after(net.one(net.before(x)) + x),
            before=norm(4, 8),
            one=conv(8, 8, 1),
            after=norm(2, 8),
        ),
        "conv+conv.1:2",
    ),
    "channelwise": (
        Network(channelwise, power=parameter(8, 1, 1), floor=parameter(8, 1, 1)),
        "conv",
    ),
    # Channels that are added to constant ones are free.
    "option A": (Network(option_a, conv=conv(8, 16, 3, stride=2, padding=1)), "conv body.conv"),
    "a part that is summed": (
        Network(lambda net, x: x * x[:, :4].sum(1, keepdim=True).sigmoid()),
        "conv conv.1",
    ),
    "parts that are treated differently": (
        Network(different_quarters, norm=nn.BatchNorm2d(8)),
        "conv conv.1 conv.2 conv.3",
    ),
    "twice, and rolled": (
        Network(lambda net, x: net.conv(torch.cat([x, -x], 1).roll(1, 1)), conv=conv(16, 8, 1)),
        "conv conv.1 body.conv",
    ),
    "flipped half": (Network(flipped_half, conv=conv(8, 8, 3)), "conv conv.1 body.conv"),
    "recurrent": (
        Network(recurrent, lstm=nn.LSTM(8, 6, batch_first=True)),
        "conv body.lstm.weight_ih_l0",
    ),
    "normalised in halves": (Network(normalised_in_halves), "conv:2"),
    "weighted paths": (
        Network(weighted, one=conv(8, 6, 1), two=conv(8, 6, 1), share=parameter(2)),
        "conv body.share body.share.2 body.one",
    ),
    "frozen": (Network(frozen, conv=conv(8, 8, 1)), "conv body.conv"),
    "selective kernel": (
        Network(selective, one=conv(8, 6, 1), two=conv(8, 6, 1), share=nn.Linear(8, 12)),
        "conv body.share:6",
    ),
    "one filter for all": (
        Network(
            lambda net, x: F.conv2d(x, net.blur.to(x.dtype), groups=8), blur=torch.ones(8, 1, 3, 3)
        ),
        "conv",
    ),
    # Only the innermost blocks are free.
    "nested blocks": (Network(nested_blocks), "conv conv.1 conv.2 conv.3"),
    "heads": (
        Network(
            attention, q=nn.Conv1d(8, 8, 1), v=nn.Conv1d(8, 12, 1), temperature=parameter(4, 1, 1)
        ),
        "conv body.q+body.v+body.temperature:4",
    ),
    "functional": (
        Network(
            lambda net, x: F.conv2d(x, net.weight * 2, net.bias),
            weight=parameter(6, 8, 1, 1),
            bias=parameter(6),
        ),
        "conv body",
    ),
    "weight norm": ([nn.utils.parametrizations.weight_norm(conv(8, 6, 1))], "conv body.0"),
    "weight norm by hooks": ([nn.utils.weight_norm(conv(8, 6, 1))], "conv body.0"),
    "standardised": ([Standardised(8, 6, 3, groups=2)], "conv+body.0:2"),
}
WEIGHTS = {  # the parameters that weight matching compares
    "functional": "weight bias",
    "standardised": "0.weight 0.bias",
    "weight norm by hooks": "0.bias 0.weight_g 0.weight_v",
    "heads": "q.weight q.bias v.weight v.bias",
    "channel by channel": "",
}


@pytest.mark.parametrize("case", CASES)
def test_axes_of_building_blocks(case):
    body, expected = CASES[case]
    axes = check_axes(wrap(body), (3, 8, 8), single=99)
    groups = {"+".join(names) + f":{blocks}" * (blocks > 1) for names, blocks in axes.groups}
    assert groups == {*expected.split()}
    assert list(axes.pinned) == ["fc"]
    if case in WEIGHTS:
        ends = {"conv.weight", "fc.weight", "fc.bias"}
        assert {*axes.weights} == ends.union(f"body.{name}" for name in WEIGHTS[case].split())


@pytest.mark.parametrize(
    "body, reason",
    [
        (
            Network(lambda net, x: x * net.scale, scale=torch.rand(8, 1, 1)),
            "mul in body (Network, test_axes.py:",
        ),
        (
            Network(across_channels, gate=nn.Conv1d(1, 1, 3, padding=1)),
            "conv1d in body.gate (Conv1d",
        ),
        ([rotate_dims(), nn.AvgPool2d(3, 1, 1), rotate_dims(), rotate_dims()], "body.1 (AvgPool2d"),
        ([nn.ConvTranspose2d(8, 8, 2, groups=2)], "conv_transpose2d in body.0"),
        (
            Network(lambda net, x: x.diagonal(0, 1, 2).movedim(-1, 1)[..., None]),
            "diagonal in body (Network, test_axes.py:",
        ),
        (Network(lambda net, x: x + x.roll(1, 1)), "tied"),
        (Network(lambda net, x: x.sort(1).values), "sort"),
    ],
)
def test_channels_of_fixed_order_are_pinned_with_the_reason(body, reason):
    axes = check_axes(wrap(body), (3, 8, 8), single=0)
    assert "conv" not in axes.sizes and reason in axes.pinned["conv"][1]


def test_activations_before_and_after_the_nonlinearity():
    model = wrap([conv(8, 6, 1), nn.PReLU(6), nn.Dropout(), nn.MaxPool2d(2)]).train()
    axes = find_axes(model, (3, 8, 8))
    (place,) = axes.activations["body.0"]
    assert place[:2] == ("dropout", 1) and axes.pre_activation["dropout"] == "conv2d_1"
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("more", [[], [nn.Dropout()], [Network(lambda net, x: x.clone())]])
def test_activations_after_the_last_pooling_are_not_matched(more):
    """An operator that copies its input computes nothing: the stream is matched before pooling."""
    body = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *more]
    model = nn.Sequential(conv(3, 8, 1), *body, nn.Linear(8, 2))
    (place,) = find_axes(model, (3, 8, 8)).activations["0"]
    assert place.tensor == "relu"


def test_activations_ahead_of_a_slice_assignment():
    def halves(net, x):
        joined = torch.zeros(len(x), 16, 8, 8)
        joined[:, :8], joined[:, 8:] = x, x
        return joined

    axes = find_axes(wrap([nn.ReLU(), Network(halves), conv(16, 6, 1)]), (3, 8, 8))
    assert axes.activations["conv"][0].tensor == "relu"


def test_activations_of_padded_channels_are_taken_after_padding():
    model = wrap([nn.ReLU(), Network(lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 2))), conv(11, 6, 1)])
    axes = find_axes(model, (3, 8, 8))
    assert axes.activations["conv"][-1].tensor == axes.pre_activation["pad"] == "pad"


def test_a_weight_under_two_names_moves_under_both():
    shared = conv(8, 8, 1)
    axes = check_axes(wrap([shared, nn.ReLU(), nn.Sequential(shared)]), (3, 8, 8), single=0)
    assert axes.sizes == {"conv": 8}
    assert layout(axes, "body.2.0.weight") == {dim: ("conv", 8, 1) for dim in (0, 1)}


def test_a_network_that_cannot_be_exported_raises_one_line(capfd):
    """Without torch's own report."""
    body = Network(lambda net, x: x if x.sum() > 0 else -x)
    for model, kind in ((wrap(body), "Network"), (nn.Sequential(nn.Linear(9, 2)), "Sequential")):
        with pytest.raises(UserError, match=f"torch.export cannot follow {kind}"):
            find_axes(model, (3, 8, 8))
    assert capfd.readouterr().err == ""


def test_a_network_can_return_several_tensors():
    model = Network(lambda net, x: {"a": (y := net.body(x)), "b": [y.sum(1)]}, body=wrap([]))
    check_axes(model, (3, 8, 8), single=0)
