"""The line between two networks in weight space: metrics, barriers, REPAIR, cached curves.

REPAIR undoes the variance collapse of interpolated networks (Jordan et al. 2023). BatchNorm
statistics are recomputed; in networks without BatchNorm every hidden convolution or linear layer is
rescaled, channel by channel, to the interpolated mean and standard deviation of the two endpoints.
"""

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from analyze.lib.runs import try_read
from common import checkpoint, provenance
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import Batches, Resident, Streamed
from common.errors import UserError
from common.masking import layer_weights
from common.models import build_model
from common.training import evaluate

BATCH = 250  # images, on every device: BatchNorm statistics are means over batches
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def barriers(curves: pd.DataFrame, keys: Iterable[str] = ()) -> pd.DataFrame:
    """Return the barriers of each curve, a row per value of `keys` and `repair`.

    A barrier is the largest excess over the line between the two endpoints (paper, equation 3):
    `test` and `train` in loss (nats), `error` in test error (percent).
    """
    metrics = {"test": curves["test_loss"], "train": curves["train_loss"]}
    metrics["error"] = 100 - curves["test_acc"]

    def barrier(curve: pd.DataFrame) -> pd.Series:
        values, alpha = curve[[*metrics]], curve["alpha"]
        line = np.outer(1 - alpha, values.iloc[0]) + np.outer(alpha, values.iloc[-1])
        return (values - line).max(skipna=False)

    groups = curves.assign(**metrics).groupby([*keys, "repair"], dropna=False)
    return groups[["alpha", *metrics]].apply(barrier).reset_index()


