import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from common import masking
from common.models import build_model

WEIGHTS = {"a": torch.tensor([[1.0, -2.0], [3.0, -4.0]]), "b": torch.tensor([0.5, -5.0])}


def test_magnitude_pruning_by_hand():
    full = masking.dense_mask(WEIGHTS, ["a", "b"])
    mask = masking.prune_by_magnitude(WEIGHTS, full, 3)  # the three largest magnitudes: 3, 4, 5
    assert mask["a"].tolist() == [[False, False], [True, True]] and mask["b"].tolist() == [False, True]
    assert masking.sparsity(mask) == 0.5 and masking.kept(mask) == 3 and masking.size(mask) == 6
    again = masking.prune_by_magnitude(WEIGHTS | {"b": torch.tensor([9.0, -5.0])}, mask, 2)
    assert masking.kept(again) == 2 and again["b"].tolist() == [
        False,
        True,
    ]  # what is pruned stays so, however large it is
    assert masking.kept(full) == 6  # the input is left alone
    with pytest.raises(ValueError):
        masking.prune_by_magnitude(WEIGHTS, mask, 4)


@pytest.mark.parametrize("rounds", [1, 3])
def test_equals_torch_global_unstructured(rounds):
    model = build_model("resnet20", 0.5, seed=1)
    names = masking.prunable(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    mask = masking.dense_mask(weights, names)
    layers = [(model.get_submodule(name.removesuffix(".weight")), "weight") for name in names]
    for _ in range(rounds):
        keep = masking.keep_count(masking.kept(mask), 0.3)
        prune.global_unstructured(layers, prune.L1Unstructured, amount=masking.kept(mask) - keep)
        mask = masking.prune_by_magnitude(weights, mask, keep)
        for name, (layer, _) in zip(names, layers):
            assert torch.equal(mask[name], layer.weight_mask.bool()), name
    assert masking.kept(mask) == keep


def test_keep_count_meets_the_sparsity_to_one_weight():
    for total in (7, 1000, 268_336):
        for sparsity in (0.8, 0.9, 0.95, 0.97):
            assert abs(total * (1 - sparsity) - masking.keep_count(total, sparsity)) <= 0.5


def test_sparsity_total_counts_the_shortcuts():
    model = build_model("resnet20", 1)
    mask = {name: torch.zeros_like(model.state_dict()[name], dtype=torch.bool) for name in masking.prunable(model)}
    assert masking.sparsity(mask) == 1
    assert masking.sparsity_total(mask, model) == pytest.approx(268_336 / 291_376)


def test_apply_and_signs():
    mask = {"a": torch.tensor([[True, False], [False, True]])}
    masked = masking.apply(WEIGHTS, mask)
    assert masked["a"].tolist() == [[1, 0], [0, -4]] and masked["b"].tolist() == [0.5, -5]
    assert masking.signs(WEIGHTS, ["a"])["a"].tolist() == [[True, False], [True, False]]


def test_masker_holds_the_mask_and_notices_a_leak():
    layer = nn.Linear(2, 2, bias=False)
    masker = masking.Masker(layer, {"weight": torch.tensor([[True, False], [False, True]])})
    with pytest.raises(RuntimeError, match="2 pruned"):
        masker.check()
    masker.apply()
    masker.check()
    assert layer.weight[0, 1] == 0 and layer.weight[0, 0] != 0
    with torch.no_grad():
        layer.weight[0, 1] = 1e-30
    with pytest.raises(RuntimeError, match="1 pruned"):
        masker.check()


def test_signs_fan_in_and_shuffling_by_hand():
    positive = {"a": torch.tensor([[False, True], [True, False]])}
    assert masking.with_signs({"a": WEIGHTS["a"]}, positive)["a"].tolist() == [[-1, 2], [3, -4]]
    mask = {"a": torch.tensor([[True, False], [False, False]])}
    scaled = masking.rescale_fan_in({"a": torch.tensor([[3.0, 0.0], [0.0, 0.0]])}, mask)["a"]
    assert scaled[0, 0].item() == pytest.approx(3 * 2**0.5) and scaled[1].tolist() == [0, 0]  # a row with none stays 0
    wide = {"a": torch.arange(100) < 30, "b": torch.arange(50).view(5, 10) < 40}
    shuffled = masking.shuffle(wide, seed=1)
    assert {name: int(entry.sum()) for name, entry in shuffled.items()} == {"a": 30, "b": 40}
    assert shuffled["b"].shape == (5, 10) and not torch.equal(shuffled["a"], wide["a"])
    assert torch.equal(masking.shuffle(wide, 1)["a"], shuffled["a"])
    assert not torch.equal(masking.shuffle(wide, 2)["a"], shuffled["a"])
