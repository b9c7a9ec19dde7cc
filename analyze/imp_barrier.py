"""How far pruning moves a network: `python -m analyze.imp_barrier runs/quick` (Figure 4a).

The barrier in test loss and in test error between the dense network and the network that IMP left
after each round, along the line between them, with and without REPAIR, against sparsity. Reads the
rounds that `prune_imp.py --keep-rounds` kept, and otherwise the networks at the asked sparsities,
as points that no line joins. Writes figures/imp_barrier_*; a network's curve is kept beside it.
"""

import pandas as pd
from tqdm import tqdm

from analyze.lib import lines, style
from analyze.lib.networks import IMAGES, SEVERAL, arguments, imp_networks
from analyze.lib.runs import readable
from common import cli
from common.errors import UserError

KEY = ["model", "dataset", "tag", "width", "seed", "sparsity"]
METRICS = ["error_barrier", "loss_barrier"]
LABELS = ["error barrier (%)", "loss barrier (nats)"]
FEW = 3  # rounds; a line through fewer points shows no course


def plot(points: pd.DataFrame, title: str, joined: bool) -> style.Figure:
    """Error barrier above, loss barrier below, by sparsity: a colour a width, REPAIR solid.

    Networks that are not those of a chain of rounds are not `joined` by a line.
    """
    figure, axes = style.plt.subplots(2, 1, figsize=(4.6, 5.2), sharex=True)
    for (width, repaired), group in points.groupby(["width", "repair"]):
        line = ("-" if repaired else ":") if joined else ""
        look = {"linestyle": line, "markersize": 4 if repaired else 2.5, "elinewidth": 0.7}
        look |= style.width_look(width)
        name = f"width {width:g}{', REPAIR' if repaired else ''}"
        x = 100 * group["sparsity"]
        for axis, metric in zip(axes, METRICS):
            mean, spread = group[f"{metric}_mean"], group[f"{metric}_std"].fillna(0)
            axis.errorbar(x, mean, spread, label=name, **look)
    for axis, label in zip(axes, LABELS):
        axis.set_ylabel(label)
    axes[1].set_xlabel("sparsity (%)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    points = {"type": SEVERAL, "default": 11, "help": "of the line"}
    args = arguments(__doc__, points=points, images=IMAGES | {"help": "for REPAIR"})
    curves = []
    found = imp_networks(args.root, rounds=True)
    for run in tqdm(found, "networks", unit="network", disable=None):
        files = [run.pop("source"), run.pop("file")]
        curve = readable(lines.curve, files, args.points, args.images, args.read)
        if curve is not None:
            curves.append(curve.assign(**run))
    if not curves:
        raise UserError(
            f"no IMP chain below {args.root} could be measured: run prune_imp.py --keep-rounds"
        )
    table = lines.barriers(pd.concat(curves), [*KEY, "rounds"])
    table = table.rename(columns={"test": "loss_barrier", "error": "error_barrier"})
    twice = table.loc[table.duplicated([*KEY, "repair"]), "seed"]
    if len(twice):
        two = f"two IMP chains of seed {twice.iloc[0]} lie below {args.root}"
        raise UserError(f"{two}: keep experiments apart")
    for (model, dataset, tag), group in table.groupby(["model", "dataset", "tag"]):
        seeds = group["seed"].nunique()
        count = group.groupby("width")["sparsity"].nunique().max()
        points = group.groupby(["width", "repair", "sparsity"])[METRICS]
        points = points.agg(["mean", "std", "count"])
        points.columns = ["_".join(column) for column in points.columns]
        points = points.reset_index()
        rounds = group["rounds"].all()
        when = "at the asked sparsities, not after every round"
        if rounds:
            when = f"after each of {count} rounds"
        title = f"dense network to IMP's, {model} on {dataset}, {seeds} seed{'s' * (seeds != 1)}"
        title += f"\n{when}"
        name = f"imp_barrier_{model}_{dataset}" + f"_{tag}" * bool(tag)
        figure = plot(points, title, joined=rounds and count >= FEW)
        style.save(figure, points, args.root / "figures", name)
        print(title)
        print(points.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
