"""Loss and accuracy along the line from A to B, before and after A is permuted (Figure 3).

    python -m analyze.interpolation runs/quick

For every alignment below the folder: loss and accuracy of (1 - alpha) A + alpha B, and of (1 - alpha) π(A) + alpha B,
each with and without REPAIR, on the test set and on the training images that REPAIR uses. The barrier is the largest
excess of the loss over the line between the endpoints' losses (paper, equation 3); it stands in the legend, as a mean
over pairs. Writes figures/interpolation_* (with several widths also one panel with a curve a width) and, so that a second call is quick, line_*.csv beside the permutation
(for A itself beside B's weights).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyze import repair, style
from analyze.results import dense_files, find_results, parse_root, readable, skipped
from common import checkpoint, cli
from common.axes import find_axes
from common.data import Batches, Resident, Streamed, reader
from common.errors import UserError
from common.models import build_model
from common.permutation import permute
from common.training import evaluate, pick_device

NETWORK = ("model", "width", "dataset")
CURVES = {
    ("naive", False): {"label": "A to B", "color": "#D55E00", "linestyle": ":"},
    ("naive", True): {"label": "A to B, REPAIR", "color": "#D55E00", "linestyle": "-", "marker": "s"},
    ("aligned", False): {"label": "π(A) to B", "color": "#009E73", "linestyle": ":"},
    ("aligned", True): {"label": "π(A) to B, REPAIR", "color": "#009E73", "linestyle": "-", "marker": "^"},
}


def barrier(losses: np.ndarray, alphas: np.ndarray) -> float:
    """The largest excess of `losses` over the line between the first and the last (paper, equation 3)."""
    return float((losses - ((1 - alphas) * losses[0] + alphas * losses[-1])).max())


def line(source: dict[str, Tensor], target: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The state dict (1 - alpha) source + alpha target; integer buffers are the target's."""
    return {
        name: torch.lerp(source[name], value, alpha) if value.is_floating_point() else value
        for name, value in target.items()
    }


def along(
    model: nn.Module,
    source: dict[str, Tensor],
    target: dict[str, Tensor],
    alphas: np.ndarray,
    test: Callable[[], Batches],
    train: Callable[[], Batches],
    precision: str = "fp32",
) -> list[dict]:
    """Loss in nats and accuracy in percent at every alpha, test and train, with and without REPAIR on the `train` images.

    In the precision that the networks were trained in, the ends have the metrics of their runs. `test` and `train` start over at every call, so that no more than a batch of a large set is in memory.
    """

    def calibration() -> Iterable[Tensor]:
        return (images for images, _ in train())

    rows = []
    batch_norm = repair.has_batch_norm(model)
    if not batch_norm:
        images, ends = list(calibration()), []
        for state in (source, target):
            model.load_state_dict(state)
            ends.append(repair.statistics(model, images))
    for alpha in tqdm(alphas, "interpolating", unit="point", disable=None, leave=False):
        model.load_state_dict(line(source, target, float(alpha)))
        for repaired in (False, True):
            if repaired and batch_norm:
                repair.recompute_batch_norm(model, calibration(), precision)
            elif repaired:
                repair.rescale(model, images, repair.interpolate(*ends, float(alpha)))
            row = {"alpha": alpha, "repair": repaired}
            for split, batches in (("test", test), ("train", train)):
                row[f"{split}_loss"], row[f"{split}_acc"] = evaluate(model, batches(), precision)
            rows.append(row)
    return rows


def measure(
    ends: tuple[dict, dict],
    permutation: dict[str, Tensor],
    data: Resident | Streamed,
    points: int,
    images: int,
    precision: str,
) -> pd.DataFrame:
    """The curve from the permuted source to the target."""
    source, target = ends
    model = build_model(**target["model"], seed=0).to(data.device, memory_format=torch.channels_last)
    permuted = permute(source["state_dict"], find_axes(model, data.input_shape).dims, permutation)

    def train() -> Batches:
        return data.eval_batches("train", limit=images)

    alphas = np.linspace(0, 1, points)
    return pd.DataFrame(along(model, permuted, target["state_dict"], alphas, data.eval_batches, train, precision))


