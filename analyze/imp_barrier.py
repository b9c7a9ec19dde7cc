"""How far pruning moves a network: `python -m analyze.imp_barrier runs/quick` (Figure 4a).

The barrier in test loss and in test error between the dense network and the network that IMP left
after each round, along the line between them, with and without REPAIR, against sparsity. Reads the
rounds that `prune_imp.py --keep-rounds` kept, and otherwise the networks at the asked sparsities,
as points that no line joins. Writes figures/imp_barrier_*; a network's curve is kept beside it.
"""

import pandas as pd

from analyze.lib import lines, panels, style
from analyze.lib.networks import PRUNED, arguments, imp_networks
from analyze.lib.runs import refuse_repeats
from common import cli
from common.errors import UserError

GROUP = ["model", "dataset", "tag"]
METRICS = {"error_barrier": "error barrier (%)", "loss_barrier": "loss barrier (nats)"}
FEW = 3  # rounds; a line through fewer points shows no course


def plot(points: pd.DataFrame, title: str, joined: bool) -> style.Figure:
    """Error barrier above, loss barrier below, by sparsity: a colour a width, REPAIR solid.

    Networks that are not those of a chain of rounds are not `joined` by a line.
    """
    points, looks = points.assign(sparsity=100 * points["sparsity"], column=""), {}
    points["series"] = points["width"].map("width {:g}".format)
    points["series"] += points["repair"].map({True: ", REPAIR", False: ""})
    for (width, repaired, name), _ in points.groupby(["width", "repair", "series"]):
        line = ("-" if repaired else ":") if joined else ""
        look = {"linestyle": line, "markersize": 4 if repaired else 2.5}
        looks[name] = style.width_look(width) | look
    parts = []
    for metric, label in METRICS.items():
        names = {f"{metric}_{kind}": kind for kind in ("mean", "std")}
        parts.append(points.rename(columns=names).assign(row=label))
    return panels.draw(pd.concat(parts), "sparsity", looks, title)


def main() -> None:
    args = arguments(__doc__, points=11, images=10_000)
    found = imp_networks(args.root, rounds=True)
    if found.empty:
        raise UserError(f"no IMP chain below {args.root}: run prune_imp.py --keep-rounds")
    refuse_repeats(found, PRUNED, "file")
    about = [*PRUNED, "rounds"]
    curves = lines.curves(lines.along(found, "dense", "file")[[*about, "files"]], args)
    names = {"test": "loss_barrier", "error": "error_barrier"}
    table = lines.barriers(curves, about).rename(columns=names)
    for (model, dataset, tag), group in table.groupby(GROUP):
        points = group.groupby(["width", "repair", "sparsity"])[[*METRICS]]
        points = points.agg(["mean", "std", "count"])
        points.columns = map("_".join, points.columns)
        points = points.reset_index()
        seeds, rounds = group["seed"].nunique(), group["rounds"].all()
        count = group.groupby("width")["sparsity"].nunique().max()
        title = f"dense network to IMP's, {model} on {dataset}, {seeds} seed{'s' * (seeds != 1)}\n"
        unusual = "at the asked sparsities, not after every round"
        title += f"after each of {count} rounds" if rounds else unusual
        figure = plot(points, title, joined=rounds and count >= FEW)
        name = f"imp_barrier_{model}_{dataset}" + f"_{tag}" * bool(tag)
        style.save(figure, points, args.root / "figures", name)
        print(title)
        print(points.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    cli.run(main)
