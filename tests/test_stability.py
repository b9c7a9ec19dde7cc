"""analyze.stability: whether two trainings from one start end in one basin."""

import shutil

import pandas as pd
import pytest

from analyze import stability
from analyze.lib.runs import CELL, sparse_runs
from common.checkpoint import load_dense
from tests.conftest import call, edit, refused, stage4, succeed


def test_lines_between_orders_basins_and_pruned_networks(runs, tmp_path):
    root, cell = shutil.copytree(runs, tmp_path / "runs"), "s0.50_k001"
    source, target = (load_dense(root / f"dense/seed{seed}") for seed in (0, 1))
    for arm, masks in (("naive", "imp/seed0"), ("permuted", "align/activation/seed0-seed1")):
        files = root / "dense/seed1", root / masks, root / f"sparse/{arm}/again"
        succeed(*stage4(arm, *files, "--seed 9 --sparsity 0.5 --rewind 1"))
    # A target that IMP pruned to the same network as the source.
    shutil.copytree(root / "imp/seed0", root / "imp/seed1")
    result = root / "imp/seed1/result.json"
    result.write_text(result.read_text().replace(source["sha256"], target["sha256"]))
    succeed("analyze.stability", root, "--points 3 --images 64 --device cpu")
    table = pd.read_csv(root / "figures/stability_mlpx0.03125_glyphs.csv")
    table = table.groupby(["kind", "variant"])
    assert table["pairs"].agg(list).to_dict() == {
        ("orders", "naive"): [1],
        ("orders", "permuted"): [1],
        ("basins", "permuted"): [2, 2, 2, 2],
        ("pruned", "naive"): [1, 1],
        ("pruned", "permuted"): [1, 1],
    }
    assert table["mean"].agg(list)["pruned", "naive"] == pytest.approx([0, 0], abs=1e-9)

    def files(*names):
        return [root / name for name in names]

    (orders,) = stability.orders(sparse_runs(root)).query("variant == 'naive'")["files"]
    assert orders == files(
        f"sparse/naive/seed0-seed1/{cell}/final.pt", f"sparse/naive/again/{cell}/final.pt"
    )
    basins = stability.basins(root).set_index([*CELL[3:], "source_seed"])["files"]
    assert len(basins) == 2 * 4 and basins[0.5, 1, 2] == files(
        f"sparse/lth/seed2-seed2/{cell}/final.pt",
        "align/activation/seed2-seed3/permutation.pt",
        f"sparse/permuted/seed2-seed3/{cell}/final.pt",
    )
    pruned = stability.pruned(root).set_index(["variant", "sparsity"])["files"]
    expected = files("imp/seed0/sparse_0.50.pt", "imp/seed1/sparse_0.50.pt")
    assert pruned["naive", 0.5] == expected
    expected.insert(1, root / "align/activation/seed0-seed1/permutation.pt")
    assert pruned["permuted", 0.5] == expected
    # Settings of sparse training, which are added to the tag of a run, are not those of its mask.
    edit(root, "again", lr=0.5)
    assert {*stability.pruned(root)["variant"]} == {"naive", "permuted [lr=0.02]"}
    shutil.rmtree(root / "imp")
    assert stability.pruned(root).empty


def test_correlation_of_barrier_and_gain_by_hand():
    pairs = pd.DataFrame({"source_seed": [0, 2, 4, 6], "target_seed": [1, 3, 5, 7]})
    pairs[CELL] = "mlp", 1.0, "glyphs", 0.9, 5
    naive = pairs.assign(arm="naive", variant="naive", test_acc=50.0, tag="")
    naive = naive.assign(mask_dataset="glyphs", signs=False, fan_in=False)
    permuted = naive.assign(arm="permuted", variant="permuted", test_acc=[51.0, 52, 53, 54])
    barriers = pairs.assign(kind="basins", variant="permuted", test=[8, 7, 6, 8.5])
    runs = pd.concat([naive, permuted])
    (row,) = stability.correlations(runs, barriers).to_dict("records")
    # Ranks 1 2 3 4 of the gain and 3 2 1 4 of the barrier: 1 - 6 * 8 / (4 * 15).
    assert row["correlation"] == pytest.approx(0.2) and row["pairs"] == 4
    assert stability.correlations(runs, barriers[:3]).empty
    assert stability.correlations(permuted, barriers).empty


def test_nothing_to_compare_is_refused(runs, tmp_path):
    shutil.copytree(runs / "sparse/lth", tmp_path / "sparse/lth")
    shutil.copytree(runs / "dense", tmp_path / "dense")
    refused(call("analyze.stability", tmp_path, "--device", "cpu"), "no permuted network")
