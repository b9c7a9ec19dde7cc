"""The analysis of masks and of matching methods, and what analyses keep."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from analyze import masks, methods, planted
from analyze.lib import cache, lines, overlap
from analyze.lib.runs import sparse_runs
from common import masking
from tests.conftest import call, stage2, stage3, stage4, succeed


def test_overlap_by_hand():
    mask = {"w": torch.tensor([[True, True, False, False], [True, False, False, False]])}
    reference = {"w": torch.tensor([[True, False, False, True], [True, True, False, False]])}
    (row,) = overlap.by_layer(mask, reference)
    # 3 and 4 of 8 are kept, 2 by both; by chance 3 * 4 / 8.
    assert row == {
        "layer": "w",
        "weights": 8,
        "kept": 3,
        "kept_reference": 4,
        "shared": 2,
        "chance": 1.5,
    }


def test_idle_units_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    mask = {
        "0.weight": torch.tensor([True, False, True]).view(3, 1, 1, 1),
        "3.weight": torch.ones(2, 12, dtype=torch.bool),
    }
    mask["3.weight"][:, 4:] = False  # nothing reads the four places of unit 1, nor those of unit 2
    assert masks.idle_units(mask, model, (1, 2, 2)) == {
        "units": 3,
        "without_inputs": 1,
        "without_outputs": 2,
    }
    # A layer that is never pruned keeps everything.
    assert masks.idle_units({"3.weight": mask["3.weight"]}, model, (1, 2, 2))["without_inputs"] == 0


def align_and_train(root, a, b, name, *flags):
    source, target = root / f"dense/seed{a}", root / f"dense/seed{b}"
    out = root / f"align/{name}/seed{a}-seed{b}"
    succeed(*stage3(source, target, root / f"imp/seed{a}", out, *flags))
    succeed(*stage4("permuted", target, out, root / f"sparse/permuted/{name}/seed{a}-seed{b}"))


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The pipeline with IMP on both targets, and a second method."""
    root = tmp_path_factory.mktemp("compared") / "runs"
    shutil.copytree(runs, root)
    for a, b in ((0, 1), (2, 3)):
        succeed(*stage2(root / f"dense/seed{b}", root / f"imp/seed{b}"))
        align_and_train(root, a, b, "masked", "--method", "masked")
    return root


