"""Analyses that evaluate networks: definitions by hand, and each command on tiny runs."""

import shutil

import pandas as pd
import pytest
import torch
from scipy.stats import entropy

from analyze import diversity, early_matching, landscape
from analyze.lib import lines, networks
from analyze.lib import runs as finished
from common import checkpoint
from common.align.axes import find_axes
from common.align.permutation import permute, random_permutation
from common.data import load_cached, resident
from common.models import build_model
from tests.conftest import (
    align_and_train,
    call,
    edit,
    refused,
    stage1,
    stage2,
    stage3,
    stage4,
    state,
    succeed,
    weights,
)

CPU = "--device cpu"


def test_diversity_by_hand():
    # Two members and two images: they agree on the first, which adds nothing, not on the second.
    p, q = torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([[0.8, 0.2], [0.1, 0.9]])
    row = diversity.diversity([p.log(), q.log()], torch.tensor([0, 1]))
    first, second, mean = (0.6, 0.4), (0.1, 0.9), (0.35, 0.65)  # the mean is right
    expected = {"members": 2, "mean_acc": 75, "std_acc": 100 * 0.125**0.5, "ensemble_acc": 100}
    expected["disagreement"] = 0.5
    expected["kl"] = (entropy(first, second) + entropy(second, first)) / 2 / 2
    expected["js"] = (entropy(first, mean) + entropy(second, mean)) / 2 / 2
    assert row == pytest.approx(expected)
    three = diversity.diversity([p.log(), q.log(), q.log()], torch.tensor([0, 1]))
    for name in ("disagreement", "js"):  # two of three pairs differ
        assert three[name] == pytest.approx(row[name] * 2 / 3)


def test_the_plane_by_hand():
    corners = [torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 1, 3]), torch.tensor([5.0, 1, 0])]
    directions, points = landscape.plane(corners)
    assert directions.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert points.tolist() == [[0, 0], [2, 0], [-1, 4]]
    xs, ys = landscape.grid(points, 4)
    assert xs.tolist() == [-1.75, -0.25, 1.25, 2.75] and ys.tolist() == [-1, 1, 3, 5]
    with pytest.raises(ValueError):
        landscape.plane([corners[0], corners[1], 2 * corners[1] - corners[0]])


def test_barriers_by_hand():
    """The line has 1.5 nats and 15% in the middle; a curve below it has no barrier."""
    curve = {"alpha": [0, 0.5, 1], "test_loss": [1.0, 4.0, 2.0], "train_loss": [1.0, 1.0, 3.0]}
    curve = pd.DataFrame(curve | {"test_acc": [90.0, 50.0, 80.0], "repair": True, "seed": 0})
    table = lines.barriers(pd.concat([curve, curve.assign(seed=1, repair=False)]), ["seed"])
    values = table[["seed", "repair", "test", "train", "error"]].to_numpy().tolist()
    assert values == [[0, True, 2.5, 0, 35], [1, False, 2.5, 0, 35]]
    curve.loc[1, "test_loss"] = float("nan")  # a diverged network
    row = lines.barriers(curve)[["test", "train"]].iloc[0]
    assert row.isna().tolist() == [True, False]


@pytest.fixture(scope="module")
def matched_early(runs, tmp_path_factory):
    """The pipeline with masks that were also matched to an early target."""
    root = shutil.copytree(runs, tmp_path_factory.mktemp("early") / "runs")
    for a, b in ((0, 1), (2, 3)):
        align_and_train(root, a, b, "early", "--target-epoch 1")
    return root


def test_early_matching_by_epoch(matched_early, runs):
    assert "±" in succeed("analyze.early_matching", matched_early)
    table = pd.read_csv(matched_early / "early_matching.csv").set_index(["arm", "match_epoch"])
    assert {*table.loc["permuted"].index} == {1, 3} and table["count"].max() == 2
    assert table.loc["naive"].index.isna().all()
    cell = "sparsity == 0.7 and rewind == 1"
    early = finished.sparse_runs(matched_early).query(f"{cell} and match_epoch == 1")
    row = table.query(cell).loc[("permuted", 1)]
    assert row["mean"] == pytest.approx(early["test_acc"].mean()) and len(early) == 2
    refused(call("analyze.early_matching", runs), "--target-epoch")


