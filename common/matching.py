"""Finding the permutation that maps the source network onto the target (paper, section 4.1)."""

import copy

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn

from common.permutation import Axes, trace


class Moments:
    """Streaming correlation of the channels of two tensors: batches in fp32, totals in float64.

    Values are shifted by the mean of the first batch, so that large means do not swallow small variances.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, target: Tensor, source: Tensor) -> None:
        """Take in two (samples, channels) tensors of one batch."""
        if self.count == 0:
            self.shifts = target.mean(0), source.mean(0)
            self.sums = [torch.zeros(t.shape[1], dtype=torch.float64, device=t.device) for t in (target, source)]
            self.squares = [total.clone() for total in self.sums]
            self.products = self.sums[0][:, None] * self.sums[1][None, :]
        pair = [t - shift for t, shift in zip((target, source), self.shifts)]
        for values, total, square in zip(pair, self.sums, self.squares):
            total += values.sum(0)
            square += values.square().sum(0)
        self.products += pair[0].T @ pair[1]
        self.count += len(target)

    def correlation(self) -> Tensor:
        """The (target channels, source channels) correlation; a channel of zero variance correlates 0 with everything."""
        means = [total / self.count for total in self.sums]
        covariance = self.products / self.count - means[0][:, None] * means[1][None, :]
        deviations = []
        for mean, square in zip(means, self.squares):
            second = square / self.count
            variance = second - mean.square()
            # Below fp32's resolution of the sums a variance is rounding, not signal.
            deviations.append(torch.where(variance > 1e-7 * second, variance, 0).sqrt())
        scale = deviations[0][:, None] * deviations[1][None, :]
        return torch.where(scale > 0, covariance / scale, 0).clamp(-1, 1).cpu()


@torch.no_grad()
def correlations(source: nn.Module, target: nn.Module, axes: Axes, batches) -> dict[str, Tensor]:
    """Correlate the channels of every axis in one pass over `batches` of images, in fp32 and evaluation mode.

    Returns a (target channels, source channels) float64 matrix for each axis. One pass is enough: a permuted
    network computes the same function, so permuting early channels changes no later channel's values.
    """
    # Copies, because tracing sets evaluation mode and fp32 must hold whatever the caller trains in.
    pair = [fx.Interpreter(trace(copy.deepcopy(model).float())) for model in (target, source)]
    wanted: dict[str, list[str]] = {}
    for axis, carrier in axes.carriers.items():
        wanted.setdefault(carrier.node, []).append(axis)
    moments = {axis: Moments() for axis in axes.sizes}
    last = max(position for position, node in enumerate(pair[0].module.graph.nodes) if node.name in wanted)
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        for images in batches:
            for interpreter in pair:
                interpreter.env, interpreter.args_iter = {}, iter([images])
            # Both networks advance node by node, so that no more activations are alive than a forward pass needs.
            for position, nodes in enumerate(zip(*(interpreter.module.graph.nodes for interpreter in pair))):
                for interpreter, node in zip(pair, nodes):
                    interpreter.env[node] = interpreter.run_node(node)
                for axis in wanted.get(nodes[0].name, ()):
                    views = [channels_last(i.env[n], axes, axis) for i, n in zip(pair, nodes)]
                    moments[axis].add(*views)
                for interpreter, node in zip(pair, nodes):
                    for dead in interpreter.user_to_last_uses.get(node, ()):
                        del interpreter.env[dead]
                if position == last:
                    break
    return {axis: moment.correlation() for axis, moment in moments.items()}


def channels_last(value: Tensor, axes: Axes, axis: str) -> Tensor:
    """View an activation as (samples, channels of `axis`)."""
    carrier, size = axes.carriers[axis], axes.sizes[axis]
    value = value.movedim(carrier.dim, -1)
    value = value.narrow(-1, carrier.offset, size * carrier.repeat)
    if carrier.repeat > 1:
        value = value.unflatten(-1, (size, carrier.repeat)).transpose(-1, -2)
    return value.reshape(-1, size)


def assign(similarity: Tensor) -> Tensor:
    """The permutation that maximises the summed similarity; index[i] is the source channel for target position i."""
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])


def match_activations(
    source: nn.Module, target: nn.Module, axes: Axes, batches
) -> tuple[dict[str, Tensor], list[dict]]:
    """Activation matching: for every axis the permutation of the source that correlates best with the target.

    Returns the permutation and a row an axis: channels, how many moved, mean matched correlation before and after.
    """
    permutation, rows = {}, []
    for axis, matrix in correlations(source, target, axes, batches).items():
        index = permutation[axis] = assign(matrix)
        identity = torch.arange(len(index))
        rows.append(
            {
                "axis": axis,
                "channels": len(index),
                "moved": int((index != identity).sum()),
                "before": float(matrix.diagonal().mean()),
                "after": float(matrix[identity, index].mean()),
            }
        )
    return permutation, rows
