"""Whether two trainings from one start end in one basin."""

import shutil

import pandas as pd
import pytest

from analyze import stability
from analyze.lib.runs import CELL, SEEDS, sparse_runs
from tests.conftest import call, refused, sparse, succeed


def test_two_orders_and_the_way_to_the_permuted_network(runs, tmp_path):
    root, pair = shutil.copytree(runs, tmp_path / "runs"), "seed2-seed3"
    target, more = root / "dense/seed3", ("--seed", 9, "--sparsity", 0.5, "--rewind", 1)
    for arm, masks in (("naive", "imp/seed2"), ("permuted", f"align/activation/{pair}")):
        assert sparse(arm, target, root / masks, root / f"sparse/{arm}/again", *more).code == 0
    command = "analyze.stability", root, "--points", 3, "--images", 64, "--device", "cpu"
    assert "basins" in succeed(*command)
    assert (root / "figures/stability_mlpx0.03125_glyphs.png").is_file()
    table = pd.read_csv(root / "figures/stability_mlpx0.03125_glyphs.csv")
    found = table.set_index(["kind", "variant", "sparsity", "rewind"])["pairs"].to_dict()
    basins = {("basins", "permuted", s, k): 2 for s in (0.5, 0.7) for k in (0, 1)}
    assert found == basins | {("orders", arm, 0.5, 1): 1 for arm in ("naive", "permuted")}
    (files,) = stability.orders(sparse_runs(root)).query("variant == 'naive'")["files"]
    finals = (root / f"sparse/naive/{name}/s0.50_k001/final.pt" for name in (pair, "again"))
    assert files == [*finals]
    across = stability.basins(root).set_index([*CELL[3:], "source_seed"])["files"]
    lth, permuted = (
        f"sparse/{arm}/s0.50_k001/final.pt" for arm in ("lth/seed2-seed2", f"permuted/{pair}")
    )
    way = lth, f"align/activation/{pair}/permutation.pt", permuted
    assert across[0.5, 1, 2] == [root / file for file in way]


def test_barrier_and_gain_of_the_same_pairs_are_correlated():
    rows, heights = [], []
    for seed, gain in enumerate((1.0, 2.0, 3.0, 4.0)):
        cell = dict(zip(CELL + SEEDS, ("mlp", 1.0, "glyphs", 0.9, 5, 2 * seed, 2 * seed + 1)))
        for arm, more in (("naive", 0), ("permuted", gain)):
            about = {"variant": arm, "arm": arm, "mask_dataset": "glyphs"}
            rows.append(cell | about | {"test_acc": 50.0 + more})
        height = {"test": 9 - gain if gain < 4 else 8.5, "kind": "basins", "variant": "permuted"}
        heights.append(cell | height)
    found = stability.gains(pd.DataFrame(rows), pd.DataFrame(heights))
    # Ranks 1 2 3 4 of the gain beside 3 2 1 4 ... of the barrier: 1 - 6 * 8 / (4 * 15).
    (row,) = found.to_dict("records")
    assert row["correlation"] == pytest.approx(0.2) and row["pairs"] == 4
    assert stability.gains(pd.DataFrame(rows[:6]), pd.DataFrame(heights[:3])).empty


def test_nothing_to_compare_is_told(runs, tmp_path):
    shutil.copytree(runs / "sparse/lth", tmp_path / "sparse/lth")
    shutil.copytree(runs / "dense", tmp_path / "dense")
    refused(call("analyze.stability", tmp_path, "--device", "cpu"), "no permuted network")
