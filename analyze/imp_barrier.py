"""How far pruning moves a network: `python -m analyze.imp_barrier runs/quick` (Figure 4a).

The barrier in test loss and in test error between the dense network and the network that IMP left
after each round, along the line between them, with and without REPAIR, against sparsity. Reads the
rounds that `prune_imp.py --keep-rounds` kept, and otherwise the networks at the asked sparsities.
Writes figures/imp_barrier_*; a network's curve is kept beside it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from analyze.lib import lines, style
from analyze.lib.cache import code_digest, kept
from analyze.lib.runs import NETWORK, dense_files, find_results, parse_root, readable, skipped
from common import checkpoint, cli, masking, paths
from common.data import reader
from common.errors import UserError
from common.runtime.device import pick_device

KEY = [*NETWORK, "tag", "seed", "sparsity"]
METRICS = ["error_barrier", "loss_barrier"]


def chains(root: Path) -> list[dict[str, Any]]:
    """Every network of every IMP chain below `root`, in order of sparsity, with its dense network.

    One whose dense network is not below `root` is skipped. Raises UserError when there is none.
    """
    dense, found = dense_files(root), []
    for run in find_results(root, "prune_imp"):
        start = dense.get(run.get("arguments", {}).get("dense"))
        if start is None:
            skipped(f"{run['folder']}: its dense network is not below {root}")
            continue
        networks = paths.round_files(run["folder"]) or paths.imp_files(run["folder"])
        found += [{"dense": start, "path": path} for path in networks.values()]
    if not found:
        raise UserError(f"no finished IMP chain below {root}: run prune_imp.py --keep-rounds first")
    return found


def barriers(curve: pd.DataFrame) -> list[dict[str, Any]]:
    """Barriers in test loss (nats) and test error (percent), with and without REPAIR."""
    rows = []
    for repaired, part in curve.groupby("repair"):
        metrics = part["test_loss"], 100 - part["test_acc"]
        loss, error = (lines.barrier(one.to_numpy(), part["alpha"].to_numpy()) for one in metrics)
        rows.append({"repair": repaired, "loss_barrier": loss, "error_barrier": error})
    return rows


def measure(run: dict[str, Any], points: int, images: int, read: Callable) -> list[dict[str, Any]]:
    """A row without and one with REPAIR: the network, its sparsity, its barriers."""
    path, settings = run["path"], (points, images)
    pruned = checkpoint.load(path, ("mask", *checkpoint.WEIGHTS))
    files = [checkpoint.digest(run[role])[:8] for role in ("dense", "path")]
    cache = paths.cache_file(path, "barrier", code_digest(lines.__file__), *files, *settings)

    def make() -> pd.DataFrame:
        dense = checkpoint.load(run["dense"], checkpoint.WEIGHTS)
        return lines.measure(dense, pruned, {}, read(pruned["dataset"]), *settings)

    model = pruned["model"]
    values = (
        model["name"],
        model["width"],
        pruned["dataset"]["name"],
        pruned.get("tag") or "",
        pruned["seed"],
    )
    about = dict(zip(KEY, (*values, masking.sparsity(pruned["mask"]))))
    return [about | row for row in barriers(kept(cache, make))]


def plot(points: pd.DataFrame, title: str) -> style.Figure:
    """Error barrier above, loss barrier below, by sparsity: a colour a width, REPAIR solid."""
    figure, axes = style.plt.subplots(2, 1, figsize=(4.6, 5.2), sharex=True)
    for (width, repaired), group in points.groupby(["width", "repair"]):
        dashes = {"linestyle": "-" if repaired else ":", "markersize": 4 if repaired else 2.5}
        look = style.width_look(width) | dashes
        x = 100 * group["sparsity"]
        for axis, metric in zip(axes, METRICS):
            mean, spread = group[f"{metric}_mean"], group[f"{metric}_std"].fillna(0)
            axis.plot(x, mean, label=f"width {width:g}" + ", REPAIR" * repaired, **look)
            band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(x, mean - spread, mean + spread, **band)
    axes[0].set_ylabel("error barrier (%)")
    axes[1].set_ylabel("loss barrier (nats)")
    axes[1].set_xlabel("sparsity (%)")
    axes[0].legend()
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = parse_root(__doc__)
    add = parser.add_argument
    add("--points", type=cli.number(int, 3), default=11, help="of the line (default: %(default)s)")
    add("--images", type=cli.positive, default=10_000, help="for REPAIR (default: %(default)s)")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    read, rows = reader(args.data_dir, pick_device(args.device), args.workers), []
    for run in tqdm(chains(args.root), "networks", unit="network", disable=None):
        rows += readable(measure, run, args.points, args.images, read) or []
    if not rows:
        raise UserError(
            f"no network of an IMP chain below {args.root} could be measured (see above)"
        )
    table = pd.DataFrame(rows)
    twice = table.loc[table.duplicated([*KEY, "repair"]), "seed"]
    if len(twice):
        two = f"two IMP chains of seed {twice.iloc[0]} lie below {args.root}"
        raise UserError(f"{two}: keep experiments apart")
    for (model, dataset, tag), group in table.groupby(["model", "dataset", "tag"]):
        seeds = group["seed"].nunique()
        points = group.groupby(["width", "repair", "sparsity"])[METRICS].agg(
            ["mean", "std", "count"]
        )
        points.columns = ["_".join(column) for column in points.columns]
        points = points.reset_index()
        title = f"dense network to IMP's, {model} on {dataset}, {seeds} seed{'s' * (seeds != 1)}"
        folder, name = (
            args.root / "figures",
            f"imp_barrier_{model}_{dataset}" + f"_{tag}" * bool(tag),
        )
        style.save(plot(points, title), points, folder, name)
        print(points.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
