"""Do two trainings from one start end in one basin (linear mode connectivity, Frankle et al. 2020)?

    python -m analyze.stability runs/quick

The loss barrier, without REPAIR, on the line between two sparse networks, by arm and rewind epoch:
`orders` of two runs that differ in `train_sparse.py --seed` alone, the order of their batches,
`basins` from π(LTH) to the permuted network, and `pruned` from what IMP left of the source, naive
and permuted, to what it left of the target, where both were pruned. With 95% intervals over pairs
of networks, and Spearman's correlation, over pairs within a cell, of the barrier and what permuting
gains. Writes figures/stability_*; every curve is kept beside its target.
"""

import math
from pathlib import Path

import pandas as pd

from analyze.lib import lines, networks, panels, style
from analyze.lib.runs import CELL, NETWORK, SEEDS, by_pair, shared_networks, sparse_runs, with_gains
from analyze.lib.statistics import paired
from common import cli, paths
from common.errors import UserError

ROW = [*CELL, "kind", "variant"]
BARRIER = "barrier in test loss (nats)"
KINDS = {
    "orders": "two orders of batches",
    "basins": "π(LTH) to permuted",
    "pruned": "IMP on A to IMP on B",
}


def orders(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs` with the `files` of two runs of other `seed` alone: the first two of each."""
    ends = runs.sort_values("seed").groupby([*CELL, "variant", *SEEDS])["path"].agg(list)
    ends = ends[ends.map(len) > 1].reset_index(name="files")
    files = [[paths.final_file(path) for path in two[:2]] for two in ends["files"]]
    return ends.assign(files=files, kind="orders")


def basins(root: Path) -> pd.DataFrame:
    """As `orders`: π(LTH) and the permuted network of every cell and pair that has both."""
    found = networks.triples(root)
    return lines.along(found, "lth", "permutation", "permuted").assign(kind="basins")


def pruned(root: Path) -> pd.DataFrame:
    """As `orders`: the networks that IMP left of the source and of the target, at no rewind epoch.

    Of every permutation that a sparse network used, and without one.
    """
    key = [*NETWORK, "tag", "sparsity"]
    imp = networks.imp_networks(root, rounds=False)[[*networks.PRUNED, "file"]]
    imp = imp.drop_duplicates(networks.PRUNED, keep="last")
    found = networks.triples(root).drop_duplicates([*key, *SEEDS, "variant"])
    for seed, end in zip(SEEDS, ("imp_source", "imp_target")):
        found = found.merge(imp.rename(columns={"seed": seed, "file": end}), on=[*key, seed])
    naive = found.drop_duplicates([*key, *SEEDS]).assign(variant="naive")
    naive = lines.along(naive, "imp_source", "imp_target")
    permuted = lines.along(found, "imp_source", "permutation", "imp_target")
    return pd.concat([naive, permuted]).assign(kind="pruned", rewind=math.nan)


def gains(runs: pd.DataFrame, barriers: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of barrier and gain over naive, a row a cell, kind and variant.

    Of each cell's pairs, at least four; `pairs` counts them.
    """
    both = barriers.merge(with_gains(by_pair(runs)), on=[*CELL, *SEEDS, "variant"])
    both, rows = both[both["arm"] == "permuted"].dropna(subset="gain"), []
    for key, group in both.groupby(ROW):
        if len(group) >= 4 and group["test"].nunique() > 1:
            found = group["test"].corr(group["gain"], method="spearman")
            rows.append(dict(zip(ROW, key)) | {"correlation": found, "pairs": len(group)})
    return pd.DataFrame(rows)


def main() -> None:
    args = networks.arguments(__doc__, points=11, images=2500)
    runs = sparse_runs(args.root)
    wanted = orders(runs)
    try:
        wanted = pd.concat([wanted, basins(args.root), pruned(args.root)])
    except UserError:  # two orders are enough
        if wanted.empty:
            raise
    curves = lines.curves(wanted[[*ROW, *SEEDS, "files"]], args)
    heights = lines.barriers(curves, [*ROW, *SEEDS])
    heights = heights[~heights["repair"]]
    rows = [
        dict(zip(ROW, key))
        | paired(group["test"], not shared_networks(group))
        | {"std": group["test"].std()}
        for key, group in heights.groupby(ROW, dropna=False)
    ]
    table = pd.DataFrame(rows).rename(columns={"difference": "mean"})
    column = table["kind"].map(KINDS) + (100 * table["sparsity"]).map(", {:g}%".format)
    table = table.assign(row=BARRIER, column=column, series=table["variant"])
    for (model, width, dataset), group in table.groupby(NETWORK):
        name, title = f"stability_{model}x{width:g}_{dataset}", f"{model} x{width:g} on {dataset}"
        figure = panels.draw(group, "rewind", style.looks(group["variant"].unique()), title)
        style.save(figure, group, args.root / "figures", name)
        print(f"{title}: {BARRIER}, mean and 95% interval over pairs")
        shown = ["kind", "variant", "sparsity", "rewind"]
        shown += ["mean", "difference_low", "difference_high", "pairs"]
        print(group[shown].round(3).to_string(index=False, na_rep="-"))
    related = gains(runs, heights)
    if len(related):
        print("Spearman's correlation of barrier and gain, over the pairs of a cell")
        print(related.drop(columns=NETWORK).round(2).to_string(index=False))


if __name__ == "__main__":
    cli.run(main)
