"""Baseline masks that need no IMP."""

import pytest
import torch
from torch.nn import functional as F
from torch import nn

from analyze import other_masks
from common import checkpoint, masking
from common.data import load_data
from common.models import build_model
from tests.conftest import small_cnn, refuse, result, same, stage4, state, succeed

SHAPES = {
    "conv": torch.Size([4, 2, 3, 3]),
    "wide": torch.Size([10, 10]),
    "thin": torch.Size([2, 3]),
}


def test_erk_by_hand():
    # The sums of dimensions are 12, 20 and 5: the layers keep 12, 20 and 5 of 37 weights.
    density = other_masks.densities(SHAPES, 37)
    assert density == pytest.approx({"conv": 12 / 72, "wide": 20 / 100, "thin": 5 / 6})
    # With 70 weights the thin layer is full, and the two others share the other 64.
    density = other_masks.densities(SHAPES, 70)
    assert density == pytest.approx({"conv": 24 / 72, "wide": 40 / 100, "thin": 1})


def test_random_masks_have_the_requested_densities():
    density = other_masks.densities(SHAPES, 37)
    scores = [other_masks.random_scores(SHAPES, density, seed) for seed in (0, 1)]
    dense = masking.dense_mask(scores[0], [*SHAPES])
    masks = [masking.prune_by_magnitude(score, dense, 37) for score in scores]
    assert [int(layer.sum()) for layer in masks[0].values()] == [12, 20, 5]
    assert not same(*masks)


def test_snip_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = weight = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    images, labels = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    # The gradient of the logits is softmax minus the one-hot label.
    gradient = (images @ weight.T).softmax(1) - torch.tensor([1.0, 0])
    scores = other_masks.snip(layer, ["weight"], [(images, labels)])["weight"]
    torch.testing.assert_close(scores, (weight * gradient.T * images).abs())


@pytest.mark.parametrize("tag", ("erk", "magnitude@1", "snip@1"))
def test_stage_4_trains_under_such_a_mask_and_inherits_its_tag(ends, tmp_path, tag):
    kind = tag.partition("@")[0]
    cell, masks, target = "--rewind 1 --sparsity 0.5", tmp_path / "masks", ends[1]
    succeed("analyze.other_masks", target, "--kind", kind, cell, "--out", masks)
    succeed(*stage4("imp-target", target, masks, tmp_path / "sparse", cell))
    assert result(tmp_path / "sparse/s0.50_k001")["arguments"]["tag"] == tag
    assert "by other code" not in succeed("analyze.results", tmp_path / "sparse")
    early, mask = checkpoint.load_dense(target, 1), state(masks / "mask_0.50.pt")["mask"]
    scores = {name: early["state_dict"][name].abs() for name in mask}
    if kind == "snip":
        model = build_model(**early["model"])
        model.load_state_dict(early["state_dict"])
        data = load_data(early["dataset"]).eval_batches("train")
        scores = other_masks.snip(model, [*mask], data)
    # Except for erk, all kept weights have higher scores than all pruned weights.
    kept, pruned = (
        torch.cat([score[mask[name] == keep] for name, score in scores.items()])
        for keep in (True, False)
    )
    assert (kept.min() >= pruned.max() * 0.999) == (kind in ("magnitude", "snip"))


def test_a_missing_epoch_and_an_existing_mask_are_refused(ends, tmp_path):
    command = "analyze.other_masks", ends[1], "--kind erk --sparsity 0.5"
    refuse((*command, "--rewind 7 --out", tmp_path / "masks"), "epoch")
    refuse((*command, "0.99999 --rewind 1 --out", tmp_path / "masks"), "keeps all or none")
    assert not (tmp_path / "masks").exists()
    mask = ends[2] / "mask_0.50.pt"  # of IMP
    before = mask.read_bytes()
    refuse((*command, "--rewind 1 --out", ends[2]), mask, "choose another --out")
    assert mask.read_bytes() == before


def test_snip_at_the_initialisation_normalises_by_batch():
    """Running statistics of BatchNorm are still zeros and ones there."""
    images, labels = torch.randn(16, 3, 8, 8) * 3 + 1, torch.arange(16) % 10
    model, twin = small_cnn(), small_cnn().train()
    F.cross_entropy(twin(images), labels, reduction="sum").backward()
    scores = other_masks.snip(model, ["0.weight"], [(images, labels)])["0.weight"]
    assert torch.allclose(scores, (twin[0].weight * twin[0].weight.grad).abs())
