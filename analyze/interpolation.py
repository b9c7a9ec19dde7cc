"""Loss and accuracy along the line from A to B, before and after A is permuted (Figure 3).

    python -m analyze.interpolation runs/quick

For every alignment below the folder: loss and accuracy of (1 - alpha) A + alpha B, and of
(1 - alpha) π(A) + alpha B, each with and without REPAIR, on the test set and on training images
that REPAIR uses. The barrier is the largest excess of the loss over the line between the endpoints'
losses (paper, equation 3); it stands in the legend, as a mean over pairs. Writes
figures/interpolation_*, barriers.csv and, so that a second call is quick, line_*.csv beside B's
weights.
"""

import pandas as pd

from analyze.lib import lines, panels, style
from analyze.lib.networks import alignments, arguments
from analyze.lib.runs import NETWORK, SEEDS, save
from common import cli, paths

MATCH = ["tag", "method", "sparsity", "match_epoch"]
CURVE = ["width", "curve", "repair"]
ROW = [*NETWORK, *MATCH, *SEEDS, "permutation", "curve"]  # of barriers.csv, beside repair


def main() -> None:
    args = arguments(__doc__, points=21, images=10_000)
    runs = alignments(args.root).drop_duplicates("permutation")
    runs["sparsity"] = runs["permutation"].map(paths.sparsity_of).astype(float)
    naive = lines.along(runs, "source", "target").assign(curve="naive")
    aligned = lines.along(runs, "source", "permutation", "target").assign(curve="aligned")
    both = pd.concat([naive, aligned]).sort_index(kind="stable")
    both["permutation"] = [path.relative_to(args.root) for path in both["permutation"]]
    found = lines.curves(both[[*ROW, "files"]], args)
    save(lines.barriers(found, ROW), args.root / "barriers.csv")
    for key, group in found.groupby(["model", "dataset", *MATCH], dropna=False):
        model, dataset, tag, method, sparsity, epoch = key
        if pd.notna(sparsity):  # a permutation for one sparsity
            method += f"_{paths.format_sparsity(sparsity)}"
        method += f"_{tag}" * bool(tag)
        pairs = len(group[SEEDS].drop_duplicates())
        title = f"{model} on {dataset}, {pairs} seed pair{'s' * (pairs != 1)}\n"
        title += f"matched by {method} at epoch {epoch}"
        folder, name = args.root / "figures", f"{method}_{model}_{dataset}_k{epoch:03d}"
        heights = lines.barriers(group, ROW).groupby(CURVE)[["test", "train"]]
        figure = panels.lines(group, title, heights.mean()["test"])
        style.save(figure, group, folder, f"interpolation_{name}")
        print(f"barriers in loss (nats), {model} on {dataset}, {method} at epoch {epoch}")
        print(heights.agg(["mean", "std", "count"]).round(3).to_string())


if __name__ == "__main__":
    cli.run(main)