def interpolate(
    source: dict[str, Tensor], target: dict[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Return (1 - alpha) source + alpha target for each tensor; integer buffers of the target."""
    return {
        name: torch.lerp(source[name], value, alpha) if value.is_floating_point() else value
        for name, value in target.items()
    }


def evaluate_line(
    model: nn.Module,
    source: dict[str, Tensor],
    target: dict[str, Tensor],
    alphas: Iterable[float],
    test: Callable[[], Batches],
    train: Callable[[], Batches],
) -> list[dict[str, Any]]:
    """Return loss (nats) and accuracy (percent) at every alpha, with and without REPAIR.

    The endpoints without REPAIR have the metrics of their runs. `test` and `train` return a new
    iterator at every call, so that only one batch is in memory. REPAIR uses the images of `train`;
    without BatchNorm it holds a layer's output for all of them (0.5 MB per image for VGG11 at
    32 px).
    """
    batch_norm = any(isinstance(module, BATCH_NORMS) for module in model.modules())
    if not batch_norm:
        images, endpoints = torch.cat([batch for batch, _ in train()]), []
        for state in (source, target):
            model.load_state_dict(state)
            endpoints.append(rescale(model, images))
    rows = []
    for alpha in tqdm(alphas, "interpolating", unit="point", disable=None, leave=False):
        model.load_state_dict(interpolate(source, target, float(alpha)))
        for repaired in (False, True):
            if repaired and batch_norm:
                update_bn(train(), model)
            elif repaired:
                rescale(model, images, interpolate(*endpoints, float(alpha)))
            row = {"alpha": alpha, "repair": repaired}
            for split, batches in (("test", test), ("train", train)):
                row[f"{split}_loss"], row[f"{split}_acc"] = evaluate(model, batches())
            rows.append(row)
    return rows


def load_network(entry: dict[str, Any], data: Resident | Streamed) -> nn.Module:
    """Build the network of a loaded checkpoint with its weights, on the device of the data."""
    model = build_model(**entry["model"])
    model.load_state_dict(entry["state_dict"])
    return model.to(data.device, memory_format=torch.channels_last)


def cached(
    script: str, kind: str, files: list[Path], settings: tuple, compute: Callable
) -> pd.DataFrame:
    """Return the table that `compute` makes from `files`, cached as a CSV beside the last file.

    The name of the cache has the settings and the digests of `files` and of the code of `script`
    and this module. Raises UserError when a file is missing.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    digests = [*map(provenance.code_digest, (script, __file__)), *map(checkpoint.digest, files)]
    parts = kind, files[-1].stem, *(digest[:8] for digest in digests), *settings
    path = files[-1].with_name("_".join(map(str, parts)) + ".csv")
    if not path.is_file():
        checkpoint.save_text(compute().to_csv(index=False), path)
    return pd.read_csv(path)


def measure_curve(files: list[Path], points: int, images: int, load_data: Callable) -> pd.DataFrame:
    """Return the metrics on the line from source to target, on all test images; cached.

    `files` are the source, its permutation, if there is one, and the target. REPAIR uses `images`
    training images.
    """

    def compute() -> pd.DataFrame:
        endpoints = files[0], files[-1]
        source, target = (checkpoint.load(file, checkpoint.WEIGHTS) for file in endpoints)
        data = load_data(target["dataset"])
        model = load_network(target, data)
        state = source["state_dict"]
        for file in files[1:-1]:
            permutation = checkpoint.load(file, ("permutation",))["permutation"]
            state = permute(state, find_axes(model, data.input_shape).dims, permutation)

        alphas, test = np.linspace(0, 1, points), partial(data.eval_batches, "test", BATCH)
        train = partial(data.eval_batches, "train", BATCH, images)
        rows = evaluate_line(model, state, target["state_dict"], alphas, test, train)
        return pd.DataFrame(rows).assign(images=images)

    return cached(__file__, "line", files, (points, images), compute)


def with_files(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Add `files`, a list of the paths in `columns`, to each row, for `measure_curve`."""
    return table.assign(files=table[[*columns]].to_numpy().tolist())


def measure_curves(lines: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """Measure the curves of all `lines`; the other columns are copied to every point of a curve.

    A row of `lines` has `files` for `measure_curve`; `args` are from `networks.parse_args`. Prints
    one line for files that cannot be read and skips them. Raises UserError when no curve is left.
    """
    curves = []
    for line in tqdm(lines.to_dict("records"), "lines", unit="line", disable=None):
        curve = try_read(measure_curve, line.pop("files"), args.points, args.images, args.load_data)
        if curve is not None:
            curves.append(curve.assign(**line))
    if not curves:
        raise UserError(f"no line below {args.root} could be measured (see above)")
    return pd.concat(curves, ignore_index=True)


@torch.no_grad()
def rescale(
    model: nn.Module, images: Tensor, goal: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return mean and std, over images and positions, of the output of every hidden layer.

    The statistics are (2, channels) tensors by layer name. With a `goal` of the same form, each
    layer in turn is rescaled to it by changing weights and bias; a channel without variance is only
    shifted. Raises ValueError for a hidden layer without bias.
    """
    statistics = {}

    def hook(layer: nn.Module, _: object, output: Tensor) -> Tensor | None:
        rows = output.movedim(1, -1).flatten(0, -2)
        std, mean = torch.std_mean(rows, 0, correction=0)
        statistics[names[layer]] = torch.stack([mean, std])
        if goal is None or names[layer] not in goal:
            return None
        goal_mean, goal_std = goal[names[layer]]
        scale = torch.where(std > 0, goal_std / std, 1.0)
        shift = goal_mean - mean * scale
        if layer.bias is None:
            raise ValueError(f"{names[layer]} has no bias to absorb the shift of the mean")
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.mul_(scale).add_(shift)
        shape = (-1, *[1] * (output.dim() - 2))
        return output.mul_(scale.view(shape)).add_(shift.view(shape))

    layers = [name.removesuffix(".weight") for name in layer_weights(model)]
    names = {model.get_submodule(name): name for name in layers}
    handles = [layer.register_forward_hook(hook) for layer in names]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    statistics.popitem()  # the output layer
    return statistics
