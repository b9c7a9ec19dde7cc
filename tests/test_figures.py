"""Figures and tables of the paper: definitions by hand, and every command on tiny runs."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch

from analyze import diversity, early_matching, imp_barrier, landscape
from analyze.lib import runs as finished
from tests.conftest import call, sparse, succeed


def test_diversity_by_hand():
    # Two members, two images: they agree on the first and not on the second.
    p, q = torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([[0.8, 0.2], [0.1, 0.9]])
    found = diversity.diversity([p.log(), q.log()], torch.tensor([0, 1]))
    assert found["mean_acc"] == pytest.approx(75) and found["disagreement"] == 0.5
    assert found["ensemble_acc"] == 100  # the mean of the second image is 0.35 to 0.65
    forward = 0.6 * math.log(0.6 / 0.1) + 0.4 * math.log(0.4 / 0.9)
    backward = 0.1 * math.log(0.1 / 0.6) + 0.9 * math.log(0.9 / 0.4)
    assert found["kl"] == pytest.approx(
        (forward + backward) / 2 / 2
    )  # ordered pairs; the first image adds nothing
    halves = [(0.6, 0.4), (0.1, 0.9)]
    js = sum(a * math.log(a / m) for half in halves for a, m in zip(half, (0.35, 0.65))) / 2 / 2
    assert found["js"] == pytest.approx(js) and found["std_acc"] == pytest.approx(100 * 0.125**0.5)
    three = diversity.diversity([p.log(), q.log(), q.log()], torch.tensor([0, 1]))
    assert three["disagreement"] == pytest.approx(1 / 3) and three["js"] == pytest.approx(
        2 * js / 3
    )


def test_the_plane_by_hand():
    corners = [torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 1, 3]), torch.tensor([5.0, 1, 2])]
    directions, points = landscape.plane(corners)
    assert directions.tolist() == [[0, 0, 1], [1, 0, 0]] and points.tolist() == [
        [0, 0],
        [2, 0],
        [1, 4],
    ]
    for corner, (x, y) in zip(corners, points):  # the plane goes through all three
        assert torch.allclose(corners[0] + x * directions[0] + y * directions[1], corner.double())
    xs, ys = landscape.grid(points, 5)
    assert (xs[0], xs[-1], ys[0], ys[-1]) == (-0.5, 2.5, -1, 5) and len(xs) == len(ys) == 5
    with pytest.raises(ValueError):
        landscape.plane([corners[0], corners[1], 2 * corners[1] - corners[0]])


def test_barriers_in_loss_and_error():
    curve = pd.DataFrame(
        {
            "alpha": [0, 0.5, 1],
            "repair": False,
            "test_loss": [1.0, 4.0, 2.0],
            "test_acc": [90.0, 50.0, 80.0],
        }
    )
    assert imp_barrier.barriers(curve) == [
        {"repair": False, "loss_barrier": 2.5, "error_barrier": 35.0}
    ]


@pytest.fixture(scope="module")
def matched_early(runs, tmp_path_factory):
    """The pipeline with masks that were matched to an early target as well."""
    root = tmp_path_factory.mktemp("early") / "runs"
    shutil.copytree(runs, root)
    for a, b in ((0, 1), (2, 3)):
        out = root / f"align/early/seed{a}-seed{b}"
        source, target = root / f"dense/seed{a}", root / f"dense/seed{b}"
        masks = root / f"imp/seed{a}"
        files = ("--source", source, "--target", target, "--masks", masks, "--out", out)
        succeed("align_mask", *files, "--target-epoch", 1, "--device", "cpu")
        sparse("permuted", target, out, root / f"sparse/permuted/early/seed{a}-seed{b}")
    return root


def test_early_matching_by_epoch(matched_early, runs):
    out = succeed("analyze.early_matching", matched_early)
    table = pd.read_csv(matched_early / "early_matching.csv")
    permuted = table[table["arm"] == "permuted"]
    assert set(permuted["match_epoch"]) == {1, 3} and (permuted["count"] == 2).all() and "±" in out
    naive = table.loc[table["arm"] == "naive", "match_epoch"]
    assert len(naive) and naive.isna().all()
    all_runs = finished.sparse_runs(matched_early)
    early = "arm == 'permuted' and match_epoch == 1 and sparsity == 0.7 and rewind == 1"
    cell, row = all_runs.query(early), permuted.query(early).iloc[0]
    assert row["mean"] == pytest.approx(cell["test_acc"].mean()) and len(cell) == 2
    assert (matched_early / "figures/early_matching_mlp_glyphs_k001.png").is_file()
    outcome = call("analyze.early_matching", runs)
    assert outcome.code == 2 and "--target-epoch" in outcome.err
    assert early_matching.table(early_matching.plain(all_runs))["count"].max() == 2


def test_diversity_reads_every_kind_of_network_once(matched_early):
    flags = ("--device", "cpu")
    first = succeed("analyze.diversity", matched_early, *flags)
    table = pd.read_csv(matched_early / "diversity.csv")
    assert set(table["variant"]) == {"dense", "IMP", "lth", "naive", "permuted", "permuted @1"}
    assert (
        table["members"] == table["variant"].map(lambda name: 4 if name == "dense" else 2)
    ).all()
    caches = list(matched_early.rglob("logits_*.pt"))
    stamps = {path: path.stat().st_mtime_ns for path in caches}
    assert succeed("analyze.diversity", matched_early, *flags) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in matched_early.rglob("logits_*.pt")}
    # A member's accuracy from its logits is that of its run.
    runs = finished.sparse_runs(matched_early).query(
        "arm == 'naive' and sparsity == 0.7 and rewind == 0"
    )
    row = table.query("variant == 'naive' and sparsity == 0.7 and rewind == 0").iloc[0]
    assert row["mean_acc"] == pytest.approx(runs["test_acc"].mean(), abs=0.1)


def test_imp_barrier_reads_every_round(matched_early):
    succeed("analyze.imp_barrier", matched_early, "--points", 3, "--images", 64, "--device", "cpu")
    table = pd.read_csv(matched_early / "figures/imp_barrier_mlp_glyphs.csv")
    rounds = len(list((matched_early / "imp/seed0").glob("round_*.pt")))
    assert (
        len(table) == 2 * rounds
        and (table["loss_barrier_count"] == 2).all()
        and table["loss_barrier_mean"].min() >= 0
    )
    assert table["sparsity"].min() == pytest.approx(0.2, abs=1e-3)


def test_landscape_passes_through_its_three_networks(matched_early):
    succeed("analyze.landscape", matched_early, "--grid", 3, "--images", 100, "--device", "cpu")
    name = "landscape_mlpx0.03125_glyphs_activation_s0.50_k000_0-1_matched3"
    assert (matched_early / f"figures/{name}.pdf").is_file()
    table = pd.read_csv(matched_early / f"figures/{name}.csv")
    assert len(table) == 9 + 3 and table["network"].dropna().tolist() == [
        "lth",
        "permuted",
        "dense",
    ]
    caches = {
        path: path.stat().st_mtime_ns for path in matched_early.rglob("plane_*_3_100_fp32.csv")
    }
    assert len(caches) == len(list(matched_early.glob("figures/landscape_*.csv")))
    succeed("analyze.landscape", matched_early, "--grid", 3, "--images", 100, "--device", "cpu")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in caches.items())
    assert table.equals(pd.read_csv(matched_early / f"figures/{name}.csv"))
    triple = landscape.triples(matched_early)[0]
    assert (triple["source_seed"], triple["target_seed"]) == (0, 1) and "seed0-seed0" in str(
        triple["lth"]
    )


@pytest.fixture(scope="module")
def littered(runs, tmp_path_factory):
    """The pipeline beside folders that are foreign, unfinished or cut off."""
    root = tmp_path_factory.mktemp("littered") / "runs"
    shutil.copytree(runs, root)
    metrics = {"test_acc": 1, "test_loss": 1, "seconds": 1, "sparsity_total": 1}
    contents = (
        {},
        {"stage": "train_sparse"},
        {"stage": "train_sparse", "arguments": {"arm": "lth"}} | metrics,
        {"stage": "train_dense", "arguments": {}},
        {"stage": "align_mask", "arguments": {"source_seed": 7}},
        {"stage": "prune_imp"},
    )
    for number, text in enumerate(("{", "[]", *map(json.dumps, contents))):
        (root / f"foreign{number}").mkdir()
        (root / f"foreign{number}/result.json").write_text(text)
    shutil.copytree(root / "sparse/naive/seed0-seed1/s0.70_k001", root / "unfinished")
    (root / "unfinished/result.json").unlink()
    cut = ("sparse_0.70.pt", "round_01.pt", "mask_0.70.pt")
    paths = [f"imp/seed0/{name}" for name in cut]
    paths += ["sparse/lth/seed0-seed0/s0.70_k001/final.pt"]
    for path in [*paths, "align/activation/seed0-seed1/permutation.pt"]:
        (root / path).write_bytes((root / path).read_bytes()[:500])
    (root / "sparse/lth/seed2-seed2/s0.50_k000/final.pt").unlink()  # as of a run that diverged
    return root


def test_results_skip_what_is_no_run(littered, runs):
    outcome = call("analyze.results", littered)
    # [] and {} say nothing of a stage.
    assert outcome.code == 0 and all(f"foreign{number}" in outcome.err for number in range(5))
    assert outcome.err.count("skipped") == 5 and outcome.err.count("\n") == 5
    ours, before = finished.sparse_runs(littered), finished.sparse_runs(runs)
    assert ours.drop(columns="path").equals(before.drop(columns="path"))
    assert len(finished.dense_runs(littered)) == len(finished.dense_runs(runs))


@pytest.mark.parametrize(
    "module, flags, cut",
    [
        ("diversity", (), ("s0.70_k001/final.pt", "s0.50_k000/final.pt", "sparse_0.70.pt")),
        ("imp_barrier", ("--points", 3, "--images", 64), ("round_01.pt", "foreign7")),
        ("interpolation", ("--points", 3, "--images", 64), ("permutation.pt",)),
        ("landscape", ("--grid", 3, "--images", 64), ("permutation.pt", "s0.50_k000/final.pt")),
        ("masks", (), ("mask_0.70.pt",)),
        ("methods", (), ("permutation.pt",)),
    ],
)
def test_what_cannot_be_read_is_skipped_with_one_line(littered, module, flags, cut):
    device = () if module in ("masks", "methods") else ("--device", "cpu")
    outcome = call(f"analyze.{module}", littered, *flags, *device)
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.startswith("skipped")]
    for name in cut:
        assert sum(name in line for line in lines) >= 1, (name, lines)
    if module == "diversity":  # a set of two that lost one is no set
        table = pd.read_csv(littered / "diversity.csv")
        assert len(table.query("variant == 'lth' and sparsity == 0.7 and rewind == 1")) == 0
        assert len(table.query("variant == 'naive' and sparsity == 0.7 and rewind == 1")) == 1
    if module == "interpolation":  # the other pair alone
        table = pd.read_csv(littered / "figures/interpolation_activation_mlp_glyphs_k003.csv")
        assert set(table.loc[table["curve"] == "aligned", "source_seed"]) == {2}
