"""The loss over the plane through three networks: `python -m analyze.landscape runs/quick` (Figure 4b).

For every pair of seeds, sparsity and rewind epoch that has an LTH and a permuted network: π(LTH), the permuted
network, and π(A), the dense source, all in the frame of B. The plane lies in weight space, with orthonormal axes;
BatchNorm statistics are recomputed at each point. Filled contours of the test loss and of the 0-1 loss, the three
networks marked; a plane is kept beside its permuted network. Draws the first pair of each (network, sparsity, rewind epoch); --all draws every pair. Writes
figures/landscape_*.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyze import repair, style
from analyze.interpolation import alignments
from analyze.results import CELL, parse_root, readable, sparse_runs
from common import checkpoint, cli
from common.axes import find_axes
from common.data import Resident, Streamed, reader
from common.errors import UserError
from common.models import build_model
from common.permutation import permute
from common.training import evaluate, pick_device

MARGIN = 0.25  # of the extent of the three networks, on every side


def plane(corners: list[Tensor]) -> tuple[Tensor, np.ndarray]:
    """Two orthonormal directions of the plane through three weight vectors, and the corners' (x, y) on it.

    The first corner is the origin and the second lies on the x axis (Gram-Schmidt). Raises ValueError when the three
    lie on one line.
    """
    origin, second, third = (corner.double() for corner in corners)
    along, across = second - origin, third - origin
    x = along / along.norm()
    rest = across - (across @ x) * x
    if not rest.norm() > 1e-9 * across.norm():
        raise ValueError("the three networks lie on one line")
    y = rest / rest.norm()
    directions = torch.stack([x, y])
    return directions, np.array([[0, 0], (directions @ along).tolist(), (directions @ across).tolist()])


def grid(points: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """The x and y values of a grid around (x, y) points, with a margin on every side."""
    low, high = points.min(0), points.max(0)
    margin = MARGIN * (high - low)
    xs, ys = (np.linspace(a, b, resolution) for a, b in zip(low - margin, high + margin))
    return xs, ys


def flatten(state: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([state[name].flatten() for name in names])


def measure(model: nn.Module, states: list[dict[str, Tensor]], data: Resident | Streamed, resolution: int, images: int, precision: str = "fp32") -> tuple[pd.DataFrame, np.ndarray]:  # fmt: skip
    """Test loss in nats and error in percent on the grid, a row a point; and the corners' (x, y).

    `images` test images are evaluated at each point, after as many training images gave the BN statistics.
    """
    names = [name for name, _ in model.named_parameters()]
    directions, corners = plane([flatten(state, names) for state in states])
    origin, along_x, along_y = (part.to(data.device) for part in (flatten(states[0], names).double(), *directions))
    xs, ys = grid(corners, resolution)
    model.load_state_dict(states[0])
    test = list(data.eval_batches("test", limit=images))
    calibration = (
        [batch for batch, _ in data.eval_batches("train", limit=images)] if repair.has_batch_norm(model) else []
    )
    rows = []
    for x, y in tqdm([(x, y) for y in ys for x in xs], "plane", unit="point", disable=None, leave=False):
        nn.utils.vector_to_parameters((origin + x * along_x + y * along_y).float(), model.parameters())
        if calibration:
            repair.recompute_batch_norm(model, calibration, precision)
        loss, accuracy = evaluate(model, test, precision)
        rows.append({"x": x, "y": y, "test_loss": loss, "test_error": 100 - accuracy})
    return pd.DataFrame(rows), corners


def plot(table: pd.DataFrame, title: str) -> style.Figure:
    """Two panels, test loss and 0-1 loss; the rows of `table` that name a network are its marks."""
    corners = table.loc[table["network"].notna(), ["x", "y"]].to_numpy()
    table = table[table["network"].isna()]
    figure, axes = style.plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
    for axis, metric, label in zip(axes, ("test_loss", "test_error"), ("test loss (nats)", "0-1 loss (%)")):
        values = table.pivot_table(index="y", columns="x", values=metric)
        # Far from the networks the loss explodes; levels follow the inner part, where they are.
        low, high = values.to_numpy().min(), np.quantile(values.to_numpy(), 0.9)
        levels = style.plt.MaxNLocator(14).tick_values(
            low, high if high > low else low + 1
        )  # where nothing was learned it is flat
        filled = axis.contourf(values.columns, values.index, values.to_numpy(), levels, cmap="cividis", extend="max")
        figure.colorbar(filled, ax=axis, label=label, shrink=0.75, ticks=levels[::3])
        for (x, y), name, marker in zip(corners, ("π(LTH)", "permuted", "π(A)"), ("o", "^", "*")):
            axis.plot(x, y, marker, color="white", markeredgecolor="black", markersize=9)
            axis.annotate(
                name, (x, y), (0, 8), textcoords="offset points", color="white", fontweight="bold", ha="center"
            )
        axis.grid(False)
        axis.set_aspect("equal")
        axis.set_xlabel("distance along π(LTH) to permuted")
    axes[0].set_ylabel("distance across")
    figure.suptitle(title, fontsize=10)
    return figure


def triples(root: Path) -> list[dict[str, Any]]:
    """The files of every triple of networks below `root`: lth, permuted, the dense source, and the permutation."""
    runs = sparse_runs(root)
    plain = runs[~runs["signs"] & ~runs["fan_in"]]
    aligned, found = alignments(root), []
    for run in plain[plain["arm"] == "permuted"].itertuples():
        cell = {name: getattr(run, name) for name in CELL}
        own = plain[(plain["arm"] == "lth") & (plain["source_seed"] == run.source_seed)]
        own = own[(own[CELL] == pd.Series(cell)).all(axis=1)]
        for alignment in aligned:
            method, _, sparsity = alignment["method"].partition("_")
            keys = (*CELL[:3], "source_seed", "target_seed", "match_epoch")
            same = method == run.method and all(alignment[key] == getattr(run, key) for key in keys)
            if len(own) and same and sparsity in ("", checkpoint.label(run.sparsity)):
                seeds = {
                    "source_seed": run.source_seed,
                    "target_seed": run.target_seed,
                    "method": run.method,
                    "match_epoch": int(run.match_epoch),
                }
                files = {"lth": Path(own["path"].iloc[0]) / "final.pt", "permuted": Path(run.path) / "final.pt"}
                more = {
                    "dense": alignment["source"],
                    "permutation": alignment["path"],
                    "precision": alignment["precision"],
                }
                found.append(cell | seeds | files | more)
    if not found:
        raise UserError(f"no permuted network with LTH's beside it below {root}: run train_sparse.py for both")
    return found


def main() -> None:
    parser = parse_root(__doc__)
    parser.add_argument("--grid", type=cli.number(int, 3), default=21, help="points a side (default: %(default)s)")
    parser.add_argument("--images", type=cli.positive, default=2000, help="evaluated a point (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every pair of seeds, not the first of each cell")
    cli.add_device(parser)
    cli.add_data(parser)
    args = parser.parse_args()
    device = pick_device(args.device)
    read, drawn = reader(args.data_dir, device, args.workers), set()
    for triple in triples(args.root):
        cell = tuple(triple[name] for name in [*CELL, "method", "match_epoch"])
        if cell in drawn and not args.all:
            continue
        entries = {
            name: readable(checkpoint.load, triple[name], ("model", "dataset", "state_dict"))
            for name in ("lth", "permuted", "dense")
        }
        found = readable(checkpoint.load, triple["permutation"], ("permutation",))
        if None in (*entries.values(), found):
            continue
        drawn.add(cell)
        data = read(entries["permuted"]["dataset"])
        model = build_model(**entries["dense"]["model"]).to(device, memory_format=torch.channels_last)
        axes = find_axes(model, data.input_shape)
        moved = {
            name: permute(entries[name]["state_dict"], axes.dims, found["permutation"]) for name in ("lth", "dense")
        }
        states = [moved["lth"], entries["permuted"]["state_dict"], moved["dense"]]
        files = "".join(checkpoint.digest(triple[name])[:4] for name in ("lth", "permuted", "dense", "permutation"))
        settings = f"{args.grid}_{args.images}_{triple['precision']}"
        cache = triple["permuted"].with_name(f"plane_{repair.MIXED}_{files}_{settings}.csv")
        if not cache.is_file():
            table, corners = measure(model, states, data, args.grid, args.images, triple["precision"])
            marks = pd.DataFrame(corners, columns=["x", "y"]).assign(network=["lth", "permuted", "dense"])
            checkpoint.save_text(pd.concat([table, marks]).to_csv(index=False), cache)
        table = pd.read_csv(cache)
        name = f"{triple['model']}x{triple['width']:g}_{triple['dataset']}_{triple['method']}_s{checkpoint.label(triple['sparsity'])}_k{triple['rewind']:03d}"
        name += f"_{triple['source_seed']}-{triple['target_seed']}_matched{triple['match_epoch']}"
        title = f"{triple['model']} x{triple['width']:g} on {triple['dataset']}, {100 * triple['sparsity']:g}% sparse, k = {triple['rewind']}, seeds {triple['source_seed']} and {triple['target_seed']}"
        style.save(plot(table, title), table, args.root / "figures", f"landscape_{name}")


if __name__ == "__main__":
    cli.run(main)
