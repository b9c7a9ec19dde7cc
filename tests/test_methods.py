"""The analyses of masks and of matching methods, and the cache of analyses."""

import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from analyze import methods
from analyze.lib import lines, networks, overlap
from analyze.lib.runs import sparse_runs
from common import masking, provenance
from tests.conftest import (
    align_and_train,
    call,
    edit,
    refused,
    stage2,
    stage3,
    stage4,
    state,
    succeed,
    weights,
)


def align(root, a, b, name, flags):
    files = root / f"dense/seed{a}", root / f"dense/seed{b}", root / f"imp/seed{a}"
    succeed(*stage3(*files, root / f"align/{name}/seed{a}-seed{b}", flags))


def test_overlap_by_hand():
    mask = {"w": torch.tensor([[True, True, False, False], [True, False, False, False]])}
    reference = {"w": torch.tensor([[True, False, False, True], [True, True, False, False]])}
    (row,) = overlap.layer_overlap(mask, reference)
    # 3 and 4 of 8 are kept, 2 by both; 3 * 4 / 8 by chance.
    expected = {"layer": "w", "weights": 8, "kept": 3, "kept_reference": 4}
    assert row == expected | {"shared": 2, "chance": 1.5}


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The pipeline with IMP on both targets, a second method, and early matching."""
    root = shutil.copytree(runs, tmp_path_factory.mktemp("compared") / "runs")
    for a, b in ((0, 1), (2, 3)):
        succeed(*stage2(root / f"dense/seed{b}", root / f"imp/seed{b}"))
        align_and_train(root, a, b, "masked", "--method masked")
        align_and_train(root, a, b, "early", "--target-epoch 1")
    return root


def test_masks_reports_missing_runs(runs, tmp_path):
    shutil.copytree(runs / "imp", tmp_path / "imp")
    assert "run prune_imp.py on B" in succeed("analyze.masks", tmp_path)
    refused(call("analyze.masks", tmp_path / "nowhere"), "nowhere")
    shutil.copytree(runs / "imp/seed0", tmp_path / "again")
    refused(call("analyze.masks", tmp_path), "imp/seed0/mask_0.50.pt", "again/mask_0.50.pt")


def test_masks_compares_with_imp_on_the_target(compared):
    assert "ratio" in succeed("analyze.masks", compared)
    table = pd.read_csv(compared / "masks.csv")
    # One row is recomputed from the files.
    row = table.query("match_epoch == 1 and sparsity == 0.7 and source_seed == 2").iloc[1]
    files = "align/early/seed2-seed3/mask_0.70.pt", "imp/seed3/mask_0.70.pt"
    mask, reference = (state(compared / file)["mask"][row["layer"]] for file in files)
    assert row["shared"] == int((mask & reference).sum()) and row["target_seed"] == 3
    shares = overlap.summary(table)
    assert len(shares) == 2 * 4 and (shares["pairs"] == 2).all()
    assert set(shares["method"]) == {"naive", "activation", "masked"}
    # A permutation does not change the sparsity of a layer.
    assert (shares.groupby("sparsity")["chance"].std() < 1e-9).all()
    layers = pd.read_csv(compared / "layer_sparsity.csv").query("sparsity == 0.7")
    kept = layers["weights"] * (1 - layers["layer_sparsity"])
    assert 1 - kept.sum() / layers["weights"].sum() == pytest.approx(0.7, abs=1e-3)


def test_methods_are_compared_in_one_table(compared):
    succeed("analyze.interpolation", compared, "--points 3 --images 64 --device cpu")
    succeed("analyze.methods", compared)
    table = pd.read_csv(compared / "methods.csv").query("k == 0")
    assert table.drop(columns=["minus naive", "± SE", "tag", "match_epoch"]).notna().all(axis=None)
    for sparsity, group in table.groupby("sparsity"):
        rows = group.fillna({"match_epoch": 0}).set_index(["method", "match_epoch"]).sort_index()
        (_, early), (_, activation), (_, masked), (_, naive) = rows.iterrows()
        keys = [("activation", 1), ("activation", 3), ("masked", 3), ("naive", 0)]
        assert [*rows.index] == keys
        assert masked["masked_cosine"] >= activation["masked_cosine"] > naive["masked_cosine"]
        assert activation["cosine"] > naive["cosine"] and pd.isna(naive["minus naive"])
        gain = activation["accuracy"] - naive["accuracy"]
        assert gain == pytest.approx(activation["minus naive"])
        cell = f"match_epoch == 1 and sparsity == {sparsity} and rewind == 0"
        accuracies = sparse_runs(compared).query(cell)["test_acc"]
        assert early["accuracy"] == pytest.approx(accuracies.mean()) and len(accuracies) == 2


def test_barriers_of_an_earlier_permutation_are_left_out(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "runs")
    succeed("analyze.interpolation", root, "--points 3 --images 64 --device cpu")
    table = methods.compare_methods(root).query("method == 'activation'")
    assert table["barrier"].notna().all()
    for pair in ((0, 1), (2, 3)):
        shutil.rmtree(root / "align/activation/seed{}-seed{}".format(*pair))
        align(root, *pair, "activation", "--match-images 64")
    table = methods.compare_methods(root).query("method == 'activation'")
    assert len(table) and table["barrier"].isna().all()


def test_alignments_and_masks_of_other_settings_are_kept_apart(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "runs")
    align(root, 0, 1, "fewer", "--match-images 64")
    names = {f"activation match_images={count}" for count in ("64", "None")}
    assert {*networks.alignments(root)["method"]} == names
    assert {*overlap.load_masks(root)["method"].dropna()} == names
    succeed(*stage2(root / "dense/seed0", root / "imp/faster", "--lr 0.05"))
    tags = {"imp lr=0.01", "imp lr=0.05"}
    assert {*networks.imp_networks(root, rounds=False)["tag"]} == tags
    assert {*overlap.load_masks(root)["tag"]} == tags
    ends, masks = (root / "dense/seed0", root / "dense/seed1"), root / "imp/faster"
    succeed(*stage3(*ends, masks, root / "align/faster/seed0-seed1"))
    table = methods.measure_alignments(root, overlap.load_masks(root))
    assert {*table["tag"]} == tags


def test_alignments_of_two_tags_with_one_permutation_are_compared(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "runs")
    align(root, 0, 1, "tagged", "--tag t")
    succeed("analyze.interpolation", root, "--points 3 --images 64 --device cpu")
    succeed("analyze.methods", root)
    assert {"", "t"} == {*pd.read_csv(root / "methods.csv")["tag"].fillna("")}


def test_methods_needs_only_alignments(runs, tmp_path):
    for folder in ("dense", "align"):
        shutil.copytree(runs / folder, tmp_path / folder)
    succeed("analyze.methods", tmp_path)
    assert "k" not in pd.read_csv(tmp_path / "methods.csv")
    shutil.copytree(runs / "sparse/naive", tmp_path / "sparse/naive")
    succeed("analyze.methods", tmp_path)
    table = pd.read_csv(tmp_path / "methods.csv")
    assert table["accuracy"].notna().tolist() == (table["method"] == "naive").tolist()
    edit(tmp_path, "naive", mask_dataset="other")
    outcome = call("analyze.methods", tmp_path)
    assert "with a mask of its own data set" in outcome.err and "activation" in outcome.out
    refused(call("analyze.masks", tmp_path / "align"), "only permuted masks")


def test_cosines_by_hand(compared):
    runs = networks.alignments(compared)
    runs = runs.query("method == 'activation' and match_epoch == 3 and sparsity == 0.5")
    runs = runs.to_dict("records")
    rows = [methods.measure_alignment(run)[0] for run in runs]
    mask = state(compared / "imp/seed0/mask_0.50.pt")["mask"]
    states = masking.apply(weights(runs[0]["source"]), mask), weights(runs[0]["target"])
    a, b = (parameters_to_vector(tensors.values()) for tensors in states)
    assert (rows[0]["sparsity"], rows[0]["method"]) == (0.5, "naive")
    expected = torch.cosine_similarity(a, b, 0).item()
    assert rows[0]["masked_cosine"] == pytest.approx(expected, abs=1e-6)
    # In the table, a mean over pairs, naive is compared with the latest B.
    table = methods.compare_methods(compared).query(
        "method == 'naive' and sparsity == 0.5 and k == 0"
    )
    assert table["cosine"].item() == pytest.approx(np.mean([row["cosine"] for row in rows]))


def test_barriers_are_read_from_the_file_of_interpolation(compared):
    succeed("analyze.interpolation", compared, "--points 3 --images 64 --device cpu")
    barriers = pd.read_csv(compared / "barriers.csv").query("repair")
    lines = barriers.groupby(["method", "match_epoch", "curve"])["test"].mean()
    rows = methods.compare_methods(compared).groupby(["method", "sparsity"])["barrier, REPAIR"]
    rows = rows.unique().map(list)
    early, late = (lines["activation", epoch, "aligned"] for epoch in (1, 3))
    assert rows["activation", 0.5] == pytest.approx([early, late])
    assert rows["naive", 0.5] == pytest.approx([lines["masked", 3, "naive"]])
    masked = barriers.query("method == 'masked' and curve == 'aligned' and sparsity == 0.7")
    assert rows["masked", 0.7] == pytest.approx([masked["test"].mean()])


def test_a_cached_table_is_recomputed_for_other_files_settings_or_code(tmp_path, monkeypatch):
    file, count, digest = tmp_path / "a.pt", itertools.count(1), provenance.code_digest
    file.write_bytes(b"1")

    def number(*settings):
        key = methods.__file__, "line", [file], settings
        return lines.cached(*key, lambda: pd.DataFrame([next(count)])).iloc[0, 0]

    assert [number(3), number(4), number(3)] == [1, 2, 1]
    file.write_bytes(b"2")
    assert number(3) == 3
    for expected, script in enumerate((methods.__file__, lines.__file__), 4):
        edited = {script: f"edit {expected}"}
        monkeypatch.setattr(
            provenance, "code_digest", lambda file: edited.get(file) or digest(file)
        )
        assert number(3) == number(3) == expected


def test_methods_separates_runs_of_two_settings(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "runs")
    for arm, masks in (("naive", "imp/seed0"), ("permuted", "align/activation/seed0-seed1")):
        files = root / "dense/seed1", root / masks, root / f"sparse/{arm}/faster"
        succeed(*stage4(arm, *files, "--lr 0.1"))
    table = methods.compare_methods(root).query("k == 0 and sparsity == 0.5").set_index("variant")
    assert {*table.index} == {
        f"{arm} [lr={lr}]" for arm in ("naive", "permuted") for lr in (0.02, 0.1)
    }
    assert table["accuracy"].notna().all()
