"""Accuracy of the arms against the rewind epoch, and against sparsity (Figures 5 to 11).

    python -m analyze.accuracy runs/quick

Writes figures/accuracy_rewind_* (a panel a width and sparsity) and figures/accuracy_sparsity_* (a
panel a width and rewind epoch): mean over seeds, a band of one sample standard deviation, the dense
networks dashed. ImageNet's top-5 accuracy has figures of its own, figures/top5_*. With --paper the
paper's curves stand beside ours, in the cells that both have.
"""

import pandas as pd

from analyze.lib import panels, paper_numbers
from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    dense_runs,
    of_one_network,
    parse_root,
    remarks,
    sparse_runs,
)
from common import cli


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--paper", action="store_true", help="the paper's curves beside ours")
    args = parser.parse_args()
    runs, dense = sparse_runs(args.root), dense_runs(args.root)
    for (model, dataset), group in runs.groupby(["model", "dataset"]):
        pairs = len(group.loc[~of_one_network(group), SEEDS].drop_duplicates())
        about, name = f"{model} on {dataset}, pairs of networks: {pairs}", f"{{}}_{model}_{dataset}"
        for metric in panels.METRICS:
            if group[metric].isna().all():
                continue
            levels = paper_numbers.of(dense, model, dataset).groupby([*NETWORK, "variant"])[metric]
            tables = group.groupby([*CELL, "variant"])[metric], levels
            points = [table.agg(["mean", "std", "count"]).reset_index() for table in tables]
            points = pd.concat(points, ignore_index=True)
            if args.paper:
                theirs = paper_numbers.accuracies(metric).merge(points[CELL].drop_duplicates())
                theirs["variant"] += " (paper)"
                points = pd.concat([points, theirs], ignore_index=True)
                if theirs.empty:
                    print(f"the paper has no accuracies of {model} on {dataset}")
            panels.save_accuracy(points, about, metric, args.root / "figures", name)
        for line in remarks(group):
            print(line)


if __name__ == "__main__":
    cli.run(main)
