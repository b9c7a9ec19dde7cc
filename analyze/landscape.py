"""The loss over the plane through three networks (Figure 4b).

    python -m analyze.landscape runs/quick

The networks are π(LTH), the permuted network, and π(A), the dense source, all in the neuron order
of B, for a pair of seeds, sparsity and rewind epoch that has an LTH and a permuted network. The
plane is in weight space, with orthonormal axes; every point is evaluated on all test images after
BatchNorm statistics are recomputed. Filled contours show the test loss and the 0-1 loss, markers
the three networks. The barrier between π(LTH) and the permuted network, with REPAIR, is in the
title and the CSV. Draws the first pair of the middle cell, or of the cell selected by flags; --all
draws every pair of every cell. Writes figures/landscape_*; planes and lines are cached beside the
permuted network.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from analyze.lib import lines, networks, style
from analyze.lib.runs import CELL, try_read
from common import checkpoint, cli, paths
from common.align.axes import find_axes
from common.align.permutation import permute
from common.errors import UserError
from common.training import evaluate

MARGIN = 0.25  # on every side, relative to the extent of the three networks
LINE_POINTS = 11  # from π(LTH) to permuted
NETWORKS = {"lth": ("π(LTH)", "o"), "permuted": ("permuted", "^"), "dense": ("π(A)", "*")}
METRICS = {"test_loss": "test loss (nats)", "test_error": "0-1 loss (%)"}
NAME = "landscape_{model}x{width:g}_{dataset}_{method}_s{s}_k{rewind:03d}"
NAME += "_{source_seed}-{target_seed}_matched{match_epoch:.0f}"
TITLE = "{model} x{width:g} on {dataset}, {variant}, sparsity {s}, k = {rewind}, "
TITLE += "seeds {source_seed} and {target_seed}\n"
TITLE += "loss barrier {barrier:.3f} nats from π(LTH) to permuted, with REPAIR"


def plane(corners: list[Tensor]) -> tuple[Tensor, np.ndarray]:
    """Return two orthonormal directions (2, weights) and the (x, y) of each corner in their plane.

    `corners` are three weight vectors: the first is the origin, the second lies on the x axis
    (Gram-Schmidt). Raises ValueError when the three lie on one line.
    """
    origin, second, third = (corner.double() for corner in corners)
    u, v = second - origin, third - origin
    x = u / u.norm()
    y = v - (v @ x) * x
    if not y.norm() > 1e-9 * v.norm():
        raise ValueError("the three networks lie on one line")
    directions = torch.stack([x, y / y.norm()])
    return directions, (torch.stack([0 * u, u, v]) @ directions.T).cpu().numpy()


def grid(points: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the x and y values of a grid around (x, y) points, with a margin on every side."""
    low, high = points.min(0), points.max(0)
    margin = MARGIN * (high - low)
    xs, ys = np.linspace(low - margin, high + margin, resolution).T
    return xs, ys


