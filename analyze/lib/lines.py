"""The line between two networks in weight space: metrics along it, its barrier, kept curves."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyze.lib import repair
from analyze.lib.cache import code_digest, kept
from analyze.lib.runs import NETWORK, dense_files, find_results, skipped
from common import checkpoint, paths
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import Batches, Resident, Streamed
from common.errors import UserError
from common.models import build_model
from common.training import evaluate


def barrier(losses: np.ndarray, alphas: np.ndarray) -> float:
    """The largest excess over the line between the first loss and the last (paper, equation 3)."""
    return float((losses - ((1 - alphas) * losses[0] + alphas * losses[-1])).max())


def interpolate(
    source: dict[str, Tensor], target: dict[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """The state dict (1 - alpha) source + alpha target; integer buffers are the target's."""
    return {
        name: torch.lerp(source[name], value, alpha) if value.is_floating_point() else value
        for name, value in target.items()
    }


def metrics_along(
    model: nn.Module,
    source: dict[str, Tensor],
    target: dict[str, Tensor],
    alphas: Iterable[float],
    test: Callable[[], Batches],
    train: Callable[[], Batches],
) -> list[dict[str, Any]]:
    """Loss in nats and accuracy in percent at every alpha, with and without REPAIR by `train`.

    The two networks have the metrics of their runs. `test` and `train` start over at every call,
    so that no more than a batch of a large set is in memory.
    """
    batch_norm = repair.has_batch_norm(model)
    if not batch_norm:
        images, endpoints = [batch for batch, _ in train()], []
        for state in (source, target):
            model.load_state_dict(state)
            endpoints.append(repair.statistics(model, images))
    rows = []
    for alpha in tqdm(alphas, "interpolating", unit="point", disable=None, leave=False):
        model.load_state_dict(interpolate(source, target, float(alpha)))
        for repaired in (False, True):
            if repaired and batch_norm:
                repair.recompute_batch_norm(model, (batch for batch, _ in train()))
            elif repaired:
                repair.rescale(model, images, repair.interpolate(*endpoints, float(alpha)))
            row = {"alpha": alpha, "repair": repaired}
            for split, batches in (("test", test), ("train", train)):
                row[f"{split}_loss"], row[f"{split}_acc"] = evaluate(model, batches())
            rows.append(row)
    return rows


def measure(
    source: dict[str, Any],
    target: dict[str, Any],
    permutation: dict[str, Tensor],
    data: Resident | Streamed,
    points: int,
    images: int,
) -> pd.DataFrame:
    """The curve from the permuted source to the target, both checkpoints; `images` for REPAIR."""
    model = build_model(**target["model"]).to(data.device, memory_format=torch.channels_last)
    dims = find_axes(model, data.input_shape).dims
    weights = permute(source["state_dict"], dims, permutation), target["state_dict"]

    def train() -> Batches:
        return data.eval_batches("train", limit=images)

    alphas = np.linspace(0, 1, points)
    rows = metrics_along(model, *weights, alphas, data.eval_batches, train)
    return pd.DataFrame(rows).assign(images=images)


def alignments(root: Path) -> list[dict[str, Any]]:
    """Every permutation of dense runs below `root`: its files and how it was made.

    `sparsity` is that of the masks it is for, None for all. One whose dense runs are not below
    `root` is skipped. Raises UserError when there is none.
    """
    dense = dense_files(root)
    found = []
    for run in find_results(root, "align_mask"):
        arguments = run.get("arguments", {})
        if not isinstance(arguments.get("source_seed"), int):
            continue  # of networks trained elsewhere, whose module is not known here
        missing = [role for role in ("source", "target") if arguments.get(role) not in dense]
        if missing:
            skipped(f"{run['folder']}: its dense {missing[0]} is not below {root}")
            continue
        files = {role: dense[arguments[role]] for role in ("source", "target")}
        target = checkpoint.load_json(files["target"].with_name("result.json"))
        about = {name: target["arguments"][name] for name in NETWORK}
        tag = arguments.get("tag") or target["arguments"].get("tag") or ""
        about |= {"tag": tag}
        keys = ("method", "source_seed", "target_seed", "match_epoch")
        about |= {name: arguments[name] for name in keys}
        found += [
            about | files | {"path": path, "sparsity": paths.sparsity_of(path)}
            for path in paths.permutation_files(run["folder"])
        ]
    if not found:
        raise UserError(f"no finished alignment below {root}: run align_mask.py first")
    return found


def curve_file(run: dict[str, Any], kind: str, points: int | str, images: int | str) -> Path:
    """Where a curve of an alignment is kept; the `naive` one serves all permutations of A."""
    end = (points, images)
    if kind == "naive":
        files = [checkpoint.digest(run[role])[:8] for role in ("source", "target")]
        return paths.cache_file(run["target"], "line", code_digest(__file__), *files, *end)
    file = checkpoint.digest(run["path"])[:8]
    return paths.cache_file(run["path"], "line", code_digest(__file__), file, *end)


def curve(run: dict[str, Any], kind: str, points: int, images: int, read: Callable) -> pd.DataFrame:
    """The curve from A (`naive`) or π(A) (`aligned`) to B: kept, or measured now."""

    def make() -> pd.DataFrame:
        source, target = (
            checkpoint.load(run[role], checkpoint.WEIGHTS) for role in ("source", "target")
        )
        aligned = kind == "aligned"
        moved = checkpoint.load(run["path"], ("permutation",))["permutation"] if aligned else {}
        data = read(target["dataset"])
        return measure(source, target, moved, data, points, images)

    return kept(curve_file(run, kind, points, images), make)


def kept_barriers(run: dict[str, Any], kind: str) -> dict[str, float]:
    """The barriers in test loss of the kept curve of most points, and then of most images."""
    pattern = curve_file(run, kind, "*", "*")
    curves = [pd.read_csv(path) for path in sorted(pattern.parent.glob(pattern.name))]
    if not curves:
        return {}
    finest = max(curves, key=lambda curve: (len(curve), curve["images"].iloc[0]))
    return {
        "barrier, REPAIR" if repaired else "barrier": barrier(
            rows["test_loss"].to_numpy(), rows["alpha"].to_numpy()
        )
        for repaired, rows in finest.groupby("repair")
    }
