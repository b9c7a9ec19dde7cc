import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from common.models import build_model
from common.permutation import Segment, check_same_function, find_axes, inverse, permute, random_permutation

MODELS = [("mlp", 0.125, 8), ("vgg11", 0.125, 64), ("resnet20", 0.5, 8), ("resnet50", 0.125, 32)]


def built(name, width, size, seed=0):
    """A network with BatchNorm statistics and affine parameters that tell its channels apart."""
    model = build_model(name, width, 10, (3, size, size), seed)
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if value.dim() == 1 and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.75)
    return model.eval()


def test_permute_by_hand():
    tensors = {"w": torch.tensor([[1, 2], [3, 4], [5, 6]]), "v": torch.tensor([10, 11, 12, 13])}
    dims = {"w": ((Segment("out", 3),), (Segment("in", 2),)), "v": ((Segment("in", 2, 2),),)}
    moved = permute(tensors, dims, {"out": torch.tensor([2, 0, 1]), "in": torch.tensor([1, 0])})
    # index[i] is the source channel that lands at position i: row 2 of w comes first, its columns swap.
    assert moved["w"].tolist() == [[6, 5], [2, 1], [4, 3]]
    assert moved["v"].tolist() == [12, 13, 10, 11]  # channels of two entries each
    assert tensors["w"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert permute(tensors, dims, {"out": torch.tensor([2, 0, 1])})["w"].tolist() == [[5, 6], [1, 2], [3, 4]]


def test_concatenated_segments_by_hand():
    dims = {"w": ((Segment("a", 2), Segment("b", 1), Segment("a", 2)),)}
    moved = permute({"w": torch.tensor([1, 2, 3, 4, 5])}, dims, {"a": torch.tensor([1, 0])})
    assert moved["w"].tolist() == [2, 1, 3, 5, 4]


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
    assert [axes.carriers[name].node for name in streams] == ["relu_6", "relu_12", "relu_18"]


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


@pytest.mark.parametrize("name, width, size", MODELS)
def test_consistent_permutations_keep_the_output_and_others_change_it(name, width, size):
    model = built(name, width, size)
    axes = find_axes(model, (3, size, size))
    before, images = model.state_dict(), torch.randn(4, 3, size, size)
    assert set(axes.dims) == set(before)
    permutation = random_permutation(axes, seed=1)
    after = permute(before, axes.dims, permutation)
    assert check_same_function(model, before, after, images) < 1e-9
    assert not torch.equal(next(iter(after.values())), next(iter(before.values())))
    back = permute(after, axes.dims, inverse(permutation))
    assert all(torch.equal(back[key], before[key]) for key in before)
    for key, layouts in axes.dims.items():  # a single tensor permuted alone
        for dim, layout in enumerate(layouts):
            if layout:
                alone = dict(before)
                alone[key] = before[key].roll(1, dim)
                with pytest.raises(RuntimeError, match="another function"):
                    check_same_function(model, before, alone, images)


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
    with pytest.raises(UserError, match=r"odd \(PixelUnshuffle\)"):
        find_axes(Odd(nn.PixelUnshuffle(2)), (3, 8, 8))


def test_a_fixed_order_pins_its_axis_and_says_why():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc((self.conv(x) + x).mean((2, 3)))

    axes = find_axes(Residual(), (3, 8, 8))
    assert axes.sizes == {} and "add" in axes.pinned["conv"]


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
