"""The analysis of masks and of matching methods, and what analyses keep."""

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
from tests.conftest import align_and_train, call, refused, stage2, stage4, state, succeed, weights


def test_overlap_by_hand():
    mask = {"w": torch.tensor([[True, True, False, False], [True, False, False, False]])}
    reference = {"w": torch.tensor([[True, False, False, True], [True, True, False, False]])}
    (row,) = overlap.by_layer(mask, reference)
    # 3 and 4 of 8 are kept, 2 by both; by chance 3 * 4 / 8.
    expected = {"layer": "w", "weights": 8, "kept": 3, "kept_reference": 4}
    assert row == expected | {"shared": 2, "chance": 1.5}


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The pipeline with IMP on both targets, a second method, and matches to early targets."""
    root = shutil.copytree(runs, tmp_path_factory.mktemp("compared") / "runs")
    for a, b in ((0, 1), (2, 3)):
        succeed(*stage2(root / f"dense/seed{b}", root / f"imp/seed{b}"))
        align_and_train(root, a, b, "masked", "--method masked")
        align_and_train(root, a, b, "early", "--target-epoch 1")
    return root


def test_masks_says_what_is_missing(runs, tmp_path):
    shutil.copytree(runs / "imp", tmp_path / "imp")
    assert "run prune_imp.py on B" in succeed("analyze.masks", tmp_path)
    refused(call("analyze.masks", tmp_path / "nowhere"), "nowhere")
    shutil.copytree(runs / "imp/seed0", tmp_path / "again")
    refused(call("analyze.masks", tmp_path), "imp/seed0/mask_0.50.pt", "again/mask_0.50.pt")


def test_masks_compares_with_imp_on_the_target(compared):
    assert "ratio" in succeed("analyze.masks", compared)
    table = pd.read_csv(compared / "masks.csv")
    # A row, layer and method recomputed from the files.
    row = table.query("match_epoch == 1 and sparsity == 0.7 and source_seed == 2").iloc[1]
    files = "align/early/seed2-seed3/mask_0.70.pt", "imp/seed3/mask_0.70.pt"
    ours, reference = (state(compared / file)["mask"][row["layer"]] for file in files)
    assert row["shared"] == int((ours & reference).sum()) and row["target_seed"] == 3
    shares = overlap.summary(table)
    assert len(shares) == 2 * 4 and (shares["pairs"] == 2).all()
    assert set(shares["method"]) == {"naive", "activation", "masked"}
    # Permuting keeps the sparsity of every layer.
    assert (shares.groupby("sparsity")["chance"].std() < 1e-9).all()
    layers = pd.read_csv(compared / "layer_sparsity.csv").query("sparsity == 0.7")
    kept = layers["weights"] * (1 - layers["layer_sparsity"])
    assert 1 - kept.sum() / layers["weights"].sum() == pytest.approx(0.7, abs=1e-3)


def test_methods_puts_everything_beside_each_other(compared):
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


def test_methods_takes_what_there_is(runs, tmp_path):
    for part in ("dense", "align"):
        shutil.copytree(runs / part, tmp_path / part)
    succeed("analyze.methods", tmp_path)
    assert "k" not in pd.read_csv(tmp_path / "methods.csv")
    shutil.copytree(runs / "sparse/naive", tmp_path / "sparse/naive")
    succeed("analyze.methods", tmp_path)
    table = pd.read_csv(tmp_path / "methods.csv")
    assert table["accuracy"].notna().tolist() == (table["method"] == "naive").tolist()


def test_cosines_are_of_the_masks_that_were_permuted(compared):
    runs = networks.alignments(compared)
    runs = runs.query("method == 'activation' and match_epoch == 3 and sparsity == 0.5")
    runs = runs.to_dict("records")
    rows = [methods.measures(run)[0] for run in runs]
    mask = state(compared / "imp/seed0/mask_0.50.pt")["mask"]
    ends = masking.apply(weights(runs[0]["source"]), mask), weights(runs[0]["target"])
    a, b = (parameters_to_vector(end.values()) for end in ends)
    assert (rows[0]["sparsity"], rows[0]["method"]) == (0.5, "naive")
    by_hand = torch.cosine_similarity(a, b, 0).item()
    assert rows[0]["masked_cosine"] == pytest.approx(by_hand, abs=1e-6)
    # In the table, a mean over pairs, naive is beside the latest B.
    found = methods.table(compared).query("method == 'naive' and sparsity == 0.5 and k == 0")
    assert found["cosine"].item() == pytest.approx(np.mean([row["cosine"] for row in rows]))


def test_barriers_are_those_that_interpolation_wrote(compared):
    succeed("analyze.interpolation", compared, "--points 3 --images 64 --device cpu")
    barriers = pd.read_csv(compared / "barriers.csv").query("repair")
    lines = barriers.groupby(["method", "match_epoch", "curve"])["test"].mean()
    rows = methods.table(compared).groupby(["method", "sparsity"])["barrier, REPAIR"]
    rows = rows.unique().map(list)
    early, late = (lines["activation", epoch, "aligned"] for epoch in (1, 3))
    assert rows["activation", 0.5] == pytest.approx([early, late])
    assert rows["naive", 0.5] == pytest.approx([lines["masked", 3, "naive"]])
    masked = barriers.query("method == 'masked' and curve == 'aligned' and sparsity == 0.7")
    assert rows["masked", 0.7] == pytest.approx([masked["test"].mean()])


def test_what_is_kept_is_made_again_of_other_files_by_other_code(tmp_path, monkeypatch):
    file, count, digest = tmp_path / "a.pt", itertools.count(1), provenance.code_digest
    file.write_bytes(b"1")

    def number(*settings):
        how = methods.__file__, "line", [file], settings
        return lines.kept(*how, lambda: pd.DataFrame([next(count)])).iloc[0, 0]

    assert [number(3), number(4), number(3)] == [1, 2, 1]
    file.write_bytes(b"2")
    assert number(3) == 3
    for made, script in enumerate((methods.__file__, lines.__file__), 4):
        edited = {script: f"edit {made}"}
        monkeypatch.setattr(provenance, "code_digest", lambda one: edited.get(one) or digest(one))
        assert number(3) == number(3) == made


def test_methods_tells_runs_of_two_settings_apart(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "runs")
    for arm, masks in (("naive", "imp/seed0"), ("permuted", "align/activation/seed0-seed1")):
        files = root / "dense/seed1", root / masks, root / f"sparse/{arm}/faster"
        succeed(*stage4(arm, *files, "--lr 0.1"))
    table = methods.table(root).query("k == 0 and sparsity == 0.5").set_index("variant")
    assert {*table.index} == {
        f"{arm} [lr={lr}]" for arm in ("naive", "permuted") for lr in (0.02, 0.1)
    }
    assert table["accuracy"].notna().all()
