"""Masks that need no IMP."""

import pytest
import torch
from torch import nn

from analyze import other_masks
from common import checkpoint
from common.data import load_described
from common.models import build_model
from tests.conftest import refuse, result, sparse, state, succeed

SHAPES = {
    "conv": torch.Size([4, 2, 3, 3]),
    "wide": torch.Size([10, 10]),
    "thin": torch.Size([2, 3]),
}


def test_erk_by_hand():
    # Sums of dimensions are 12, 20 and 5: those of a hundred weights are shared in that proportion.
    few = other_masks.densities(SHAPES, 37)
    assert few == pytest.approx({"conv": 12 / 72, "wide": 20 / 100, "thin": 5 / 6})
    # At twice as many the thin layer is full, and the two others share the rest.
    more = other_masks.densities(SHAPES, 70)
    assert more == pytest.approx({"conv": 24 / 72, "wide": 40 / 100, "thin": 1})


@pytest.mark.parametrize("keep", (37, 70))
def test_random_masks_have_the_densities_asked_for(keep):
    density = other_masks.densities(SHAPES, keep)
    one, other = (other_masks.random_scores(SHAPES, density, seed) for seed in (0, 1))
    mask = other_masks.largest(one, keep)
    assert {name: int(entry.sum()) for name, entry in mask.items()} == {
        name: round(density[name] * shape.numel()) for name, shape in SHAPES.items()
    }
    assert not torch.equal(mask["wide"], other_masks.largest(other, keep)["wide"])


def test_snip_by_hand():
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    # Of equal logits' derivatives: softmax minus the label, times the input.
    images, labels = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    p = torch.softmax(images @ layer.weight.detach().T, 1)[0]
    expected = layer.weight.detach().abs() * (p - torch.tensor([1.0, 0])).abs()[:, None] * images
    found = other_masks.snip(layer, ["weight"], [(images, labels)])["weight"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ("erk", "uniform", "magnitude", "snip"))
def test_stage_4_trains_under_such_a_mask_and_tables_name_it(ends, tmp_path, kind):
    cell, masks, target = "--rewind 1 --sparsity 0.5", tmp_path / "masks", ends[1]
    succeed("analyze.other_masks", target, "--kind", kind, cell, "--out", masks)
    outcome = sparse("imp-target", target, masks, tmp_path / "sparse", cell)
    assert outcome.code == 0, outcome.err
    assert result(tmp_path / "sparse/s0.50_k001")["arguments"]["tag"] == kind
    early, mask = checkpoint.load_dense(target, 1), state(masks / "mask_0.50.pt")["mask"]
    if kind in ("magnitude", "snip"):  # what is kept is above what is not, over all layers
        model = build_model(**early["model"])
        model.load_state_dict(early["state_dict"])
        data = load_described(early["dataset"]).eval_batches("train")
        sum(nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in data).backward()
        layers = {name: model.get_parameter(name) for name in mask}
        scores = {name: (w * (w.grad if kind == "snip" else 1)).abs() for name, w in layers.items()}
        kept, pruned = (
            torch.cat([score[mask[name] == which] for name, score in scores.items()])
            for which in (True, False)
        )
        assert kept.min() >= pruned.max() * 0.999


def test_what_the_run_has_not_is_refused(ends, tmp_path):
    command = "analyze.other_masks", ends[1], "--kind erk --sparsity 0.5"
    refuse((*command, "--rewind 7 --out", tmp_path / "masks"), "epoch")
    assert not (tmp_path / "masks").exists()
    mask = ends[2] / "mask_0.50.pt"  # of IMP
    before = mask.read_bytes()
    refuse((*command, "--rewind 1 --out", ends[2]), mask, "choose another --out")
    assert mask.read_bytes() == before