def alignments(root: Path) -> list[dict]:
    """Every permutation of dense runs below `root`: its `path`, the files of `source` and `target`, and how it was made.

    One whose dense runs are not below `root` is skipped. Raises UserError when there is none.
    """
    dense = dense_files(root)
    found = []
    for run in find_results(root, "align_mask"):
        arguments = run.get("arguments", {})
        if not isinstance(arguments.get("source_seed"), int):
            continue  # networks of one's own, whose module is not known here
        missing = [role for role in ("source", "target") if arguments.get(role) not in dense]
        if missing:
            skipped(f"{run['folder']}: its dense {missing[0]} is not below {root}")
            continue
        files = {role: dense[arguments[role]] for role in ("source", "target")}
        about = {name: arguments[name] for name in ("source_seed", "target_seed", "match_epoch")}
        target = checkpoint.load_json(files["target"].with_name("result.json"))
        about |= {name: target["arguments"][name] for name in NETWORK} | {"precision": target["precision"]}
        for path in sorted(run["folder"].glob("permutation*.pt")):
            method = arguments["method"] + path.stem.removeprefix("permutation")
            found.append({"path": path, "method": method} | files | about)
    if not found:
        raise UserError(f"no finished alignment below {root}: run align_mask.py first")
    return found


def caches(run: dict, points: int | str, images: int | str) -> dict[str, Path]:
    """Where the curves of an alignment are kept; that of the source itself serves all of its permutations."""
    end = f"{points}_{images}_{run['precision']}.csv"
    digests = {role: checkpoint.digest(run[role])[:8] for role in ("source", "target", "path")}
    return {
        "naive": run["target"].with_name(f"line_{repair.MIXED}_{digests['source']}_{digests['target']}_{end}"),
        "aligned": run["path"].with_name(f"line_{repair.MIXED}_{run['path'].stem}_{digests['path']}_{end}"),
    }


def plot(table: pd.DataFrame, title: str) -> tuple[style.Figure, pd.DataFrame]:
    """A column of panels a width: test loss above, accuracy below; the legend gives the barriers."""
    widths = sorted(table["width"].unique())
    figure, axes = style.plt.subplots(
        2, len(widths), figsize=(0.6 + 3.4 * len(widths), 6.2), squeeze=False, sharex=True
    )
    barriers = []
    for column, width in zip(axes.T, widths):
        here = table[table["width"] == width]
        for (kind, repaired), look in CURVES.items():
            curve = here[(here["curve"] == kind) & (here["repair"] == repaired)]
            losses = curve.pivot_table(index="alpha", columns=["source_seed", "target_seed"], values="test_loss")
            found = [barrier(losses[pair].to_numpy(), losses.index.to_numpy()) for pair in losses]
            train = curve.pivot_table(index="alpha", columns=["source_seed", "target_seed"], values="train_loss")
            trained = [barrier(train[pair].to_numpy(), train.index.to_numpy()) for pair in train]
            about = {"width": width, "curve": kind, "repair": repaired}
            barriers += [
                about | {"source_seed": a, "target_seed": b, "test": one, "train": other}
                for (a, b), one, other in zip(losses, found, trained)
            ]
            for axis, metric in zip(column, ("test_loss", "test_acc")):
                mean = curve.groupby("alpha")[metric].agg(["mean", "std"])
                label = f"{look['label']}: barrier {np.mean(found):.3f}, train {np.mean(trained):.3f}"
                axis.plot(
                    mean.index,
                    mean["mean"],
                    **look | {"label": label if metric == "test_loss" else None, "markersize": 3.5},
                )
                spread = mean["std"].fillna(0)
                axis.fill_between(
                    mean.index,
                    mean["mean"] - spread,
                    mean["mean"] + spread,
                    color=look["color"],
                    alpha=0.12,
                    linewidth=0,
                )
        column[0].set_title(f"width {width:g}")
        column[1].set_xlabel("α (0: A, 1: B)")
        column[1].legend(*column[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, -0.22))
    axes[0, 0].set_ylabel("test loss (nats)")
    axes[1, 0].set_ylabel("test accuracy (%)")
    figure.suptitle(title, fontsize=10)
    return figure, pd.DataFrame(barriers)


