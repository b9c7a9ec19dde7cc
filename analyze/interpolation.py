"""Loss and accuracy along the line from A to B, before and after A is permuted (Figure 3).

    python -m analyze.interpolation runs/quick

For every alignment below the folder: loss and accuracy of (1 - alpha) A + alpha B and of
(1 - alpha) π(A) + alpha B, with and without REPAIR, on the test set and on REPAIR's training
images. The barrier is the largest excess of the loss over the line between the losses of the
endpoints (paper, equation 3); its mean over pairs is in the legend. Writes figures/interpolation_*,
barriers.csv and, as a cache, line_*.csv beside B's weights.
"""

import pandas as pd

from analyze.lib import lines, panels, style
from analyze.lib.networks import alignments, parse_args
from analyze.lib.runs import NETWORK, SEEDS, save_table
from common import checkpoint, cli, paths

MATCH = ["tag", "method", "sparsity", "match_epoch"]
CURVE = ["width", "curve", "repair"]
ROW = [*NETWORK, *MATCH, *SEEDS, "permutation", "curve"]  # of barriers.csv, with repair


def main() -> None:
    args = parse_args(__doc__, points=21, images=10_000)
    runs = alignments(args.root).drop_duplicates("permutation")
    runs["sparsity"] = runs["permutation"].map(paths.sparsity_of).astype(float)
    naive = lines.with_files(runs, "source", "target").assign(curve="naive")
    aligned = lines.with_files(runs, "source", "permutation", "target").assign(curve="aligned")
    both = pd.concat([naive, aligned]).sort_index(kind="stable")
    both["permutation"] = both["permutation"].map(checkpoint.digest)
    curves = lines.measure_curves(both[[*ROW, "files"]], args)
    save_table(lines.barriers(curves, ROW), args.root / "barriers.csv")
    for key, group in curves.groupby(["model", "dataset", *MATCH], dropna=False):
        model, dataset, tag, method, sparsity, epoch = key
        if pd.notna(sparsity):  # the permutation depends on the sparsity
            method += f"_{paths.format_sparsity(sparsity)}"
        method += f"_{tag}" * bool(tag)
        pairs = len(group[SEEDS].drop_duplicates())
        title = f"{model} on {dataset}, {pairs} seed pair{'s' * (pairs != 1)}\n"
        title += f"matched by {method} at epoch {epoch}"
        name = f"interpolation_{method}_{model}_{dataset}_k{epoch:03d}"
        barriers = lines.barriers(group, ROW).groupby(CURVE)[["test", "train"]]
        figure = panels.draw_lines(group, title, barriers.mean()["test"])
        style.save_figure(figure, group, args.root / "figures", name)
        print(f"barriers in loss (nats), {model} on {dataset}, {method} at epoch {epoch}")
        print(barriers.agg(["mean", "std", "count"]).round(3).to_string())


if __name__ == "__main__":
    cli.run(main)
