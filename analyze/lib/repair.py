"""REPAIR: undo the variance collapse of interpolated networks (Jordan et al. 2023).

Networks with BatchNorm get their statistics recomputed; in others every hidden convolution
or linear layer is rescaled, channel by channel, to the interpolated mean and standard deviation of
the two endpoints.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.align.graph import export, lockstep
from common.masking import layer_weights

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Statistics = dict[
    str, tuple[Tensor, Tensor]
]  # layer -> (mean, standard deviation) of its output, per channel


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, BATCH_NORMS) for module in model.modules())


@torch.no_grad()
def recompute_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Reset the BatchNorm statistics; recompute them as the cumulative average over `batches`.

    The batches must mix the classes: within one class activations vary less.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # cumulative average
    model.train()
    for images in batches:
        model(images)
    model.eval()
    for module, momentum in zip(norms, momenta):
        module.momentum = momentum


def statistics(model: nn.Module, batches: list[Tensor]) -> Statistics:
    """Mean and standard deviation, over images and places, of every hidden layer's output."""
    return _walk(model, batches, None)


def rescale(model: nn.Module, batches: list[Tensor], goal: Statistics) -> None:
    """Bring those statistics to `goal`, layer after layer, folded into weights and biases.

    Raises ValueError for a hidden layer without bias. A channel without variance is only shifted.
    """
    _walk(model, batches, goal)


def interpolate(source: Statistics, target: Statistics, alpha: float) -> Statistics:
    """(1 - alpha) of the source's means and standard deviations plus alpha of the target's."""
    return {
        name: tuple(torch.lerp(a, b, alpha) for a, b in zip(source[name], target[name]))
        for name in source
    }


@torch.no_grad()
def _walk(model: nn.Module, batches: list[Tensor], goal: Statistics | None) -> Statistics:
    """Run all batches through the graph at once, a layer after those before it are rescaled."""
    state = model.state_dict()
    graphs = {shape: export(model, shape) for shape in {images.shape for images in batches}}
    runs = [graphs[images.shape].start(state, images) for images in batches]
    graph = graphs[batches[0].shape]
    names = dict(zip(graph.module.graph.nodes, graph.inputs))
    weights = layer_weights(model)
    found = {
        node: names[one].removesuffix(".weight")
        for node in graph.module.graph.nodes
        for one in node.all_input_nodes
        if names.get(one) in weights
    }
    *hidden, _ = found  # all but the output
    measured: Statistics = {}
    for nodes in lockstep(runs):
        if nodes[0] not in hidden:
            continue
        name = found[nodes[0]]
        outputs = [run.env[node] for run, node in zip(runs, nodes)]
        measured[name] = mean, deviation = _moments(outputs)
        if goal is None:
            continue
        scale = torch.where(deviation > 0, goal[name][1] / deviation, 1.0)
        shift = goal[name][0] - mean * scale
        if f"{name}.bias" not in state:
            raise ValueError(f"{name} has no bias to fold the mean into")
        weight = state[f"{name}.weight"]
        weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
        state[f"{name}.bias"].mul_(scale).add_(shift)
        shape = (1, -1, *[1] * (outputs[0].dim() - 2))
        for output in outputs:
            output.mul_(scale.view(shape)).add_(shift.view(shape))
    return measured


def _moments(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of (N, C, ...) tensors, in float64, two passes."""
    rows = [output.movedim(1, -1).flatten(0, -2) for output in outputs]
    count = sum(len(row) for row in rows)
    mean = sum(row.sum(0, dtype=torch.float64) for row in rows) / count
    variance = sum((row - mean).square().sum(0) for row in rows) / count
    return mean.to(rows[0].dtype), variance.sqrt().to(rows[0].dtype)