def test_early_matching_keeps_settings_of_the_alignment_apart(matched_early):
    runs = finished.sparse_runs(matched_early)
    other = runs[runs["arm"] == "permuted"].assign(method="activation restarts=9")
    table = early_matching.summarise(early_matching.select_runs(pd.concat([runs, other])))
    assert {*table["variant"]} == {"LTH", "naive", "permuted", "permuted (activation restarts=9)"}
    assert table["count"].max() == 2


def test_diversity_reads_every_kind_of_network(matched_early):
    succeed("analyze.diversity", matched_early, CPU)
    table = pd.read_csv(matched_early / "diversity.csv")
    assert set(table["variant"]) == {"dense", "IMP", "LTH", "naive", "permuted", "permuted @1"}
    assert (table["members"] == table["variant"].map({"dense": 4}).fillna(2)).all()
    assert (table["sources"] == table["variant"].map({"dense": 0, "IMP": 0}).fillna(2)).all()
    # The accuracy of a member by its logits is that of its run.
    cell = "variant == 'naive' and sparsity == 0.7 and rewind == 0"
    runs = finished.sparse_runs(matched_early).query(cell.replace("variant", "arm"))
    assert table.query(cell)["mean_acc"].item() == pytest.approx(runs["test_acc"].mean(), abs=1e-9)


def test_imp_barrier_names_its_networks(runs, tmp_path):
    for folder in ("dense", "imp"):
        shutil.copytree(runs / folder, tmp_path / folder)
    command = "analyze.imp_barrier", tmp_path, "--points 3 --images 64 --device cpu"
    assert "after each of 5 rounds" in succeed(*command)
    table = pd.read_csv(tmp_path / "figures/imp_barrier_mlp_glyphs.csv")
    sparsities = [1 - 0.8**number for number in range(1, 6)]
    assert table["sparsity"].tolist() == pytest.approx(2 * sparsities, abs=1e-3)
    assert (table["loss_barrier_count"] == 2).all()
    duplicate = shutil.copytree(tmp_path / "imp/seed0", tmp_path / "copy")
    refused(call(*command), "copy/round_01.pt", "have the same settings and seeds")
    shutil.rmtree(duplicate)
    edit(tmp_path, "imp", keep_rounds=False)  # only the last round is kept
    assert "at the requested sparsities, not after every round" in succeed(*command)
    table = pd.read_csv(tmp_path / "figures/imp_barrier_mlp_glyphs.csv")
    assert table["sparsity"].round(1).tolist() == [0.5, 0.7, 0.5, 0.7]


def test_landscape_passes_through_its_three_networks(matched_early):
    command = "analyze.landscape", matched_early, "--grid 3 --images 100 --device cpu"
    out = succeed(*command)  # the first pair of a middle cell, matched to the final B
    name = "landscape_mlpx0.03125_glyphs_activation_s0.50_k001_0-1_matched3.csv"
    table = pd.read_csv(matched_early / "figures" / name)
    assert len(table) == 9 + 3 and table["network"].dropna().tolist() == [*landscape.NETWORKS]
    barrier = table.set_index("network")["loss_barrier"].dropna()
    assert barrier.index == ["permuted"] and f"loss barrier {barrier.item():.3f} nats" in out
    assert out.count("loss barrier") == len([*matched_early.rglob("plane_*")]) == 1
    assert "sparsity 0.70, k = 0" in succeed(*command, "--sparsity 0.7 --rewind 0")
    refused(call(*command, "--rewind 5"), "no permuted network")


def test_a_permuted_network_is_joined_with_the_permutation_of_its_mask(matched_early):
    files = networks.triples(matched_early)[["permutation", "permuted"]].to_numpy()
    is_early = [["/early/" in str(file) for file in row] for row in files]
    # Two pairs in four cells, late matches first.
    assert is_early == 8 * [[False, False]] + 8 * [[True, True]]


