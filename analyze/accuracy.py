"""Accuracy of the arms against the rewind epoch, and against sparsity (Figures 5-10).

    python -m analyze.accuracy runs/quick

Writes figures/accuracy_rewind_* (a panel a width and sparsity) and figures/accuracy_sparsity_* (a
panel a width and rewind epoch): mean over seeds, a band of one sample standard deviation, the dense
networks dashed. With --paper the paper's curves stand beside ours, thin, in the cells that both
have.
"""

from analyze.lib import paper_numbers, style
from analyze.lib.panels import accuracy
from analyze.lib.runs import (
    SEEDS,
    dense_runs,
    of_one_network,
    parse_root,
    remarks,
    sparse_runs,
    variants,
)
from common import cli


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--paper", action="store_true", help="the paper's curves beside ours, thin")
    args = parser.parse_args()
    runs, dense = sparse_runs(args.root), dense_runs(args.root)
    runs["variant"] = variants(runs)
    for (model, dataset), group in runs.groupby(["model", "dataset"]):
        reference = None
        if args.paper:
            reference = paper_numbers.of(paper_numbers.accuracies(), model, dataset)
            if reference.empty:
                print(f"the paper has no accuracies of {model} on {dataset}")
        pairs = group[~of_one_network(group)]
        count = len((pairs if len(pairs) else group)[SEEDS].drop_duplicates())
        title = f"{model} on {dataset}, {count} seed pair" + "s" * (count != 1)
        means = group.groupby(["width", "sparsity", "rewind", "variant"])["test_acc"]
        points = means.agg(["mean", "std", "count"]).reset_index()
        levels = paper_numbers.of(dense, model, dataset)
        for x, panel in (("rewind", "sparsity"), ("sparsity", "rewind")):
            figure = accuracy(points, levels, x, panel, title, reference)
            name = f"accuracy_{x}_{model}_{dataset}"
            style.save(figure, points, args.root / "figures", name)
        for line in remarks(group):
            print(line)


if __name__ == "__main__":
    cli.run(main)