def test_masks_says_what_is_missing(runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(runs, root)
    assert "run prune_imp.py on B" in succeed("analyze.masks", root)
    outcome = call("analyze.masks", tmp_path / "nowhere")
    assert outcome.code == 2 and "nowhere" in outcome.err


def test_masks_compares_with_imp_on_the_target(compared):
    out = succeed("analyze.masks", compared)
    table = pd.read_csv(compared / "masks.csv")
    assert set(table["method"]) == {"naive", "activation", "masked"} and "ratio" in out
    # A row, layer and method recomputed from the files.
    row = table.query("method == 'activation' and sparsity == 0.7 and source_seed == 2").iloc[1]
    ours = torch.load(compared / "align/activation/seed2-seed3/mask_0.70.pt", weights_only=True)[
        "mask"
    ][row["layer"]]
    reference = torch.load(compared / "imp/seed3/mask_0.70.pt", weights_only=True)["mask"][
        row["layer"]
    ]
    assert row["shared"] == int((ours & reference).sum()) and row["target_seed"] == 3
    assert row["chance"] == pytest.approx(int(ours.sum()) * int(reference.sum()) / ours.numel())
    shares = overlap.summary(table)
    assert (shares["pairs"] == 2).all() and shares["chance"].between(0, 100).all()
    plain = shares[shares["method"] == "naive"].set_index("sparsity")["chance"]
    moved = shares[shares["method"] == "activation"].set_index("sparsity")["chance"]
    assert plain.tolist() == pytest.approx(
        moved.tolist()
    )  # permuting keeps the sparsity of every layer
    layers = pd.read_csv(compared / "layer_sparsity.csv").query("sparsity == 0.7")
    kept = layers["weights"] * (1 - layers["layer_sparsity"])
    assert 1 - kept.sum() / layers["weights"].sum() == pytest.approx(0.7, abs=1e-3)


def test_methods_puts_everything_beside_each_other(compared):
    succeed("analyze.interpolation", compared, "--points", 3, "--images", 64)
    succeed("analyze.methods", compared)
    table = pd.read_csv(compared / "methods.csv").query("k == 0").set_index(["sparsity", "method"])
    assert set(table.index.get_level_values("method")) == {"naive", "activation", "masked"}
    assert table.notna().all().drop(labels=["minus naive", "± SE", "tag"]).all()
    for sparsity in (0.5, 0.7):
        naive, activation, masked = (
            table.loc[(sparsity, method)] for method in ("naive", "activation", "masked")
        )
        assert masked["masked_cosine"] >= activation["masked_cosine"] > naive["masked_cosine"]
        assert activation["cosine"] > naive["cosine"] and pd.isna(naive["minus naive"])
        assert activation["accuracy"] - naive["accuracy"] == pytest.approx(
            activation["minus naive"]
        )


def test_cosines_are_of_the_masks_that_were_permuted(compared):
    run = next(run for run in lines.alignments(compared) if run["method"] == "activation")
    rows = {(row["sparsity"], row["method"]): row for row in methods.measures(run)}
    weights = [
        torch.load(run[role], weights_only=True)["state_dict"] for role in ("source", "target")
    ]
    mask = torch.load(compared / "imp/seed0/mask_0.50.pt", weights_only=True)["mask"]
    a, b = (
        torch.cat([value.flatten() for value in end.values()]).double()
        for end in (masking.apply(weights[0], mask), weights[1])
    )
    assert rows[0.5, "naive"]["masked_cosine"] == pytest.approx(
        float(a @ b / a.norm() / b.norm()), abs=1e-6
    )


def test_planted_permutations_are_recovered_and_counted(runs, tmp_path):
    assert planted.recovered({"a": torch.tensor([1, 2, 0])}, {"a": torch.tensor([2, 0, 1])}) == 100
    assert planted.recovered(
        {"a": torch.tensor([1, 0, 2])}, {"a": torch.tensor([2, 0, 1])}
    ) == pytest.approx(100 / 3)
    state = {"w": torch.randn(50, 50), "b": torch.zeros(1)}
    assert (planted.noisy(state, ["w"], 0.5, 0)["w"] - state["w"]).std() == pytest.approx(
        0.5 * float(state["w"].std()), rel=0.05
    )
    root = tmp_path / "copy"
    shutil.copytree(runs / "dense", root / "dense")
    succeed("analyze.planted", root, "--images", 250, "--device", "cpu")
    table = pd.read_csv(root / "planted.csv")
    means = table.groupby(["noise", "method"])["recovered"].mean()
    assert means[0.0, "weight"] == means[0.0, "masked"] == 100
    assert means[0.0, "activation"] > 50 > means[2.0, "activation"]
    assert (
        set(table["dataset"]) == {"glyphs"}
        and table.groupby(["noise", "method"])["seed"].nunique().eq(4).all()
    )
    for seed in (1, 2, 3):
        shutil.rmtree(root / f"dense/seed{seed}")
    assert "nan" not in succeed(
        "analyze.planted", root, "--images", 250, "--device", "cpu"
    )  # one has no spread


def test_coverage_lists_networks():
    out = succeed("analyze.coverage", "resnet18", "swin_t").splitlines()
    assert out[0].split()[:3] == ["model", "axes", "free"]
    assert out[1].split()[:5] == ["resnet18", "12", "2,880", "0", "10"]
    assert out[2].split()[:5] == ["swin_t", "52", "19,104", "8,970", "10"]
    outcome = call("analyze.coverage", "resnet19")
    assert outcome.code == 2 and "resnet19" in outcome.err


def test_two_match_epochs_below_one_root_are_kept_apart(compared, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(compared, root)
    align_and_train(root, 0, 1, "early", "--target-epoch", 1)
    succeed("analyze.masks", root)
    succeed("analyze.methods", root)
    table = (
        pd.read_csv(root / "methods.csv")
        .query("k == 0 and sparsity == 0.7")
        .set_index(["match_epoch", "method"])
    )
    early, late = (1, "activation"), (3, "activation")
    assert sorted(table.index) == [early, (1, "naive"), late, (3, "masked"), (3, "naive")]
    row = sparse_runs(root).query(
        "arm == 'permuted' and match_epoch == 1 and sparsity == 0.7 and rewind == 0"
    )
    assert table.loc[(1, "activation"), "accuracy"] == pytest.approx(row["test_acc"].item())
    before = (
        methods.table(compared)
        .query("k == 0 and sparsity == 0.7 and method == 'naive'")["cosine"]
        .item()
    )
    assert table.loc[(3, "naive"), "cosine"] == pytest.approx(before)


def test_the_finest_curve_gives_the_barrier(compared, tmp_path):
    root = tmp_path / "runs"
    shutil.copytree(compared, root)
    run = lines.alignments(root)[0]
    for points, peak in ((5, 9.0), (21, 1.0)):
        curve = pd.DataFrame({"alpha": np.linspace(0, 1, points), "repair": False, "images": 100})
        curve["test_loss"] = peak * (curve["alpha"] == 0.5)
        curve.to_csv(lines.curve_file(run, "aligned", points, 100), index=False)
    assert lines.kept_barriers(run, "aligned")["barrier"] == 1


def test_what_is_kept_is_named_by_the_code_that_made_it(tmp_path, monkeypatch):
    shutil.copytree(Path(cache.__file__).parent, tmp_path / "lib")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "lib/cache.py"))

    def digest(name, text):
        with open(tmp_path / "lib" / name, "a") as file:
            file.write(text)
        cache.code_digest.cache_clear()
        return cache.code_digest(lines.__file__)

    first = digest("repair.py", "# a remark\n")
    assert digest("repair.py", "# another\n") == digest("style.py", "RED = 1\n") == first
    assert digest("repair.py", "EDITED = True\n") != first
    cache.code_digest.cache_clear()
    assert cache.code_digest(lines.__file__) != cache.code_digest(methods.__file__)
