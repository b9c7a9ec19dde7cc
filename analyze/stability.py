"""Do two trainings from one start end in one basin (linear mode connectivity, Frankle et al. 2020)?

    python -m analyze.stability runs/quick

The loss barrier along the line between two sparse networks, for every arm and rewind epoch:
`orders` of two runs that differ in `train_sparse.py --seed` alone, the order of their batches, and
`basins` from π(LTH) to the permuted network. With 95% intervals over pairs of networks, and
Spearman's correlation, over pairs within a cell, of the barrier and what permuting gains. Writes
figures/stability_*; every curve is kept beside its target.
"""

import itertools
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from analyze.lib import lines, networks, style
from analyze.lib.runs import CELL, NETWORK, SEEDS, by_pair, readable, sparse_runs
from analyze.lib.statistics import paired
from common import cli, paths
from common.errors import UserError

KEY = [*CELL, "kind", "variant"]
KINDS = {"orders": "two orders of batches", "basins": "π(LTH) to permuted"}


def orders(runs: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs` with the `files` of two runs of other `seed` alone: the first two of each."""
    ends = runs.sort_values("seed").groupby([*CELL, "variant", *SEEDS])["path"].agg(list)
    ends = ends[ends.map(len) > 1].reset_index(name="files")
    files = [[paths.final_file(path) for path in two[:2]] for two in ends["files"]]
    return ends.assign(files=files, kind="orders")


def basins(root: Path) -> pd.DataFrame:
    """As `orders`: π(LTH) and the permuted network of every cell and pair that has both."""
    found = networks.triples(root)
    keys = ["lth", "permutation", "permuted"]
    files = [list(row) for row in found[keys].to_numpy()]
    return found.assign(files=files, kind="basins")


def gains(runs: pd.DataFrame, barriers: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of barrier and gain over naive, a row a cell, kind and variant.

    Of each cell's pairs, at least four; `pairs` counts them.
    """
    accuracy = by_pair(runs)
    gain = accuracy.sub(accuracy["naive"], axis=0).melt(ignore_index=False, value_name="gain")
    both = barriers.merge(gain.reset_index(), on=[*CELL, *SEEDS, "variant"]).dropna(subset="gain")
    rows = []
    for key, group in both[both["variant"].str.startswith("permuted")].groupby(KEY):
        if len(group) >= 4:
            found = group["test"].corr(group["gain"], method="spearman")
            rows.append(dict(zip(KEY, key)) | {"correlation": found, "pairs": len(group)})
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, title: str) -> style.Figure:
    """Barrier against rewind epoch, a panel a kind and sparsity, with 95% intervals."""
    panels = list(table.groupby(["sparsity", "kind"], sort=False))
    size = (0.8 + 2.9 * len(panels), 3.4)
    figure, axes = style.plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
    looks = style.looks(table["variant"].unique())
    for axis, ((sparsity, kind), here) in zip(axes[0], panels):
        for name, look in looks.items():
            curve = here[here["variant"] == name].sort_values("rewind")
            mean = curve["difference"]
            spread = [mean - curve["difference_low"], curve["difference_high"] - mean]
            if len(curve):
                axis.errorbar(curve["rewind"], mean, spread, capsize=2, **look)
        axis.set_title(f"{KINDS[kind]}, {100 * sparsity:g}%", fontsize=9)
        axis.set_xlabel("rewind epoch k")
    axes[0, 0].set_ylabel("barrier in test loss (nats)")
    handles = dict(itertools.chain(*(zip(*a.get_legend_handles_labels()[::-1]) for a in axes[0])))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    points = {"type": networks.SEVERAL, "default": 11, "help": "of the line"}
    about = {"help": "for REPAIR", "default": 2500}
    args = networks.arguments(__doc__, points=points, images=networks.IMAGES | about)
    runs = sparse_runs(args.root)
    wanted = orders(runs)
    try:
        wanted = pd.concat([wanted, basins(args.root)])
    except UserError:  # two orders are enough
        if wanted.empty:
            raise
    curves = []
    for run in tqdm(wanted.to_dict("records"), "lines", unit="line", disable=None):
        curve = readable(lines.curve, run["files"], args.points, args.images, args.read)
        if curve is not None:
            curves.append(curve.assign(**{key: run[key] for key in (*KEY, *SEEDS)}))
    if not curves:
        raise UserError(f"no two networks below {args.root} could be compared (see above)")
    heights = lines.barriers(pd.concat(curves), [*KEY, *SEEDS])
    heights = heights[~heights["repair"]]
    rows = [dict(zip(KEY, key)) | paired(group["test"]) for key, group in heights.groupby(KEY)]
    table = pd.DataFrame(rows)
    related = gains(runs, heights)
    for (model, width, dataset), group in table.groupby(NETWORK):
        name, title = f"stability_{model}x{width:g}_{dataset}", f"{model} x{width:g} on {dataset}"
        style.save(plot(group, title), group, args.root / "figures", name)
        print(f"{title}: barriers in test loss (nats), mean and 95% interval over pairs")
        shown = ["difference", "difference_low", "difference_high", "pairs"]
        print(
            group[["kind", "variant", "sparsity", "rewind", *shown]].round(3).to_string(index=False)
        )
    if len(related):
        print("Spearman's correlation of barrier and gain, over the pairs of a cell")
        print(related.drop(columns=NETWORK).round(2).to_string(index=False))


if __name__ == "__main__":
    cli.run(main)
