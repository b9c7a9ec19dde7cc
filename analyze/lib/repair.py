"""REPAIR: undo the variance collapse of interpolated networks (Jordan et al. 2023).

Networks with BatchNorm get their statistics recomputed; in others every hidden convolution
or linear layer is rescaled, channel by channel, to the interpolated mean and standard deviation of
the two endpoints.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from common.align.axes import trace
from common.masking import LAYERS

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
    graph = trace(model)
    modules = dict(model.named_modules())
    walkers = [fx.Interpreter(graph) for _ in batches]
    for walker, images in zip(walkers, batches):
        walker.args_iter = iter([images])
    layers = [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], LAYERS)
    ]
    measured: Statistics = {}
    for node in graph.graph.nodes:
        for walker in walkers:
            walker.env[node] = walker.run_node(node)
        if node in layers[:-1]:  # all but the output
            outputs = [walker.env[node] for walker in walkers]
            mean, deviation = _moments(outputs)
            measured[node.target] = (mean, deviation)
            if goal is not None:
                scale = torch.where(deviation > 0, goal[node.target][1] / deviation, 1.0)
                shift = goal[node.target][0] - mean * scale
                layer = modules[node.target]
                if layer.bias is None:
                    raise ValueError(f"{node.target} has no bias to fold the mean into")
                layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
                layer.bias.mul_(scale).add_(shift)
                shape = (1, -1, *[1] * (outputs[0].dim() - 2))
                for walker in walkers:
                    walker.env[node] = walker.env[node] * scale.view(shape) + shift.view(shape)
        for dead in walkers[0].user_to_last_uses.get(node, ()):
            for walker in walkers:
                del walker.env[dead]
    return measured


def _moments(outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of (N, C, ...) tensors, in float64, two passes."""
    rows = [output.movedim(1, -1).flatten(0, -2) for output in outputs]
    count = sum(len(row) for row in rows)
    mean = sum(row.sum(0, dtype=torch.float64) for row in rows) / count
    variance = sum((row - mean).square().sum(0) for row in rows) / count
    return mean.to(rows[0].dtype), variance.sqrt().to(rows[0].dtype)
