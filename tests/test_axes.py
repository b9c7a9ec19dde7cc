"""The axes of networks: those that a person would name, and for every network that what they allow is right."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from analyze import coverage
from common.axes import find_axes
from common.errors import UserError
from common.models import build_model
from common.permutation import Segment, Unit, check_same_function, permute, random_permutation


def tell_apart(model, inputs, seed=0):
    """Make every channel of `model` count and differ from the others, and keep activations at the scale of the inputs."""
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
    """Random permutations of all axes keep the output; one of a single tensor changes it. Returns the axes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(8, *input_shape, generator=generator)
    tell_apart(model, inputs)
    axes, state = find_axes(model, input_shape), model.state_dict()
    assert axes.dims.keys() == state.keys()
    assert sorted(axis for unit in axes.units for axis in unit.axes) == sorted(axes.sizes)
    for seed in (0, 1):
        permutation = random_permutation(axes, seed)
        check_same_function(model, state, permute(state, axes.dims, permutation), inputs[:2])
    live = [(name, dim) for name, layouts in axes.dims.items() for dim, layout in enumerate(layouts) if layout]
    model, images = model.double(), inputs[:2].double()  # a single tensor's part may be small, and rounding is not it
    state = model.state_dict()
    with torch.no_grad():
        expected = model(images)
        for i in torch.randperm(len(live), generator=generator)[:alone].tolist():
            name, dim = live[i]
            size = state[name].shape[dim]
            one = state | {name: state[name].index_select(dim, torch.arange(size).roll(size // 3 or 1))}
            changed = torch.func.functional_call(model, one, images)
            assert (changed - expected).abs().max() > 1e-9 * expected.abs().max(), name
    return axes


# ---------------------------------------------------------------- the axes that a person would name


def test_axes_of_resnet20_are_those_a_person_would_name():
    axes = find_axes(build_model("resnet20", 1), (3, 32, 32))
    streams = {"conv1": 16, "blocks.3.conv2": 32, "blocks.6.conv2": 64}
    inner = {f"blocks.{i}.conv1": (16, 32, 64)[i // 3] for i in range(9)}
    assert axes.sizes == streams | inner
    assert list(axes.pinned) == ["fc"]
    stream = (Segment("blocks.3.conv2", 32),)
    assert axes.dims["blocks.3.shortcut.0.weight"] == (stream, (Segment("conv1", 16),), None, None)
    assert axes.dims["blocks.5.conv1.weight"] == ((Segment("blocks.5.conv1", 32),), stream, None, None)
    assert axes.dims["blocks.5.bn2.running_var"] == (stream,)
    assert axes.dims["fc.weight"] == (None, (Segment("blocks.6.conv2", 64),))
    assert axes.dims["conv1.weight"][1] is None  # colours of the input
    # The last tensor of a stream is the output of its last block, after the nonlinearity, before pooling.
    assert [axes.carriers[name][-1].node for name in streams] == ["relu_6", "relu_12", "relu_18"]


def test_axes_of_vgg11_mlp_and_resnet50():
    vgg = find_axes(build_model("vgg11", 0.125, 10, (3, 64, 64)), (3, 64, 64))
    assert list(vgg.sizes.values()) == [8, 16, 32, 32, 64, 64, 64, 64]
    assert vgg.dims["22.weight"] == (None, (Segment("18", 64, 4),))  # flatten spreads a channel over 2x2 places
    mlp = find_axes(build_model("mlp", 0.125, 10, (3, 8, 8)), (3, 8, 8))
    assert mlp.dims["1.weight"] == ((Segment("1", 64),), None) and mlp.dims["7.bias"] == (None,)
    resnet = find_axes(build_model("resnet50", 0.125, 10, (3, 32, 32)), (3, 32, 32))
    # The stem, four streams, and two inner axes in each of 16 bottlenecks.
    assert len(resnet.sizes) == 1 + 4 + 2 * 16
    assert sum(resnet.sizes.values()) * 8 == 64 + (256 + 512 + 1024 + 2048) + 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512)


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(6 * 36, 2)

    def forward(self, x):
        y = torch.cat([F.relu(self.a(x)), self.b(x)], dim=1)
        return self.fc(self.c(y).view(x.size(0), -1))


def test_concatenation_gives_several_segments():
    model = Concat().eval()
    axes = find_axes(model, (3, 8, 8))
    assert axes.dims["c.weight"][1] == (Segment("a", 4), Segment("b", 5))
    assert axes.dims["fc.weight"] == (None, (Segment("c", 6, 36),))
    after = permute(model.state_dict(), axes.dims, random_permutation(axes, 0))
    check_same_function(model, model.state_dict(), after, torch.randn(2, 3, 8, 8))


class Odd(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv, self.odd, self.fc = nn.Conv2d(3, 8, 3), layer, nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.odd(self.conv(x)).mean((2, 3)))


def test_an_unknown_layer_is_named():
    with pytest.raises(UserError, match=r"odd \(Softmax2d\)"):
        find_axes(Odd(nn.Softmax2d()), (3, 8, 8))


def test_a_fixed_order_pins_its_axis_and_says_why():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc((self.conv(x) + x).mean((2, 3)))

    axes = find_axes(Residual(), (3, 8, 8))
    assert axes.sizes == {} and "add" in axes.pinned["conv"][1]


def test_a_layer_that_is_used_twice_ties_its_axes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.fc = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(F.relu(self.two(F.relu(self.two(F.relu(self.one(x)))))))

    model = Twice().eval()
    axes = find_axes(model, (3,))
    assert axes.sizes == {"one": 5}
    after = permute(model.state_dict(), axes.dims, {"one": torch.tensor([1, 2, 3, 4, 0])})
    check_same_function(model, model.state_dict(), after, torch.randn(4, 3))


# ---------------------------------------------------------------- what networks are made of


class Grouped(nn.Module):
    """1x1 to 8 channels, a grouped convolution to 12 in 4 groups, 1x1 to 5."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 5, 1)

    def forward(self, x):
        return self.three(F.relu(self.two(F.relu(self.one(x))))).mean((2, 3))


def test_a_grouped_convolution_moves_in_blocks():
    model = Grouped()
    axes = check_axes(model, (3, 6, 6))
    assert axes.sizes == {"one": 8, "two": 12} and axes.units == (Unit(("one", "two"), 4),)
    assert axes.dims["two.weight"][:2] == ((Segment("two", 12),), (Segment("one", 2, 1, groups=4),))
    # Group 1 goes first with its channels swapped, the others follow in order: by hand.
    swap = torch.tensor([3, 2, 0, 1, 4, 5, 6, 7])
    move = torch.tensor([3, 4, 5, 0, 1, 2, *range(6, 12)])
    state = model.state_dict()
    moved = permute(state, axes.dims, {"one": swap, "two": move})
    assert torch.equal(moved["two.weight"][0], state["two.weight"][3].flip(0))
    assert torch.equal(moved["two.weight"][3], state["two.weight"][0])
    assert torch.equal(moved["one.weight"], state["one.weight"][swap])
    check_same_function(model, state, moved, torch.randn(2, 3, 6, 6))
    across = torch.tensor([2, 1, 0, 3, 4, 5, 6, 7])  # a channel that changes its group
    with pytest.raises(RuntimeError, match="another function"):
        check_same_function(model, state, permute(state, axes.dims, {"one": across}), torch.randn(2, 3, 6, 6))


class Parts(nn.Module):
    """A body between a convolution to 8 channels and a linear layer."""

    def __init__(self, body, channels=8):
        super().__init__()
        self.conv, self.body, self.fc = nn.Conv2d(3, 8, 3, padding=1, bias=False), body, nn.Linear(channels, 3)

    def forward(self, x):
        return self.fc(self.body(self.conv(x)).mean((2, 3)))


class Gate(nn.Module):  # squeeze-excitation as timm and others write it
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        b, c, _, _ = x.size()
        y = x.view(b, c, -1).mean(2)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(y)))).view(b, c, 1, 1).expand_as(x)


class LayerScale(nn.Module):  # ConvNeXt's way: channels last, a scale that the forward pass reads itself
    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.gamma = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x):
        y = F.gelu(self.fc(self.norm(x.permute(0, 2, 3, 1)))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class OptionA(nn.Module):  # the shortcut of He et al. for CIFAR: every second pixel, zero channels
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x):
        return F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0))


class Rows(nn.Module):  # channels last, flattened behind the places
    def forward(self, x):
        return x.permute(0, 2, 3, 1).reshape(x.size(0), -1, 1, 1)


class Constant(nn.Module):  # a tensor that no permutation reaches
    def __init__(self):
        super().__init__()
        self.scale = torch.rand(8, 1, 1)

    def forward(self, x):
        return x * self.scale


class Turn(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Along(nn.Module):  # a convolution that slides over the channels themselves (Wang et al. 2020)
    def __init__(self):
        super().__init__()
        self.gate = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return x * torch.sigmoid(self.gate(x.mean((2, 3)).unsqueeze(1))).squeeze(1)[:, :, None, None]


class Half(nn.Module):
    def forward(self, x):
        return F.relu(x[:, 4:])


class Channelwise(nn.Module):  # a parameter as second operand, and one that is spread out first
    def __init__(self):
        super().__init__()
        self.power, self.floor = nn.Parameter(torch.rand(8, 1, 1) + 1), nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x, mask=None):
        y = torch.clamp(x.sigmoid().pow(self.power), min=self.floor * 0.5)
        return torch.cat([y * self.floor.expand_as(y), y - y.mean(axis=(2, 3), keepdim=True)], axis=1)


@pytest.mark.parametrize("body, channels, units", [
    (nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU()), 8, {("conv",): 4}),
    (nn.Sequential(nn.GroupNorm(1, 8), nn.PReLU(8)), 8, {("conv",): 1}),
    (nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.SiLU(), nn.MaxPool2d(2)), 8, {("conv",): 1}),
    (nn.Sequential(nn.Conv2d(8, 24, 3, groups=8), nn.ReLU6()), 24, {("conv", "body.0"): 8}),
    (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish()), 8, {("conv",): 1}),
    (nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.GroupNorm(2, 8)), 8, {("conv", "body.0"): 2}),
    (Gate(), 8, {("conv",): 1, ("body.squeeze",): 1}),
    (Channelwise(), 16, {("conv",): 1}),
    (LayerScale(), 8, {("conv",): 1}),
    (OptionA(), 16, {("conv",): 1, ("pad.before",): 1, ("pad.behind",): 1}),
])  # fmt: skip
def test_what_networks_are_made_of(body, channels, units):
    torch.manual_seed(0)
    axes = check_axes(Parts(body, channels), (3, 8, 8), alone=99)
    assert {unit.axes: unit.blocks for unit in axes.units} == units
    assert list(axes.pinned) == ["fc"]


@pytest.mark.parametrize("body, channels, reason", [
    (nn.LocalResponseNorm(3), 8, "LocalResponseNorm"),
    (Rows(), 512, "reshape"),
    (Constant(), 8, "mul in body (Constant) joins it with values of fixed order"),
    (Along(), 8, "body.gate slides over it"),
    (nn.Sequential(Turn(), nn.AvgPool2d(3, 1, 1), Turn(), Turn()), 8, "body.1 slides over it"),
    (Half(), 4, "getitem in body (Half) takes a part of it"),
    (nn.Sequential(nn.PixelShuffle(2), nn.ReLU()), 2, "PixelShuffle"),
    (nn.Sequential(nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)), 8, "groups it otherwise"),
])  # fmt: skip
def test_what_fixes_an_order_pins_it_and_the_reason_says_so(body, channels, reason):
    axes = check_axes(Parts(body, channels), (3, 8, 8), alone=0)
    assert axes.sizes.keys().isdisjoint({"conv"}) and reason in axes.pinned["conv"][1]


def test_the_tensors_of_an_axis():
    carriers = find_axes(build_model("resnet20", 1), (3, 32, 32)).carriers
    # Layers read the first stream from the stem and from two blocks; the last block's is read by the next stage.
    assert [carrier.node for carrier in carriers["conv1"]] == ["relu", "relu_2", "relu_4", "relu_6"]
    assert [carrier.before for carrier in carriers["conv1"]] == ["bn1", "add", "add_1", "add_2"]
    assert [carrier.before for carrier in carriers["blocks.0.conv1"]] == ["blocks_0_bn1"]


# ---------------------------------------------------------------- torchvision's networks

FAMILIES = [
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121",
    "squeezenet1_1", "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
    "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_networks_move_in_everything_but_their_classes(name):
    torch.manual_seed(0)
    size = coverage.image_size(name)
    axes = check_axes(coverage.build(name), (3, size, size))
    found = coverage.count(axes)
    assert found["pinned"] == coverage.CLASSES  # of thousands of channels; these and nothing else
    assert found["free"] + found["in blocks"] > 500
    assert (found["in blocks"] > 0) == name.startswith(("resnext", "regnet"))


def test_shufflenet_moves_where_channels_are_not_shuffled():
    torch.manual_seed(0)
    found = coverage.count(check_axes(coverage.build("shufflenet_v2_x0_5"), (3, 64, 64)))
    assert found["free"] / (found["free"] + found["pinned"]) > 0.5


def test_heads_and_hidden_units_of_a_vision_transformer():
    vit = coverage.torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=40)
    axes = check_axes(vit, (3, 32, 32), alone=20)
    layer = "encoder.layers.encoder_layer_0"
    assert axes.units[1] == Unit((f"{layer}.self_attention.keys", f"{layer}.self_attention.values"), 4)
    assert axes.sizes["conv_proj"] == 24 and axes.sizes[f"{layer}.mlp.0"] == 40


@pytest.mark.parametrize("name, layer", [("swin_t", r"features\.1\.0\.attn"), ("maxvit_t", r"blocks\.0\.layers\.0")])
def test_windowed_attention_is_refused_by_name(name, layer):
    with torch.device("meta"):
        model = coverage.build(name)
    size = coverage.image_size(name)
    with pytest.raises(UserError, match=layer):
        find_axes(model, (3, size, size))


def test_axes_of_mobilenet_v2():
    axes = find_axes(coverage.build("mobilenet_v2"), (3, 64, 64))
    streams = [32, 16, 24, 32, 64, 96, 160, 320, 1280]
    reads = [
        16,
        *[24] * 2,
        *[32] * 3,
        *[64] * 4,
        *[96] * 3,
        *[160] * 3,
    ]  # of each block but the first; six times wider inside
    assert sorted(axes.sizes.values()) == sorted(streams + [6 * width for width in reads])
    inner = (Segment("features.4.conv.0.0", 144),)
    assert axes.dims["features.4.conv.1.0.weight"] == (inner, None, None, None)  # depthwise
    assert axes.dims["features.4.conv.2.weight"] == ((Segment("features.4.conv.2", 32),), inner, None, None)
    assert axes.dims["features.6.conv.2.weight"][0] == (Segment("features.4.conv.2", 32),)  # one stream of three blocks


def test_axes_of_densenet121():
    axes = find_axes(coverage.build("densenet121"), (3, 64, 64))
    layers = 6 + 12 + 24 + 16
    assert sorted(axes.sizes.values()) == sorted([64, 128, 256, 512] + [128, 32] * layers)
    block = "features.denseblock1"
    assert axes.dims[f"{block}.denselayer3.conv1.weight"] == (
        (Segment(f"{block}.denselayer3.conv1", 128),),
        (Segment("features.conv0", 64), Segment(f"{block}.denselayer1.conv2", 32), Segment(f"{block}.denselayer2.conv2", 32)),
        None,
        None,
    )  # fmt: skip
    assert len(axes.dims["features.norm5.weight"][0]) == 1 + 16


def test_weights_that_are_not_plain_are_refused():
    shared = nn.Conv2d(8, 8, 1)
    for body in (
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.utils.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared)),
    ):
        with pytest.raises(UserError):
            find_axes(Parts(body), (3, 8, 8))