def test_curves_and_planes_do_not_depend_on_the_batch_size_of_the_device(
    matched_early, monkeypatch
):
    monkeypatch.setitem(resident.EVAL_BATCH, "cpu", -1)  # fails if it is used
    updates = []
    monkeypatch.setattr(landscape, "update_bn", lambda batches, _: updates.append([*batches]))
    triple = networks.triples(matched_early).iloc[0]
    table = landscape.measure_plane(triple, 3, 90, load_cached)
    files = [triple[name] for name in ("lth", "permutation", "permuted")]
    curve = lines.measure_curve(files, 11, 90, load_cached)
    barrier = lines.barriers(curve).set_index("repair")["test"]
    assert table["loss_barrier"].dropna().tolist() == [pytest.approx(barrier[True])]
    assert len(updates) == 3 * 3 and updates[0]  # the statistics at every point
    # The first direction is from π(LTH) to permuted.
    permutation = state(triple["permutation"])["permutation"]
    dims = find_axes(build_model(**state(triple["lth"])["model"]), (3, 8, 8)).dims
    ends = permute(weights(triple["lth"]), dims, permutation), weights(triple["permuted"])
    distance = torch.cat([(a - b).flatten() for a, b in zip(*map(dict.values, ends))]).norm()
    x = table.dropna(subset="network").set_index("network")["x"]
    assert x["permuted"] - x["lth"] == pytest.approx(float(distance), rel=1e-5)


def test_the_source_is_permuted_on_its_line(runs, tmp_path):
    """The line from π(A) to itself has one loss; that from A to π(A) has not."""
    source = state(runs / "dense/seed0/epoch_0003.pt")
    axes = find_axes(build_model(**source["model"]), (3, 8, 8))
    permutation = random_permutation(axes, 0)
    permuted = permute(source["state_dict"], axes.dims, permutation)
    for name, content in (
        ("source", source),
        ("permutation", {"permutation": permutation}),
        ("target", source | {"state_dict": permuted}),
    ):
        checkpoint.save(content, tmp_path / f"{name}.pt")
    files = [tmp_path / f"{name}.pt" for name in ("source", "permutation", "target")]
    for line, constant in ((files, True), (files[::2], False)):
        loss = lines.measure_curve(line, 3, 64, load_cached).query("not repair")["test_loss"]
        assert (loss.max() - loss.min() < 1e-4) == constant


def test_interpolation_of_two_widths_needs_no_sparse_run(runs, tmp_path):
    for folder in ("dense", "align"):
        shutil.copytree(runs / folder, tmp_path / "w1" / folder)
    wide, masks = tmp_path / "w2", tmp_path / "masks"
    succeed(*stage1(wide / "dense", "--seed 0 1 --width 0.0625"))
    source, target = wide / "dense/seed0", wide / "dense/seed1"
    succeed(*stage2(source, masks))
    succeed(*stage3(source, target, masks, wide / "align"))
    succeed("analyze.interpolation", tmp_path, "--points 3 --images 64", CPU)
    path = tmp_path / "figures/interpolation_activation_mlp_glyphs_k003.csv"
    counts = pd.read_csv(path).groupby(["width", "curve", "repair", "alpha"])["source_seed"]
    assert counts.nunique().tolist() == 12 * [2] + 12 * [1]


def test_an_empty_folder_has_no_ensembles(tmp_path):
    refused(call("analyze.diversity", tmp_path, CPU), "no finished network")


def test_a_pair_has_one_triple_for_all_seeds_of_sparse_training(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "runs")
    files = root / "dense/seed1", root / "align/activation/seed0-seed1", root / "sparse/again"
    succeed(*stage4("permuted", *files, "--seed 9 --sparsity 0.5 --rewind 1"))
    assert len(networks.triples(root)) == 2 * 4 and "again" not in str(networks.triples(root))
