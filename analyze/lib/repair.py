"""REPAIR: undo the variance collapse of interpolated networks (Jordan et al. 2023).

Networks with BatchNorm get their statistics recomputed; in others every hidden convolution
or linear layer is rescaled, channel by channel, to the interpolated mean and standard deviation of
the two endpoints.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from common.masking import layer_weights

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# layer -> (mean, standard deviation) of its output, per channel
Statistics = dict[str, tuple[Tensor, Tensor]]


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


@torch.no_grad()
def rescale(model: nn.Module, images: Tensor, goal: Statistics | None = None) -> Statistics:
    """The mean and standard deviation, over images and places, of every hidden layer's output.

    With a `goal` they are brought to it, layer after layer, folded into weights and biases. Raises
    ValueError for a hidden layer without bias. A channel without variance is only shifted.
    """
    measured: Statistics = {}

    def fold(layer: nn.Module, _: object, output: Tensor) -> Tensor | None:
        rows = output.movedim(1, -1).flatten(0, -2)
        deviation, mean = torch.std_mean(rows, 0, correction=0)
        measured[names[layer]] = mean, deviation
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


def interpolate(source: Statistics, target: Statistics, alpha: float) -> Statistics:
    """(1 - alpha) of the source's means and standard deviations plus alpha of the target's."""
    return {
        name: tuple(torch.lerp(a, b, alpha) for a, b in zip(source[name], target[name]))
        for name in source
    }
