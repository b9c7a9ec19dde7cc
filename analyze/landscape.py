"""The loss over the plane through three networks (Figure 4b).

    python -m analyze.landscape runs/quick

For a pair of seeds, sparsity and rewind epoch that has an LTH and a permuted network: π(LTH), the
permuted network, and π(A), the dense source, all in the frame of B. The plane is in weight space,
with orthonormal axes; every point is evaluated on all test images, after BatchNorm statistics were
recomputed. Filled contours of the test loss and of the 0-1 loss, the three networks marked. The
barrier between π(LTH) and the permuted network, with REPAIR, is in the title and the CSV. Draws
the first pair of the middle cell, or of the one asked for; --all draws every pair of every cell.
Writes figures/landscape_*; planes and lines are kept beside the permuted network.
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
from analyze.lib.runs import CELL, readable
from common import checkpoint, cli, paths
from common.align.axes import find_axes
from common.align.permutation import permute
from common.errors import UserError
from common.training import evaluate

MARGIN = 0.25  # of the extent of the three networks, on every side
POINTS = 11  # of the line from π(LTH) to permuted
CORNERS = {"lth": ("π(LTH)", "o"), "permuted": ("permuted", "^"), "dense": ("π(A)", "*")}
METRICS = {"test_loss": "test loss (nats)", "test_error": "0-1 loss (%)"}
NAME = "landscape_{model}x{width:g}_{dataset}_{method}_s{s}_k{rewind:03d}"
NAME += "_{source_seed}-{target_seed}_matched{match_epoch:.0f}"
TITLE = "{model} x{width:g} on {dataset}, sparsity {s}, k = {rewind}, "
TITLE += "seeds {source_seed} and {target_seed}\n"
TITLE += "loss barrier {barrier:.3f} nats from π(LTH) to permuted, with REPAIR"


def plane(corners: list[Tensor]) -> tuple[Tensor, np.ndarray]:
    """Two orthonormal directions of the plane through three weight vectors, and their (x, y) on it.

    The first corner is the origin and the second lies on the x axis (Gram-Schmidt). Raises
    ValueError when the three lie on one line.
    """
    origin, second, third = (corner.double() for corner in corners)
    along, across = second - origin, third - origin
    x = along / along.norm()
    rest = across - (across @ x) * x
    if not rest.norm() > 1e-9 * across.norm():
        raise ValueError("the three networks lie on one line")
    directions = torch.stack([x, rest / rest.norm()])
    return directions, (torch.stack([0 * along, along, across]) @ directions.T).cpu().numpy()


def grid(points: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """The x and y values of a grid around (x, y) points, with a margin on every side."""
    low, high = points.min(0), points.max(0)
    margin = MARGIN * (high - low)
    xs, ys = np.linspace(low - margin, high + margin, resolution).T
    return xs, ys


def measure(triple: dict[str, Any], resolution: int, images: int, read: Callable) -> pd.DataFrame:
    """Test loss in nats and error in percent on the grid, a row a point, and a row a network.

    The row of the permuted network has the loss barrier between π(LTH) and it.
    """
    files = [triple[name] for name in ("lth", "permutation", "permuted")]

    def make() -> pd.DataFrame:
        entries = {name: checkpoint.load(triple[name], checkpoint.WEIGHTS) for name in CORNERS}
        permutation = checkpoint.load(triple["permutation"], ("permutation",))["permutation"]
        data = read(entries["permuted"]["dataset"])
        model = lines.build(entries["permuted"], data)
        dims, vectors = find_axes(model, data.input_shape).dims, []
        for name, entry in entries.items():
            moved = permute(entry["state_dict"], dims, {} if name == "permuted" else permutation)
            weights = [moved[name].flatten() for name, _ in model.named_parameters()]
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
        marks = pd.DataFrame(corners, columns=["x", "y"]).assign(network=[*CORNERS])
        return pd.concat([pd.DataFrame(rows), marks])

    all_files = [triple["dense"], *files]
    table = lines.kept(__file__, "plane", all_files, (resolution, images), make)
    line = lines.curve(files, POINTS, images, read)
    barrier = lines.barriers(line).set_index("repair").loc[True, "test"]
    return table.assign(loss_barrier=table["network"].map({"permuted": barrier}))


def plot(table: pd.DataFrame, title: str) -> style.Figure:
    """Two panels, test loss and 0-1 loss; the rows of `table` that name a network are its marks."""
    marks, table = table[table["network"].notna()], table[table["network"].isna()]
    figure, axes = style.plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True)
    for axis, (metric, label) in zip(axes, METRICS.items()):
        values = table.pivot(index="y", columns="x", values=metric)
        # Far from the networks the loss explodes; levels follow the inner part, where they are.
        low, high = values.min(axis=None), np.quantile(values, 0.9)
        high = high if high > low else low + 1  # where nothing was learned it is flat
        levels = style.plt.MaxNLocator(14).tick_values(low, high)
        filled = axis.contourf(
            values.columns, values.index, values, levels, cmap="cividis", extend="max"
        )
        figure.colorbar(filled, ax=axis, label=label, shrink=0.75, ticks=levels[::3])
        for mark in marks.itertuples():
            name, marker = CORNERS[mark.network]
            look = {"color": "white", "markeredgecolor": "black", "markersize": 9, "label": name}
            axis.plot(mark.x, mark.y, marker, **look)
        axis.grid(False)
        axis.set(aspect="equal", xlabel="distance along π(LTH) to permuted")
    axes[0].set_ylabel("distance across")
    figure.legend(handles=axes[0].lines, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    cell = dict.fromkeys(("width", "sparsity", "rewind"))
    args = networks.arguments(__doc__, grid=13, images=10_000, all=False, **cell)
    found, figures = networks.triples(args.root), 0
    for name in cell:
        if (asked := getattr(args, name)) is not None:
            found = found[found[name] == asked]
    if found.empty:
        raise UserError(f"no permuted network of that cell below {args.root}: see results.csv")
    number = found.groupby(CELL).ngroup()
    middle = (number - number.max() / 2).abs().sort_values(kind="stable")
    for triple in found.loc[middle.index].to_dict("records"):
        if (table := readable(measure, triple, args.grid, args.images, args.read)) is None:
            continue
        about = {
            "s": paths.format_sparsity(triple["sparsity"]),
            "barrier": table["loss_barrier"].max(),
        }
        name, title = NAME.format(**triple, **about), TITLE.format(**triple, **about)
        name += f"_{triple['tag']}" * bool(triple["tag"])
        print(title)
        style.save(plot(table, title), table, args.root / "figures", name)
        figures += 1
        if not args.all:
            break
    if not figures:
        raise UserError(f"no plane below {args.root} could be measured (see above)")


if __name__ == "__main__":
    cli.run(main)
