"""The line between two networks in weight space: metrics along it, barriers, REPAIR, kept curves.

REPAIR undoes the variance collapse of interpolated networks (Jordan et al. 2023). Networks with
BatchNorm get their statistics recomputed; in others every hidden convolution or linear layer is
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

from analyze.lib.runs import readable
from common import checkpoint, provenance
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import Batches, Resident, Streamed
from common.errors import UserError
from common.masking import layer_weights
from common.models import build_model
from common.training import evaluate

BATCH = 250  # images at a time on every device: statistics of BatchNorm are means over batches
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def barriers(curves: pd.DataFrame, keys: Iterable[str] = ()) -> pd.DataFrame:
    """A row a curve, which `keys` and `repair` tell apart: its barriers.

    In test loss and training loss in nats, `test` and `train`, and in test error in percent: the
    largest excess over the line between the two ends (paper, equation 3).
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
    """(1 - alpha) source + alpha target, tensor by tensor; integer buffers are the target's."""
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
    so that no more than a batch of a large set is in memory; but without BatchNorm REPAIR holds a
    layer's values for all of `train` (0.5 MB an image of VGG11 at 32 px).
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


def build(entry: dict[str, Any], data: Resident | Streamed) -> nn.Module:
    """The network of a checkpoint, with its weights, where the data are."""
    model = build_model(**entry["model"])
    model.load_state_dict(entry["state_dict"])
    return model.to(data.device, memory_format=torch.channels_last)


def kept(
    script: str, kind: str, files: list[Path], settings: tuple, make: Callable
) -> pd.DataFrame:
    """The table that `make` computes of `files`, or that an earlier call left beside the last one.

    Its name has the digests of the code of `script` and of this file, and of all `files`, and the
    settings. Raises UserError when a file is missing.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    digests = [*map(provenance.code_digest, (script, __file__)), *map(checkpoint.digest, files)]
    parts = kind, files[-1].stem, *(digest[:8] for digest in digests), *settings
    path = files[-1].with_name("_".join(map(str, parts)) + ".csv")
    if not path.is_file():
        checkpoint.save_text(make().to_csv(index=False), path)
    return pd.read_csv(path)


def curve(files: list[Path], points: int, images: int, read: Callable) -> pd.DataFrame:
    """The curve from source to target, kept or else measured on all test images.

    `files` hold the source, a permutation of it where there is one, and the target; `images` of
    the training set are for REPAIR.
    """

    def make() -> pd.DataFrame:
        ends = files[0], files[-1]
        source, target = (checkpoint.load(file, checkpoint.WEIGHTS) for file in ends)
        data = read(target["dataset"])
        model = build(target, data)
        state = source["state_dict"]
        for file in files[1:-1]:
            permutation = checkpoint.load(file, ("permutation",))["permutation"]
            state = permute(state, find_axes(model, data.input_shape).dims, permutation)

        alphas, test = np.linspace(0, 1, points), partial(data.eval_batches, "test", BATCH)
        train = partial(data.eval_batches, "train", BATCH, images)
        rows = metrics_along(model, state, target["state_dict"], alphas, test, train)
        return pd.DataFrame(rows).assign(images=images)

    return kept(__file__, "line", files, (points, images), make)


def along(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows of `table` with the `files` of a line, for `curve`, from some of its columns."""
    return table.assign(files=table[[*columns]].to_numpy().tolist())


def curves(lines: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """The curves of all `lines`, a row each: its `files` for `curve`, and what to say of it.

    `args` are from `networks.arguments`. A line that cannot be read is skipped with one line;
    raises UserError when none is left.
    """
    found = []
    for line in tqdm(lines.to_dict("records"), "lines", unit="line", disable=None):
        measured = readable(curve, line.pop("files"), args.points, args.images, args.read)
        if measured is not None:
            found.append(measured.assign(**line))
    if not found:
        raise UserError(f"no line below {args.root} could be measured (see above)")
    return pd.concat(found, ignore_index=True)


@torch.no_grad()
def rescale(
    model: nn.Module, images: Tensor, goal: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The mean and standard deviation, over images and places, of every hidden layer's output.

    By layer, (2, channels). With a `goal` they are brought to it, layer after layer, folded into
    weights and biases; a channel without variance is only shifted. Raises ValueError for a hidden
    layer without bias.
    """
    measured = {}

    def fold(layer: nn.Module, _: object, output: Tensor) -> Tensor | None:
        rows = output.movedim(1, -1).flatten(0, -2)
        deviation, mean = torch.std_mean(rows, 0, correction=0)
        measured[names[layer]] = torch.stack([mean, deviation])
        if goal is None or names[layer] not in goal:
            return None
        wanted_mean, wanted = goal[names[layer]]
        scale = torch.where(deviation > 0, wanted / deviation, 1.0)
        shift = wanted_mean - mean * scale
        if layer.bias is None:
            raise ValueError(f"{names[layer]} has no bias to fold the mean into")
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.mul_(scale).add_(shift)
        shape = (-1, *[1] * (output.dim() - 2))
        return output.mul_(scale.view(shape)).add_(shift.view(shape))

    layers = [name.removesuffix(".weight") for name in layer_weights(model)]
    names = {model.get_submodule(name): name for name in layers}
    hooks = [layer.register_forward_hook(fold) for layer in names]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    measured.popitem()  # of the output
    return measured
