"""Whether two trainings from one start end in one basin (Frankle et al. 2020).

    python -m analyze.stability runs/quick

The loss barrier, without REPAIR, on the line between two sparse networks, by arm and rewind epoch.
`orders`: two runs that differ only in `train_sparse.py --seed`, the order of their batches.
`basins`: from π(LTH) to the permuted network. `pruned`: from the network that IMP made of the
source, as it is (naive) or permuted, to the one that it made of the target, if both were pruned.
With 95% intervals over pairs of networks, and Spearman's correlation, over the pairs of a
cell, of the barrier and the gain of permuting. Writes figures/stability_*; every curve is cached
beside its target.
"""

import math
from pathlib import Path

import pandas as pd

from analyze.lib import lines, networks, panels, style
from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    accuracy_by_pair,
    shared_networks,
    sparse_runs,
    warn_skipped,
    with_gains,
    with_tag,
)
from analyze.lib.statistics import paired_test
from common import cli, paths
from common.errors import UserError

KEYS = [*CELL, "kind", "variant"]
BARRIER = "barrier in test loss (nats)"
KINDS = {
    "orders": "two orders of batches",
    "basins": "π(LTH) to permuted",
    "pruned": "IMP on A to IMP on B",
}


def orders(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the `files` of the first two runs that differ only in `seed`, a row per such group."""
    groups = runs.sort_values("seed").groupby([*CELL, "variant", *SEEDS])["path"].agg(list)
    groups = groups[groups.map(len) > 1].reset_index(name="files")
    files = [[paths.final_file(path) for path in folders[:2]] for folders in groups["files"]]
    return groups.assign(files=files, kind="orders")


def basins(root: Path) -> pd.DataFrame:
    """Return the `files` from π(LTH) to the permuted network, a row per cell and pair."""
    triples = networks.triples(root)
    return lines.with_files(triples, "lth", "permutation", "permuted").assign(kind="basins")


def pruned(root: Path) -> pd.DataFrame:
    """Return the `files` from the source to the target as pruned by IMP, without a rewind epoch.

    A row per permutation that a sparse network used, and a naive row without permutation.
    """
    keys = [*NETWORK, "mask_tag", "sparsity"]
    imp = networks.imp_networks(root, rounds=False).rename(columns={"tag": "mask_tag"})
    imp = imp.drop_duplicates([*keys, "seed"], keep="last")[[*keys, "seed", "file"]]
    table = networks.triples(root).drop_duplicates([*keys, *SEEDS, "variant"])
    for seed, end in zip(SEEDS, ("imp_source", "imp_target")):
        table = table.merge(imp.rename(columns={"seed": seed, "file": end}), on=[*keys, seed])
    naive = table.drop_duplicates([*keys, *SEEDS])
    naive = naive.assign(variant=with_tag("naive", naive["mask_tag"]))
    naive = lines.with_files(naive, "imp_source", "imp_target")
    permuted = lines.with_files(table, "imp_source", "permutation", "imp_target")
    return pd.concat([naive, permuted]).assign(kind="pruned", rewind=math.nan)


def correlations(runs: pd.DataFrame, barriers: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of barrier and gain over naive, a row per value of KEYS.

    It is over the pairs of a cell, at least four; `pairs` counts them.
    """
    table = barriers.merge(with_gains(accuracy_by_pair(runs)), on=[*CELL, *SEEDS, "variant"])
    table, rows = table[table["arm"] == "permuted"].dropna(subset="gain"), []
    for key, group in table.groupby(KEYS):
        if len(group) >= 4 and group["test"].nunique() > 1:
            correlation = group["test"].corr(group["gain"], method="spearman")
            rows.append(dict(zip(KEYS, key)) | {"correlation": correlation, "pairs": len(group)})
    return pd.DataFrame(rows)


def main() -> None:
    args = networks.parse_args(__doc__, points=11, images=2500)
    runs = sparse_runs(args.root)
    rows = orders(runs)
    try:
        rows = pd.concat([rows, basins(args.root), pruned(args.root)])
    except UserError as error:  # orders need no permuted network
        if rows.empty:
            raise
        warn_skipped(error)
    curves = lines.measure_curves(rows[[*KEYS, *SEEDS, "files"]], args)
    barriers = lines.barriers(curves, [*KEYS, *SEEDS])
    barriers = barriers[~barriers["repair"]]
    rows = [
        dict(zip(KEYS, key)) | paired_test(group["test"], not shared_networks(group))
        for key, group in barriers.groupby(KEYS, dropna=False)
    ]
    names = {"difference": "mean", "difference_low": "low", "difference_high": "high"}
    table = pd.DataFrame(rows).rename(columns=names)
    column = table["kind"].map(KINDS) + (100 * table["sparsity"]).map(", {:g}%".format)
    table = table.assign(row=BARRIER, column=column, series=table["variant"])
    for (model, width, dataset), group in table.groupby(NETWORK):
        name, title = f"stability_{model}x{width:g}_{dataset}", f"{model} x{width:g} on {dataset}"
        styles = style.variant_styles(group["variant"].unique())
        figure = panels.draw(group, "rewind", styles, f"{title}, 95% intervals")
        style.save_figure(figure, group, args.root / "figures", name)
        print(f"{title}: {BARRIER}, mean and 95% interval over pairs")
        columns = ["kind", "variant", "sparsity", "rewind", "mean", "low", "high", "pairs"]
        print(group[columns].round(3).to_string(index=False, na_rep="-"))
    correlation = correlations(runs, barriers)
    if len(correlation):
        print("Spearman's correlation of barrier and gain, over the pairs of a cell")
        print(correlation.drop(columns=NETWORK).round(2).to_string(index=False))


if __name__ == "__main__":
    cli.run(main)
