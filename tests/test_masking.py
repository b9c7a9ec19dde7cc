import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common import masking
from common.errors import UserError
from common.models import build_model
from tests.conftest import same

WEIGHTS = {"a": torch.tensor([[1.0, -2.0], [3.0, -4.0]]), "b": torch.tensor([0.5, -5.0])}
DIAGONAL = torch.tensor([[True, False], [False, True]])


def as_lists(tensors):
    return {name: value.tolist() for name, value in tensors.items()}


def test_magnitude_pruning_by_hand():
    full = masking.dense_mask(WEIGHTS, ["a", "b"])
    mask = masking.prune_by_magnitude(WEIGHTS, full, 3)  # the three largest: 3, 4, 5
    assert as_lists(mask) == {"a": [[False, False], [True, True]], "b": [False, True]}
    assert masking.sparsity(mask) == 0.5 and masking.numel(mask) == 6
    # Pruned weights stay pruned, however large they are.
    again = masking.prune_by_magnitude(WEIGHTS | {"b": torch.tensor([9.0, -5.0])}, mask, 2)
    assert as_lists(again) == {"a": [[False, False], [False, True]], "b": [False, True]}
    assert masking.num_kept(full) == 6  # the input is not modified
    with pytest.raises(ValueError):
        masking.prune_by_magnitude(WEIGHTS, mask, 4)


@pytest.mark.parametrize(
    "prune, message",
    [
        (lambda _, mask, keep: mask, "kept 3 weights: it must keep exactly 2"),
        (lambda *_: {"a": WEIGHTS["a"] == 1, "b": torch.tensor([True, False])}, "brought back"),
        (lambda _, mask, keep: {"a": mask["a"] * 1.0, "b": mask["b"]}, "types"),
    ],
)
def test_a_pruning_function_that_breaks_its_contract_is_named(prune, message):
    mask = {"a": WEIGHTS["a"] > 2, "b": torch.tensor([True, True])}
    with pytest.raises(ValueError, match=f"<lambda> .*{message}"):
        masking.prune_exactly(prune, WEIGHTS, mask, 2)


def test_keep_count_meets_the_sparsity_to_one_weight():
    for total in (70, 268_336):
        for sparsity in (0.8, 0.9, 0.95, 0.97):
            assert abs(total * (1 - sparsity) - masking.keep_count(total, sparsity)) <= 0.5


def test_the_plan_of_a_chain_by_hand():
    """80, 64, 51 and so on of 100; a branch starts from the last round that keeps more weights."""
    rounds = [(1, 80, 0.2), (1, 80, None), (2, 70, 0.3), (2, 64, None), (3, 51, None), (4, 50, 0.5)]
    assert masking.plan_rounds(100, [0.2, 0.5, 0.3], 0.2) == rounds
    assert masking.plan_rounds(100, [0.5, 0.3], 1) == [(1, 50, 0.5), (1, 70, 0.3)]  # one-shot
    with pytest.raises(UserError, match="0.999 keeps all or none of the 100"):
        masking.plan_rounds(100, [0.999], 0.2)


def test_sparsity_total_counts_the_shortcuts():
    model = build_model("resnet20", 1)
    full = masking.dense_mask(model.state_dict(), masking.prunable(model))
    empty = {name: ~layer_mask for name, layer_mask in full.items()}
    assert masking.sparsity(empty) == 1
    assert masking.sparsity_total(empty, model) == pytest.approx(268_336 / 291_376)


def test_total_sparsity_counts_all_that_the_mask_covers():
    """Also what is no convolution or linear layer."""
    model = nn.MultiheadAttention(4, 1)
    mask = {"in_proj_weight": torch.zeros(12, 4, dtype=torch.bool)}
    assert masking.sparsity_total(mask, model) == 48 / (48 + 16)


@pytest.mark.parametrize("layers", ["normed", "shared"])
def test_layers_that_cannot_be_pruned_are_named(layers):
    shared = nn.Linear(4, 4)
    last = weight_norm(nn.Linear(4, 2)) if layers == "normed" else nn.Sequential(shared)
    with pytest.raises(UserError, match=r"[01].weight cannot be pruned"):
        masking.prunable(nn.Sequential(shared, last))


def test_apply_signs_fan_in_by_hand():
    masked = masking.apply(WEIGHTS, {"a": DIAGONAL})
    assert as_lists(masked) == {"a": [[1, 0], [0, -4]], "b": [0.5, -5]}
    signs = masking.signs(WEIGHTS, ["a"])
    assert as_lists(signs) == {"a": [[True, False], [True, False]]}
    kept = {"a": torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])}
    scaled = masking.rescale_fan_in({"a": 3.0 * kept["a"]}, kept)["a"]
    expected = torch.tensor([3 * 2**0.5, 0, 3])  # a row with none stays 0
    assert torch.allclose(scaled.amax(1), expected) and torch.equal(scaled > 0, kept["a"])


def test_a_shuffled_mask_depends_on_the_seed_alone():
    mask = {"a": torch.arange(100) < 30}
    first, again, other = (masking.shuffle(mask, seed) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)
