"""Loss and accuracy along the line from A to B, before and after A is permuted (Figure 3).

    python -m analyze.interpolation runs/quick

For every alignment below the folder: loss and accuracy of (1 - alpha) A + alpha B, and of
(1 - alpha) π(A) + alpha B, each with and without REPAIR, on the test set and on training images
that REPAIR uses. The barrier is the largest excess of the loss over the line between the endpoints'
losses (paper, equation 3); it stands in the legend, as a mean over pairs. Writes
figures/interpolation_* (with several widths also one panel with a curve a width) and, so that a
second call is quick, line_*.csv beside B's weights.
"""

import pandas as pd
from tqdm import tqdm

from analyze.lib import lines, style
from analyze.lib.networks import IMAGES, SEVERAL, alignments, arguments
from analyze.lib.panels import ALPHA, draw_mean, widths
from analyze.lib.runs import NETWORK, SEEDS, readable
from common import cli, paths
from common.errors import UserError

MATCH = ["tag", "method", "sparsity", "match_epoch"]
CURVES = {
    ("naive", False): {"label": "A to B", "color": "#D55E00", "linestyle": ":"},
    ("naive", True): {"label": "A to B, REPAIR", "color": "#D55E00", "marker": "s"},
    ("aligned", False): {"label": "π(A) to B", "color": "#009E73", "linestyle": ":"},
    ("aligned", True): {"label": "π(A) to B, REPAIR", "color": "#009E73", "marker": "^"},
}


def plot(table: pd.DataFrame, title: str) -> style.Figure:
    """A column of panels a width: test loss above, accuracy below, barriers in the legend."""
    widths = sorted(table["width"].unique())
    size = (0.6 + 3.4 * len(widths), 6.2)
    figure, axes = style.plt.subplots(2, len(widths), figsize=size, squeeze=False, sharex=True)
    found = lines.barriers(table, ["width", "curve", *SEEDS])
    means = found.groupby(["width", "curve", "repair"])[["test", "train"]].mean()
    for (above, below), width in zip(axes.T, widths):
        here = table[table["width"] == width]
        for (kind, repaired), look in CURVES.items():
            rows = here[(here["curve"] == kind) & (here["repair"] == repaired)]
            if rows.empty:
                continue
            test, train = means.loc[(width, kind, repaired)]
            label = f"{look['label']}: barrier {test:.3f}, train {train:.3f}"
            look = look | {"label": label, "markersize": 3.5}
            draw_mean(above, rows, "test_loss", **look)
            draw_mean(below, rows, "test_acc", **look)
        above.set_title(f"width {width:g}")
        below.set_xlabel(ALPHA)
        below.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22))
    axes[0, 0].set_ylabel("test loss (nats)")
    axes[1, 0].set_ylabel("test accuracy (%)")
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    points = {"type": SEVERAL, "default": 21, "help": "of the line"}
    args = arguments(__doc__, points=points, images=IMAGES | {"help": "for REPAIR"})
    curves = []
    for run in tqdm(alignments(args.root), "pairs", unit="pair", disable=None):
        ends = run["source"], run["target"]
        for kind, between in (("naive", []), ("aligned", [run["permutation"]])):
            files = [ends[0], *between, ends[1]]
            curve = readable(lines.curve, files, args.points, args.images, args.read)
            if curve is not None:
                about = {key: run[key] for key in (*NETWORK, *MATCH, *SEEDS)}
                curves.append(curve.assign(curve=kind, **about))
    if not curves:
        raise UserError(f"no alignment below {args.root} could be measured (see above)")
    found = pd.concat(curves, ignore_index=True)
    for key, group in found.groupby(["model", "dataset", *MATCH], dropna=False):
        model, dataset, tag, method, sparsity, epoch = key
        if pd.notna(sparsity):  # a permutation for one sparsity
            method += f"_{paths.label(sparsity)}"
        method += f"_{tag}" * bool(tag)
        pairs = len(group[SEEDS].drop_duplicates())
        about = f"{model} on {dataset}, {pairs} seed pair{'s' * (pairs != 1)}"
        title = f"{about}\nmatched by {method} at epoch {epoch}"
        folder, name = args.root / "figures", f"{method}_{model}_{dataset}_k{epoch:03d}"
        style.save(plot(group, title), group, folder, f"interpolation_{name}")
        if group["width"].nunique() > 1:
            style.save(widths(group, title), group, folder, f"interpolation_widths_{name}")
        print(f"barriers in loss (nats), {model} on {dataset}, {method} at epoch {epoch}")
        heights = lines.barriers(group, ["width", "curve", *SEEDS])
        heights = heights.groupby(["width", "curve", "repair"])[["test", "train"]]
        print(heights.agg(["mean", "std", "count"]).round(3).to_string())


if __name__ == "__main__":
    cli.run(main)
