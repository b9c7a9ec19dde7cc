"""Accuracy of the arms against the rewind epoch, and against sparsity (Figures 5 to 11).

    python -m analyze.accuracy runs/quick

Writes figures/accuracy_rewind_* (a panel a width and sparsity) and figures/accuracy_sparsity_* (a
panel a width and rewind epoch): mean over seeds, a band of one sample standard deviation, the dense
networks dashed. ImageNet's top-5 accuracy has figures of its own, figures/top5_*. With --paper the
paper's curves stand beside ours, thin, in the cells that both have.
"""

import pandas as pd

from analyze.lib import paper_numbers, style
from analyze.lib.panels import METRICS, accuracy
from analyze.lib.runs import (
    CELL,
    NETWORK,
    SEEDS,
    dense_runs,
    of_one_network,
    parse_root,
    remarks,
    sparse_runs,
    variant,
)
from common import cli


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--paper", action="store_true", help="the paper's curves beside ours, thin")
    args = parser.parse_args()
    runs, dense = sparse_runs(args.root), dense_runs(args.root)
    dense["variant"] = [variant("dense", tag=tag) for tag in dense["tag"]]
    for (model, dataset), group in runs.groupby(["model", "dataset"]):
        pairs = group[~of_one_network(group)]
        count = len((pairs if len(pairs) else group)[SEEDS].drop_duplicates())
        title = f"{model} on {dataset}, {count} seed pair" + "s" * (count != 1)
        same = dense[(dense["model"] == model) & (dense["dataset"] == dataset)]
        for metric, (name, label) in METRICS.items():
            if group[metric].isna().all():
                continue
            theirs = None
            if args.paper:
                theirs = paper_numbers.of(paper_numbers.accuracies(metric), model, dataset)
                if theirs.empty:
                    print(f"the paper has no accuracies of {model} on {dataset}")
            points = [
                table.groupby(key)[metric].agg(["mean", "std", "count"]).reset_index()
                for table, key in ((group, [*CELL, "variant"]), (same, [*NETWORK, "variant"]))
            ]
            points = pd.concat(points, ignore_index=True)
            for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
                figure = accuracy(points, x, panel, title, label, theirs)
                style.save(figure, points, args.root / "figures", f"{name}_{x}_{model}_{dataset}")
        for line in remarks(group):
            print(line)


if __name__ == "__main__":
    cli.run(main)