def measure_plane(
    triple: dict[str, Any], resolution: int, images: int, load_data: Callable
) -> pd.DataFrame:
    """Return test loss (nats) and error (percent), a row per grid point, and a row per network.

    `triple` is a row of `networks.triples`. The row of the permuted network has the loss barrier
    between π(LTH) and it.
    """
    files = [triple[name] for name in ("lth", "permutation", "permuted")]

    def compute() -> pd.DataFrame:
        entries = {name: checkpoint.load(triple[name], checkpoint.WEIGHTS) for name in NETWORKS}
        permutation = checkpoint.load(triple["permutation"], ("permutation",))["permutation"]
        data = load_data(entries["permuted"]["dataset"])
        model = lines.load_network(entries["permuted"], data)
        dims, vectors = find_axes(model, data.input_shape).dims, []
        for network, entry in entries.items():
            state = entry["state_dict"]
            if network != "permuted":
                state = permute(state, dims, permutation)
            weights = [state[name].flatten() for name, _ in model.named_parameters()]
            vectors.append(torch.cat(weights).to(data.device))
        directions, corners = plane(vectors)
        xs, ys = grid(corners, resolution)
        rows = []
        for y, x in tqdm([*itertools.product(ys, xs)], "plane", disable=None, leave=False):
            weights = vectors[0].double() + x * directions[0] + y * directions[1]
            nn.utils.vector_to_parameters(weights.float(), model.parameters())
            update_bn(data.eval_batches("train", lines.BATCH, images), model)
            loss, accuracy = evaluate(model, data.eval_batches("test", lines.BATCH))
            rows.append({"x": x, "y": y, "test_loss": loss, "test_error": 100 - accuracy})
        corner_rows = pd.DataFrame(corners, columns=["x", "y"]).assign(network=[*NETWORKS])
        return pd.concat([pd.DataFrame(rows), corner_rows])

    all_files = [triple["dense"], *files]
    table = lines.cached(__file__, "plane", all_files, (resolution, images), compute)
    line = lines.measure_curve(files, LINE_POINTS, images, load_data)
    barrier = lines.barriers(line).set_index("repair").loc[True, "test"]
    return table.assign(loss_barrier=table["network"].map({"permuted": barrier}))


def plot(table: pd.DataFrame, title: str) -> style.Figure:
    """Draw test loss and 0-1 loss beside each other, with a marker for each network."""
    corners, table = table[table["network"].notna()], table[table["network"].isna()]
    figure, axes = style.plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True)
    for axis, (metric, label) in zip(axes, METRICS.items()):
        values = table.pivot(index="y", columns="x", values=metric)
        # Far from the networks the loss explodes: the levels cover the lowest 90% of the values.
        low, high = values.min(axis=None), np.quantile(values, 0.9)
        high = high if high > low else low + 1  # a constant loss if nothing was learned
        levels = style.plt.MaxNLocator(14).tick_values(low, high)
        filled = axis.contourf(
            values.columns, values.index, values, levels, cmap="cividis", extend="max"
        )
        figure.colorbar(filled, ax=axis, label=label, shrink=0.75, ticks=levels[::3])
        for row in corners.itertuples():
            name, marker = NETWORKS[row.network]
            options = {"color": "white", "markeredgecolor": "black", "markersize": 9}
            axis.plot(row.x, row.y, marker, label=name, **options)
        axis.grid(False)
        axis.set(aspect="equal", xlabel="distance along π(LTH) to permuted")
    axes[0].set_ylabel("distance across")
    figure.legend(handles=axes[0].lines, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    cell = dict.fromkeys(("width", "sparsity", "rewind"))
    args = networks.parse_args(__doc__, grid=13, images=10_000, all=False, **cell)
    triples, figures = networks.triples(args.root), 0
    for name in cell:
        if (value := getattr(args, name)) is not None:
            triples = triples[triples[name] == value]
    if triples.empty:
        raise UserError(f"no permuted network of that cell below {args.root}: see results.csv")
    number = triples.groupby(CELL).ngroup()
    from_middle = (number - number.max() / 2).abs().sort_values(kind="stable")
    for triple in triples.loc[from_middle.index].to_dict("records"):
        table = try_read(measure_plane, triple, args.grid, args.images, args.load_data)
        if table is None:
            continue
        values = {
            "s": paths.format_sparsity(triple["sparsity"]),
            "barrier": table["loss_barrier"].max(),
        }
        name, title = NAME.format(**triple, **values), TITLE.format(**triple, **values)
        name += f"_{triple['tag']}" * bool(triple["tag"])
        print(title)
        style.save_figure(plot(table, title), table, args.root / "figures", name)
        figures += 1
        if not args.all:
            break
    if not figures:
        raise UserError(f"no plane below {args.root} could be measured (see above)")


if __name__ == "__main__":
    cli.run(main)
