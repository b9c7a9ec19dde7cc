import pytest
import torch
from torch import nn

from common.align.permutation import Place, check_same_function, permute


def place(axis, dim, positions):
    return Place("", dim, axis, torch.tensor(positions))


def test_permute_by_hand():
    tensors = {"w": torch.tensor([[1, 2], [3, 4], [5, 6]]), "v": torch.tensor([10, 11, 12, 13])}
    dims = {
        "w": [place("out", 0, [[0], [1], [2]]), place("in", 1, [[0], [1]])],
        "v": [place("in", 0, [[0, 1], [2, 3]])],  # channels of two entries each
    }
    rows = {"out": torch.tensor([2, 0, 1])}
    permuted = permute(tensors, dims, rows | {"in": torch.tensor([1, 0])})
    # Entry i is the source channel that moves to i: row 2 of w comes first, its columns swapped.
    assert permuted["w"].tolist() == [[6, 5], [2, 1], [4, 3]]
    assert permuted["v"].tolist() == [12, 13, 10, 11]
    assert tensors["w"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert permute(tensors, dims, rows)["w"].tolist() == [[5, 6], [1, 2], [3, 4]]


def test_an_axis_of_scattered_positions_by_hand():
    # Channel 0 lies at 0, 1 and 5, channel 1 at 2, 3 and 6; position 4 is another axis.
    dims = {"w": [place("a", 0, [[0, 1, 5], [2, 3, 6]]), place("b", 0, [[4]])]}
    permuted = permute({"w": torch.arange(1, 8)}, dims, {"a": torch.tensor([1, 0])})
    assert permuted["w"].tolist() == [3, 4, 1, 2, 5, 7, 6]


def test_a_network_that_creates_constants_is_compared_in_float64():
    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x) @ torch.eye(self.out_features)

    model = Fixed(3, 2)
    state, images = model.state_dict(), torch.randn(4, 3)
    assert check_same_function(model, state, state, images) == 0
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(RuntimeError, match="another function"):
        check_same_function(model, state, state | {"bias": state["bias"].flip(0)}, images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_of_any_kind_from_code_of_any_precision_are_compared(dtype):
    class Fixed(nn.Linear):
        def forward(self, x):
            kernel = torch.eye(3, dtype=torch.float32 if dtype == torch.float32 else x.dtype)
            return {"logits": super().forward(x @ kernel), "aux": None}, 1.5

    model = Fixed(3, 2)
    state, images = model.state_dict(), torch.randn(4, 3)
    assert check_same_function(model, state, state, images) == 0
    with pytest.raises(RuntimeError, match="another function"):
        check_same_function(model, state, state | {"bias": state["bias"].flip(0)}, images)
