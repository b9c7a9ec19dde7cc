import pytest
import torch

from common.align.axes import find_axes
from common.align.permutation import (
    Layout,
    check_same_function,
    inverse,
    permute,
    random_permutation,
)
from common.models import build_model
from tests.conftest import same

MODELS = [("mlp", 0.125, 8), ("vgg11", 0.125, 64), ("resnet20", 0.5, 8), ("resnet50", 0.125, 32)]


def built(name, width, size, seed=0):
    """A network with BatchNorm statistics and affine parameters that tell its channels apart."""
    model = build_model(name, width, 10, (3, size, size), seed)
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.dim() == 1 and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.75)
    return model.eval()


SHAPES = (3, (3, 1)), (2, (2, 1)), (4, (2, 2))


def test_permute_by_hand():
    tensors = {"w": torch.tensor([[1, 2], [3, 4], [5, 6]]), "v": torch.tensor([10, 11, 12, 13])}
    out, columns, twice = (torch.arange(n).view(shape) for n, shape in SHAPES)
    dims = {
        "w": (Layout(3, {"out": out}), Layout(2, {"in": columns})),
        "v": (Layout(4, {"in": twice}),),
    }
    rows, columns = {"out": torch.tensor([2, 0, 1])}, {"in": torch.tensor([1, 0])}
    moved = permute(tensors, dims, rows | columns)
    # index[i] is the source channel that lands at i: row 2 of w comes first, its columns swap.
    assert moved["w"].tolist() == [[6, 5], [2, 1], [4, 3]]
    assert moved["v"].tolist() == [12, 13, 10, 11]  # channels of two entries each
    assert tensors["w"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert permute(tensors, dims, rows)["w"].tolist() == [[5, 6], [1, 2], [3, 4]]


def test_an_axis_that_lies_in_several_places_by_hand():
    # Channel 0 lies at 0, 1 and 5, channel 1 at 2, 3 and 6; position 4 is another axis.
    places = torch.tensor([[0, 1, 5], [2, 3, 6]])
    dims = {"w": (Layout(7, {"a": places, "b": torch.tensor([[4]])}),)}
    moved = permute({"w": torch.arange(1, 8)}, dims, {"a": torch.tensor([1, 0])})
    assert moved["w"].tolist() == [3, 4, 1, 2, 5, 7, 6]


@pytest.mark.parametrize("name, width, size", MODELS)
def test_consistent_permutations_keep_the_output_and_others_change_it(name, width, size):
    model = built(name, width, size)
    axes = find_axes(model, (3, size, size))
    before, images = model.state_dict(), torch.randn(4, 3, size, size)
    assert axes.dims.keys() == before.keys()
    permutation = random_permutation(axes, seed=1)
    after = permute(before, axes.dims, permutation)
    assert check_same_function(model, before, after, images) < 1e-9
    assert not same(after, before)
    assert same(permute(after, axes.dims, inverse(permutation)), before)
    for key, layouts in axes.dims.items():  # a single tensor permuted alone
        for dim in (dim for dim, layout in enumerate(layouts) if layout):
            alone = before | {key: before[key].roll(1, dim)}
            with pytest.raises(RuntimeError, match="another function"):
                check_same_function(model, before, alone, images)
