"""How far pruning moves a network: `python -m analyze.imp_barrier runs/quick` (Figure 4a).

The barrier in test loss and in test error between the dense network and the network that IMP left after each round,
along the line between them, with and without REPAIR, against sparsity. Reads the rounds that `prune_imp.py
--keep-rounds` kept, and otherwise the networks at the asked sparsities. Writes figures/imp_barrier_*; a network's
curve is kept beside it.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from analyze import repair, style
from analyze.interpolation import barrier, measure
from analyze.results import CELL, dense_files, find_results, parse_root, readable, skipped
from common import checkpoint, cli, masking
from common.data import reader
from common.errors import UserError
from common.training import pick_device


def chains(root: Path) -> list[dict[str, Any]]:
    """Every network of every IMP chain below `root`, with its dense network: files, in order of sparsity.

    One whose dense network is not below `root` is skipped. Raises UserError when there is none.
    """
    dense, found = dense_files(root), []
    for run in find_results(root, "prune_imp"):
        start = dense.get(run.get("arguments", {}).get("dense"))
        if start is None or "precision" not in run:
            skipped(f"{run['folder']}: its dense network is not below {root}")
            continue
        kept = sorted(run["folder"].glob("round_*.pt")) or sorted(run["folder"].glob("sparse_*.pt"))
        found += [{"dense": start, "path": path, "precision": run["precision"]} for path in kept]
    if not found:
        raise UserError(f"no finished IMP chain below {root}: run prune_imp.py --keep-rounds first")
    return found


def barriers(curve: pd.DataFrame) -> list[dict[str, Any]]:
    """Barriers in test loss (nats) and test error (percent), with and without REPAIR."""
    rows = []
    for repaired, part in curve.groupby("repair"):
        alphas = part["alpha"].to_numpy()
        losses, errors = part["test_loss"].to_numpy(), 100 - part["test_acc"].to_numpy()
        rows.append({"repair": repaired, "loss_barrier": barrier(losses, alphas), "error_barrier": barrier(errors, alphas)})  # fmt: skip
    return rows


def plot(table: pd.DataFrame, title: str) -> tuple[style.Figure, pd.DataFrame]:
    """Error barrier above and loss barrier below, against sparsity: a colour a width, REPAIR solid."""
    figure, axes = style.plt.subplots(2, 1, figsize=(4.6, 5.2), sharex=True)
    points = table.groupby(["width", "repair", "sparsity"])[["error_barrier", "loss_barrier"]].agg(
        ["mean", "std", "count"]
    )
    for (width, repaired), group in points.groupby(level=["width", "repair"]):
        look = style.width_look(width) | {"linestyle": "-" if repaired else ":", "markersize": 4 if repaired else 2.5}
        x = 100 * group.index.get_level_values("sparsity")
        for axis, metric in zip(axes, ("error_barrier", "loss_barrier")):
            mean, spread = group[metric]["mean"], group[metric]["std"].fillna(0)
            axis.plot(x, mean, label=f"width {width:g}" + ", REPAIR" * repaired, **look)
            axis.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.15, linewidth=0)
    axes[0].set_ylabel("error barrier (%)")
    axes[1].set_ylabel("loss barrier (nats)")
    axes[1].set_xlabel("sparsity (%)")
    axes[0].legend()
    figure.suptitle(title, fontsize=10)
    flat = points.copy()
    flat.columns = ["_".join(column) for column in flat.columns]
    return figure, flat.reset_index()


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--points", type=cli.number(int, 3), default=11, help="values of alpha (default: %(default)s)")
    parser.add_argument("--images", type=cli.positive, default=10_000, help="for REPAIR (default: %(default)s)")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    read, rows = reader(args.data_dir, device, args.workers), []
    for run in tqdm(chains(args.root), "networks", unit="network", disable=None):
        path = run["path"]
        pruned = readable(checkpoint.load, path, ("mask", "model", "dataset", "state_dict", "seed"))
        dense = readable(checkpoint.load, run["dense"], checkpoint.WEIGHTS)
        if None in (pruned, dense):
            continue
        cache = path.with_name(
            f"barrier_{repair.MIXED}_{path.stem}_{checkpoint.digest(path)[:8]}_{args.points}_{args.images}_{run['precision']}.csv"
        )
        if not cache.is_file():
            curve = measure((dense, pruned), {}, read(pruned["dataset"]), args.points, args.images, run["precision"])
            checkpoint.save_text(curve.to_csv(index=False), cache)
        network = (pruned["model"]["name"], pruned["model"]["width"], pruned["dataset"]["name"])
        about = dict(zip(CELL[:3], network)) | {"seed": pruned["seed"], "sparsity": masking.sparsity(pruned["mask"])}
        rows += [about | row for row in barriers(pd.read_csv(cache))]
    if not rows:
        raise UserError(f"no network of an IMP chain below {args.root} can be read: run prune_imp.py again")
    table = pd.DataFrame(rows)
    twice = table.duplicated([*CELL[:3], "seed", "sparsity", "repair"])
    if twice.any():
        raise UserError(
            f"two IMP chains of seed {table.loc[twice, 'seed'].iloc[0]} lie below {args.root}: keep experiments apart"
        )
    for (model, dataset), group in table.groupby(["model", "dataset"]):
        seeds = group["seed"].nunique()
        figure, points = plot(group, f"dense network to IMP's, {model} on {dataset}, {seeds} seed" + "s" * (seeds != 1))
        style.save(figure, points, args.root / "figures", f"imp_barrier_{model}_{dataset}")
        print(points.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
