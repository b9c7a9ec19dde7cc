"""How far pruning moves a network: `python -m analyze.imp_barrier runs/quick` (Figure 4a).

The barrier in test loss and test error on the line from the dense network to the network after each
round of IMP, with and without REPAIR, against sparsity. Uses the rounds that `prune_imp.py
--keep-rounds` kept, or else the networks at the requested sparsities, whose points no line joins.
Writes figures/imp_barrier_*; each curve is cached beside its pruned network.
"""

import pandas as pd

from analyze.lib import lines, panels, style
from analyze.lib.networks import IMP, imp_networks, parse_args
from analyze.lib.runs import check_unique
from common import cli
from common.errors import UserError

GROUP = ["model", "dataset", "tag"]
METRICS = {"error_barrier": "error barrier (%)", "loss_barrier": "loss barrier (nats)"}
MIN_ROUNDS = 3  # a line through fewer points shows no trend


def plot(points: pd.DataFrame, title: str, joined: bool) -> style.Figure:
    """Draw error barrier above loss barrier against sparsity; a colour per width, REPAIR solid.

    A line joins the points if they are `joined`: the rounds of one chain.
    """
    points, styles = points.assign(sparsity=100 * points["sparsity"], column=""), {}
    points["series"] = points["width"].map("width {:g}".format)
    points["series"] += points["repair"].map({True: ", REPAIR", False: ""})
    for (width, repaired, name), _ in points.groupby(["width", "repair", "series"]):
        line = ("-" if repaired else ":") if joined else ""
        line_style = {"linestyle": line, "markersize": 4 if repaired else 2.5}
        styles[name] = style.width_style(width) | line_style
    parts = []
    for metric, label in METRICS.items():
        names = {f"{metric}_{statistic}": statistic for statistic in ("mean", "std")}
        parts.append(points.rename(columns=names).assign(row=label))
    return panels.draw(pd.concat(parts), "sparsity", styles, title)


def main() -> None:
    args = parse_args(__doc__, points=11, images=10_000)
    networks = imp_networks(args.root, rounds=True)
    if networks.empty:
        raise UserError(
            f"no IMP chain with its dense network below {args.root}: run prune_imp.py "
            "--keep-rounds, or pass a folder that has it, too"
        )
    check_unique(networks, IMP, "file")
    keys = [*IMP, "rounds"]
    files = lines.with_files(networks, "dense", "file")[[*keys, "files"]]
    names = {"test": "loss_barrier", "error": "error_barrier"}
    table = lines.barriers(lines.measure_curves(files, args), keys).rename(columns=names)
    for (model, dataset, tag), group in table.groupby(GROUP):
        groups = group.groupby(["width", "repair", "sparsity"])
        points = groups[[*METRICS]].agg(["mean", "std", "count"])
        points.columns = map("_".join, points.columns)
        points = points.reset_index()
        seeds, rounds = group["seed"].nunique(), group["rounds"].all()
        count = group.groupby("width")["sparsity"].nunique().max()
        title = f"dense network to IMP's, {model} on {dataset}" + f" [{tag}]" * bool(tag)
        title += f", {seeds} seed{'s' * (seeds != 1)}\n"
        requested = "at the requested sparsities, not after every round"
        title += f"after each of {count} rounds" if rounds else requested
        figure = plot(points, title, joined=rounds and count >= MIN_ROUNDS)
        name = f"imp_barrier_{model}_{dataset}" + f"_{tag}" * bool(tag)
        style.save_figure(figure, points, args.root / "figures", name)
        print(title)
        print(points.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
