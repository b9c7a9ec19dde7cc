"""The line between two networks in weight space: metrics along it, its barrier, kept curves."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyze.lib import cache, networks, repair
from common import checkpoint
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import Batches
from common.training import evaluate

BATCH = 250  # images at a time on every device: statistics of BatchNorm are means over batches


def barrier(losses: np.ndarray, alphas: np.ndarray) -> float:
    """The largest excess over the line between the first loss and the last (paper, equation 3)."""
    return float((losses - ((1 - alphas) * losses[0] + alphas * losses[-1])).max())


def barriers(curves: pd.DataFrame, keys: Iterable[str] = ()) -> pd.DataFrame:
    """A row a curve, which `keys` and `repair` tell apart: its barriers.

    In test loss and training loss in nats, `test` and `train`, and in test error in percent.
    """
    metrics = {"test": curves["test_loss"], "train": curves["train_loss"]}
    metrics["error"] = 100 - curves["test_acc"]

    def of_one(curve: pd.DataFrame) -> pd.Series:
        alphas = curve["alpha"].to_numpy()
        return curve[[*metrics]].apply(lambda metric: barrier(metric.to_numpy(), alphas))

    groups = curves.assign(**metrics).groupby([*keys, "repair"], dropna=False)
    return groups[["alpha", *metrics]].apply(of_one).reset_index()


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
        images, endpoints = torch.cat([batch for batch, _ in train()]), []
        for state in (source, target):
            model.load_state_dict(state)
            endpoints.append(repair.rescale(model, images))
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


def curve_file(files: list[Path], points: int | str, images: int | str) -> Path:
    """Where the curve of a line is kept; `files` as `curve` takes them."""
    return cache.place(__file__, "line", files, points, images)


def curve(files: list[Path], points: int, images: int, read: Callable) -> pd.DataFrame:
    """The curve from source to target, kept or else measured on all test images.

    `files` hold the source, a permutation of it where there is one, and the target; `images` of
    the training set are for REPAIR.
    """

    def make() -> pd.DataFrame:
        ends = files[0], files[-1]
        source, target = (checkpoint.load(file, checkpoint.WEIGHTS) for file in ends)
        data = read(target["dataset"])
        model = networks.build(target, data)
        state = source["state_dict"]
        for file in files[1:-1]:
            permutation = checkpoint.load(file, ("permutation",))["permutation"]
            state = permute(state, find_axes(model, data.input_shape).dims, permutation)

        alphas, test = np.linspace(0, 1, points), partial(data.eval_batches, "test", BATCH)
        train = partial(data.eval_batches, "train", BATCH, images)
        rows = metrics_along(model, state, target["state_dict"], alphas, test, train)
        return pd.DataFrame(rows).assign(images=images)

    return cache.kept(curve_file(files, points, images), make)


def kept_barriers(files: list[Path]) -> dict[str, float]:
    """The barriers in test loss of the kept curve of most points, and then of most images."""
    pattern = curve_file(files, "*", "*")
    curves = [pd.read_csv(path) for path in pattern.parent.glob(pattern.name)]
    if not curves:
        return {}
    finest = max(curves, key=lambda curve: (len(curve), curve["images"].iloc[0]))
    found = barriers(finest).set_index("repair")["test"]
    return found.rename({False: "barrier", True: "barrier, REPAIR"}).to_dict()
