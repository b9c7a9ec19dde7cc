"""The loss over the plane through three networks (Figure 4b).

    python -m analyze.landscape runs/quick

For every pair of seeds, sparsity and rewind epoch that has an LTH and a permuted network: π(LTH),
the permuted network, and π(A), the dense source, all in the frame of B. The plane lies in weight
space, with orthonormal axes; BatchNorm statistics are recomputed at each point. Filled contours of
the test loss and of the 0-1 loss, the three networks marked; a plane is kept beside its permuted
network. Draws the first pair of each (network, sparsity, rewind epoch); --all draws every pair.
Writes figures/landscape_*.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyze.lib import repair, style
from analyze.lib.cache import code_digest, kept
from analyze.lib.lines import alignments
from analyze.lib.runs import CELL, SEEDS, parse_root, readable, sparse_runs
from common import checkpoint, cli, paths
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import Resident, Streamed, reader
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device
from common.training import evaluate

MARGIN = 0.25  # of the extent of the three networks, on every side
CORNERS = {"lth": ("π(LTH)", "o"), "permuted": ("permuted", "^"), "dense": ("π(A)", "*")}
PAIR = [*SEEDS, "method", "match_epoch", "tag"]


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
    return directions, (torch.stack([0 * along, along, across]) @ directions.T).numpy()


def grid(points: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """The x and y values of a grid around (x, y) points, with a margin on every side."""
    low, high = points.min(0), points.max(0)
    margin = MARGIN * (high - low)
    xs, ys = np.linspace(low - margin, high + margin, resolution).T
    return xs, ys


def measure(
    model: nn.Module,
    states: list[dict[str, Tensor]],
    data: Resident | Streamed,
    resolution: int,
    images: int,
) -> pd.DataFrame:
    """Test loss in nats and error in percent on the grid, a row a point, and a row a corner.

    `images` test images are evaluated at a point, after as many training images gave the BatchNorm
    statistics.
    """
    names = [name for name, _ in model.named_parameters()]
    vectors = [torch.cat([state[name].flatten() for name in names]) for state in states]
    directions, corners = plane(vectors)
    xs, ys = grid(corners, resolution)
    origin, directions = vectors[0].double().to(data.device), directions.to(data.device)
    model.load_state_dict(states[0])
    test = list(data.eval_batches("test", limit=images))
    calibration = []
    if repair.has_batch_norm(model):
        calibration = [batch for batch, _ in data.eval_batches("train", limit=images)]
    rows = []
    points = [(x, y) for y in ys for x in xs]
    for x, y in tqdm(points, "plane", unit="point", disable=None, leave=False):
        weights = origin + x * directions[0] + y * directions[1]
        nn.utils.vector_to_parameters(weights.float(), model.parameters())
        if calibration:
            repair.recompute_batch_norm(model, calibration)
        loss, accuracy = evaluate(model, test)
        rows.append({"x": x, "y": y, "test_loss": loss, "test_error": 100 - accuracy})
    marks = pd.DataFrame(corners, columns=["x", "y"]).assign(network=[*CORNERS])
    return pd.concat([pd.DataFrame(rows), marks])


def plot(table: pd.DataFrame, title: str) -> style.Figure:
    """Two panels, test loss and 0-1 loss; the rows of `table` that name a network are its marks."""
    marks, table = table[table["network"].notna()], table[table["network"].isna()]
    figure, axes = style.plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
    metrics = {"test_loss": "test loss (nats)", "test_error": "0-1 loss (%)"}
    for axis, (metric, label) in zip(axes, metrics.items()):
        values = table.pivot_table(index="y", columns="x", values=metric)
        # Far from the networks the loss explodes; levels follow the inner part, where they are.
        low, high = values.to_numpy().min(), np.quantile(values.to_numpy(), 0.9)
        high = high if high > low else low + 1  # where nothing was learned it is flat
        levels = style.plt.MaxNLocator(14).tick_values(low, high)
        look = {"cmap": "cividis", "extend": "max"}
        filled = axis.contourf(values.columns, values.index, values.to_numpy(), levels, **look)
        figure.colorbar(filled, ax=axis, label=label, shrink=0.75, ticks=levels[::3])
        for mark in marks.itertuples():
            name, marker = CORNERS[mark.network]
            point = (mark.x, mark.y)
            axis.plot(*point, marker, color="white", markeredgecolor="black", markersize=9)
            words = {"color": "white", "fontweight": "bold", "ha": "center"}
            axis.annotate(name, point, (0, 8), textcoords="offset points", **words)
        axis.grid(False)
        axis.set_aspect("equal")
        axis.set_xlabel("distance along π(LTH) to permuted")
    axes[0].set_ylabel("distance across")
    figure.suptitle(title, fontsize=10)
    return figure


def triples(root: Path) -> list[dict[str, Any]]:
    """Files that belong together: of an lth, a permuted, a dense network, a permutation."""
    runs = sparse_runs(root)
    plain = runs[~runs["signs"] & ~runs["fan_in"]]
    lth = plain.loc[plain["arm"] == "lth", [*CELL, "source_seed", "tag", "path"]]
    lth = lth.drop_duplicates([*CELL, "source_seed", "tag"])
    permuted = plain[(plain["arm"] == "permuted") & plain["match_epoch"].notna()]
    pairs = permuted.merge(lth, on=[*CELL, "source_seed", "tag"], suffixes=("", "_lth"))
    aligned, found = alignments(root), []
    for run in pairs.astype({"match_epoch": int}).to_dict("records"):
        for alignment in aligned:
            same = all(alignment[key] == run[key] for key in [*CELL[:3], *PAIR[:-1]])
            same &= alignment["tag"] in ("", run["tag"].split(" ")[0])
            if same and alignment["sparsity"] in (None, run["sparsity"]):
                files = {
                    "lth": paths.final_file(run["path_lth"]),
                    "permuted": paths.final_file(run["path"]),
                    "dense": alignment["source"],
                    "permutation": alignment["path"],
                }
                about = {key: run[key] for key in [*CELL, *PAIR]}
                found.append(about | files)
    if not found:
        two = f"no permuted network with LTH's beside it below {root}"
        raise UserError(f"{two}: run train_sparse.py for both")
    return found


def table(triple: dict[str, Any], resolution: int, images: int, read: Callable) -> pd.DataFrame:
    """The kept or else measured plane of three networks."""
    keys = ("model", "dataset", "state_dict")
    entries = {name: checkpoint.load(triple[name], keys) for name in CORNERS}
    permutation = checkpoint.load(triple["permutation"], ("permutation",))["permutation"]
    digests = "".join(checkpoint.digest(triple[name])[:4] for name in (*CORNERS, "permutation"))
    made_by = (code_digest(__file__), digests, resolution, images)

    def make() -> pd.DataFrame:
        data = read(entries["permuted"]["dataset"])
        model = build_model(**entries["dense"]["model"])
        model.to(data.device, memory_format=torch.channels_last)
        dims = find_axes(model, data.input_shape).dims
        states = [
            entry["state_dict"]
            if name == "permuted"
            else permute(entry["state_dict"], dims, permutation)
            for name, entry in entries.items()
        ]
        return measure(model, states, data, resolution, images)

    return kept(paths.cache_file(triple["permuted"], "plane", *made_by), make)


def main() -> None:
    parser = parse_root(__doc__)
    add = parser.add_argument
    add("--grid", type=cli.number(int, 3), default=21, help="points a side (default: %(default)s)")
    add(
        "--images", type=cli.positive, default=2000, help="evaluated a point (default: %(default)s)"
    )
    add("--all", action="store_true", help="every pair of seeds, not the first of each cell")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    read, drawn = reader(args.data_dir, pick_device(args.device), args.workers), set()
    for triple in triples(args.root):
        cell = tuple(triple[name] for name in [*CELL, *PAIR[2:]])
        if cell in drawn and not args.all:
            continue
        if (points := readable(table, triple, args.grid, args.images, read)) is None:
            continue
        drawn.add(cell)
        model, width, dataset, sparsity, rewind, source, target, method, epoch, tag = (
            triple[key] for key in [*CELL, *PAIR]
        )
        name = f"landscape_{model}x{width:g}_{dataset}_{method}_s{paths.label(sparsity)}"
        name += f"_k{rewind:03d}_{source}-{target}_matched{epoch}" + f"_{tag}" * bool(tag)
        title = f"{model} x{width:g} on {dataset}, {100 * sparsity:g}% sparse, k = {rewind}"
        title += f", seeds {source} and {target}"
        style.save(plot(points, title), points, args.root / "figures", name)


if __name__ == "__main__":
    cli.run(main)