def plot_widths(table: pd.DataFrame, title: str) -> style.Figure:
    """Figure 3: test loss along the line, a colour a width, without REPAIR and with it; A dotted, π(A) solid."""
    kinds = [repaired for repaired in (False, True) if (table["repair"] == repaired).any()]
    figure, axes = style.plt.subplots(1, len(kinds), figsize=(0.8 + 3.6 * len(kinds), 3.4), squeeze=False, sharey=True)
    for axis, repaired in zip(axes[0], kinds):
        here = table[table["repair"] == repaired]
        for (width, curve), rows in here.groupby(["width", "curve"]):
            loss = rows.groupby("alpha")["test_loss"].agg(["mean", "std"])
            look, start = style.width_look(width), "A" if curve == "naive" else "π(A)"
            look |= {"linestyle": ":" if curve == "naive" else "-", "markersize": 3}
            axis.plot(loss.index, loss["mean"], **look, label=f"width {width:g}, {start} to B")
            low, high = (loss["mean"] + sign * loss["std"].fillna(0) for sign in (-1, 1))
            axis.fill_between(loss.index, low, high, color=look["color"], alpha=0.12, linewidth=0)
        axis.set_title("with REPAIR" if repaired else "without REPAIR")
        axis.set_xlabel("α (0: A, 1: B)")
    axes[0, 0].set_ylabel("test loss (nats)")
    entries = axes[0, -1].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--points", type=cli.number(int, 3), default=21, help="values of alpha (default: %(default)s)")
    parser.add_argument("--images", type=cli.positive, default=10_000, help="for REPAIR (default: %(default)s)")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    read, tables = reader(args.data_dir, device, args.workers), []
    for run in tqdm(alignments(args.root), "pairs", unit="pair", disable=None):
        for curve, cache in caches(run, args.points, args.images).items():
            if not cache.is_file():
                ends = tuple(readable(checkpoint.load, run[role], checkpoint.WEIGHTS) for role in ("source", "target"))
                found = readable(checkpoint.load, run["path"], ("permutation",))
                if None in (*ends, found):
                    continue
                moved = found["permutation"] if curve == "aligned" else {}
                rows = measure(ends, moved, read(ends[1]["dataset"]), args.points, args.images, run["precision"])
                checkpoint.save_text(rows.to_csv(index=False), cache)
            about = {name: run[name] for name in (*NETWORK, "method", "source_seed", "target_seed", "match_epoch")}
            tables.append(pd.read_csv(cache).assign(curve=curve, **about))
    if not tables:
        raise UserError(f"no alignment below {args.root} can be read: run align_mask.py again")
    table = pd.concat(tables, ignore_index=True)
    for (model, dataset, method, epoch), group in table.groupby(["model", "dataset", "method", "match_epoch"]):
        pairs = len(group[["source_seed", "target_seed"]].drop_duplicates())
        title = f"{model} on {dataset}, {pairs} seed pair{'s' * (pairs != 1)}\nmatched by {method} at epoch {epoch}"
        figure, barriers = plot(group, title)
        folder, name = args.root / "figures", f"{method}_{model}_{dataset}_k{epoch:03d}"
        style.save(figure, group, folder, f"interpolation_{name}")
        if group["width"].nunique() > 1:
            style.save(plot_widths(group, title), group, folder, f"interpolation_widths_{name}")
        mean = barriers.groupby(["width", "curve", "repair"])[["test", "train"]].agg(["mean", "std", "count"]).round(3)
        print(f"barriers in loss (nats), {model} on {dataset}, {method} at epoch {epoch}\n{mean.to_string()}")


if __name__ == "__main__":
    cli.run(main)
