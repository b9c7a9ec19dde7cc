"""Whether two trainings from one start end in one basin."""

import shutil

import pandas as pd
import pytest

from analyze import stability
from analyze.lib.runs import CELL, SEEDS, sparse_runs
from common.checkpoint import load_dense
from tests.conftest import call, refused, sparse, succeed


def test_two_orders_and_the_way_to_the_permuted_network(runs, tmp_path):
    root, cell = tmp_path / "runs", "s0.50_k001"
    shutil.copytree(runs, root)
    for a, b in ((0, 1), (2, 3)):
        out = root / f"sparse/naive/again{b}"
        files = root / f"dense/seed{b}", root / f"imp/seed{a}", out
        aligned = root / f"align/activation/seed{a}-seed{b}"
        other = root / f"dense/seed{b}", aligned, root / f"sparse/permuted/again{b}"
        for arm, inputs in (("naive", files), ("permuted", other)):
            outcome = sparse(arm, *inputs, "--seed", 9, "--sparsity", 0.5, "--rewind", 1)
            assert outcome.code == 0, outcome.err
    # A target whose IMP left the very network that it left of the source.
    shutil.copytree(root / "imp/seed0", root / "imp/seed1")
    result, dense = root / "imp/seed1/result.json", (root / "dense/seed0", root / "dense/seed1")
    result.write_text(result.read_text().replace(*(load_dense(one)["sha256"] for one in dense)))
    command = "analyze.stability", root, "--points", 3, "--images", 64, "--device", "cpu"
    out = succeed(*command)
    table = pd.read_csv(root / "figures/stability_mlpx0.03125_glyphs.csv")
    assert table.groupby(["kind", "variant"]).size().to_dict() == {
        ("orders", "naive"): 1,
        ("orders", "permuted"): 1,
        ("basins", "permuted"): 4,
        ("pruned", "naive"): 2,
        ("pruned", "permuted"): 2,
    }
    assert table.loc[table["kind"] != "pruned", "pairs"].eq(2).all() and "basins" in out
    assert table.loc[table["kind"] == "pruned", "mean"].eq(0).any()  # of a network and itself
    way = stability.pruned(root).set_index(["variant", "sparsity"])["files"]
    files = [root / f"imp/seed{seed}/sparse_0.50.pt" for seed in (0, 1)]
    assert way["naive", 0.5] == files
    files.insert(1, root / "align/activation/seed0-seed1/permutation.pt")
    assert way["permuted", 0.5] == files
    shutil.rmtree(root / "imp")
    assert stability.pruned(root).empty
    again = stability.orders(sparse_runs(root)).query("variant == 'naive'")["files"]
    assert [*again] == [
        [
            root / f"sparse/naive/{folder}/{cell}/final.pt"
            for folder in (f"seed{b - 1}-seed{b}", f"again{b}")
        ]
        for b in (1, 3)
    ]
    assert len(stability.basins(root)) == 2 * 4
    across = stability.basins(root).set_index([*CELL[3:], "source_seed"])["files"]
    pair = "seed2-seed3"
    lth, permuted = (
        f"sparse/{arm}/{cell}/final.pt" for arm in ("lth/seed2-seed2", f"permuted/{pair}")
    )
    way = lth, f"align/activation/{pair}/permutation.pt", permuted
    assert across[0.5, 1, 2] == [root / file for file in way]
    assert (root / "figures/stability_mlpx0.03125_glyphs.png").is_file()


def test_barrier_and_gain_of_the_same_pairs_are_correlated():
    gains = {0: 1.0, 2: 2.0, 4: 3.0, 6: 4.0}
    rows, heights = [], []
    for source, gain in gains.items():
        cell = dict(zip(CELL, ("mlp", 1.0, "glyphs", 0.9, 5))) | dict(
            zip(SEEDS, (source, source + 1))
        )
        about = cell | {"arm": "naive", "mask_dataset": "glyphs"}
        rows.append(about | {"variant": "naive", "test_acc": 50.0})
        rows.append(about | {"variant": "permuted", "arm": "permuted", "test_acc": 50 + gain})
        height = {"test": 9 - gain if gain < 4 else 8.5, "kind": "basins", "variant": "permuted"}
        heights.append(cell | height)
    found = stability.gains(pd.DataFrame(rows), pd.DataFrame(heights))
    # Ranks 1 2 3 4 of the gain beside 3 2 1 4 ... of the barrier: 1 - 6 * 8 / (4 * 15).
    (row,) = found.to_dict("records")
    assert row["correlation"] == pytest.approx(0.2) and row["pairs"] == 4
    few = stability.gains(pd.DataFrame(rows[:6]), pd.DataFrame(heights[:3]))
    assert few.empty
    assert stability.gains(pd.DataFrame(rows[1::2]), pd.DataFrame(heights)).empty  # no naive


def test_nothing_to_compare_is_told(runs, tmp_path):
    shutil.copytree(runs / "sparse/lth", tmp_path / "sparse/lth")
    shutil.copytree(runs / "dense", tmp_path / "dense")
    refused(call("analyze.stability", tmp_path, "--device", "cpu"), "no permuted network")
