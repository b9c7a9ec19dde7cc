"""Accuracy of the arms against the rewind epoch and against sparsity (Figures 5 to 11).

    python -m analyze.accuracy runs/quick

Writes figures/accuracy_rewind_* (a panel per width and sparsity) and figures/accuracy_sparsity_* (a
panel per width and rewind epoch): means over seeds with a band of one sample standard deviation,
dense networks as dashed lines. ImageNet's top-5 accuracy has figures of its own, figures/top5_*.
--paper draws the paper's curves beside ours, in the cells that both have.
"""

import pandas as pd

from analyze.lib import panels, paper_numbers
from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    caveats,
    dense_runs,
    has_own_mask,
    root_parser,
    sparse_runs,
)
from common import cli


def main() -> None:
    parser = root_parser(__doc__)
    parser.add_argument("--paper", action="store_true", help="draw the paper's curves beside ours")
    args = parser.parse_args()
    runs, dense = sparse_runs(args.root), dense_runs(args.root)
    for (model, dataset), group in runs.groupby(["model", "dataset"]):
        pairs = len(group.loc[~has_own_mask(group), SEEDS].drop_duplicates())
        title = f"{model} on {dataset}, up to {pairs} pairs of networks"
        name = f"{{}}_{model}_{dataset}"
        levels = dense[(dense["model"] == model) & (dense["dataset"] == dataset)]
        for metric in panels.METRICS:
            if group[metric].isna().all():
                continue
            points = [
                table.groupby([*keys, "variant"])[metric]
                .agg(["mean", "std", "count"])
                .reset_index()
                for table, keys in ((group, CELL), (levels, NETWORK))
            ]
            points = pd.concat(points, ignore_index=True)
            if args.paper:
                theirs = paper_numbers.accuracies(metric).merge(points[CELL].drop_duplicates())
                theirs["variant"] += " (paper)"
                points = pd.concat([points, theirs], ignore_index=True)
                if theirs.empty:
                    print(f"the paper has no accuracies of {model} on {dataset}")
            panels.save_accuracy(points, title, metric, args.root / "figures", name)
        for line in caveats(group):
            print(line)


if __name__ == "__main__":
    cli.run(main)
