"""Finding the permutation that maps the source network onto the target (paper, section 4.1)."""

import copy

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn

from common.masking import layer_weights
from common.permutation import Axes, permute, trace

Permutation = dict[str, Tensor]


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
        rows = max(4096, 2**18 // target.shape[1])  # a piece that stays in a processor's cache: several times faster
        for piece in zip(target.split(rows), source.split(rows)):
            pair = [t - shift for t, shift in zip(piece, self.shifts)]
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


def match_activations(source: nn.Module, target: nn.Module, axes: Axes, batches) -> tuple[Permutation, list[dict]]:
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


# ---------------------------------------------------------------- weight matching


def matched_weights(model: nn.Module) -> list[str]:
    """Names of what weight matching looks at: weights and biases of convolution and linear layers."""
    layers = {name.removesuffix(".weight") for name in layer_weights(model)}
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in layers]


def objective(source: dict[str, Tensor], target: dict[str, Tensor]) -> float:
    """The inner product <source, target> over all entries of `source`, in float64."""
    return sum(float((value * target[name]).sum(dtype=torch.float64)) for name, value in source.items())


def match_weights(
    source: dict[str, Tensor], target: dict[str, Tensor], axes: Axes, start: Permutation | None = None, seed: int = 0
) -> tuple[Permutation, list[float]]:
    """Weight matching: raise <π(source), target> axis by axis until no axis improves it (Ainsworth et al. 2023, Alg. 1).

    `source` and `target` hold the tensors to match, the source's already masked for mask-aware matching. Starts from
    `start` or the identity, and visits the axes in an order drawn from `seed`. Returns the permutation and the
    objective at the start and after every sweep, which never falls.
    """
    permutation = {axis: torch.arange(size) for axis, size in axes.sizes.items()} | (start or {})
    moved = permute(source, axes.dims, permutation)
    places = _places(source, axes)
    generator = torch.Generator().manual_seed(seed)
    axis_names = list(axes.sizes)
    history = [objective(moved, target)]
    stale = set(axis_names)  # axes beside which something has moved since they were last optimal
    while stale:
        for position in torch.randperm(len(axis_names), generator=generator).tolist():
            axis = axis_names[position]
            if axis not in stale:
                continue
            stale.discard(axis)
            similarity = sum(
                _rows(target, place, axes.sizes[axis]) @ _rows(moved, place, axes.sizes[axis]).T
                for place in places[axis]
            )
            step = assign(similarity.cpu())
            touched = {name: moved[name] for name, *_ in places[axis]}
            candidate = permute(touched, axes.dims, {axis: step})
            before, after = objective(touched, target), objective(candidate, target)
            # The true gain, because an axis that lies along two dimensions of a tensor makes the assignment approximate.
            if after > before + 1e-7 * abs(before):
                permutation[axis] = permutation[axis][step]
                moved |= candidate
                stale |= {
                    other
                    for other in axis_names
                    if other != axis and touched.keys() & {name for name, *_ in places[other]}
                }
        history.append(objective(moved, target))
    return permutation, history


def _places(tensors: dict[str, Tensor], axes: Axes) -> dict[str, list[tuple[str, int, int, int]]]:
    """Where each axis lies: (tensor, dimension, offset, repeat)."""
    places: dict[str, list[tuple[str, int, int, int]]] = {axis: [] for axis in axes.sizes}
    for name in tensors:
        for dim, layout in enumerate(axes.dims[name]):
            offset = 0
            for axis, size, repeat in layout or ():
                if axis in places:
                    places[axis].append((name, dim, offset, repeat))
                offset += size * repeat
    return places


def _rows(tensors: dict[str, Tensor], place: tuple[str, int, int, int], size: int) -> Tensor:
    """The entries of a tensor as one row a channel of the axis that lies at `place`."""
    name, dim, offset, repeat = place
    return tensors[name].movedim(dim, 0).narrow(0, offset, size * repeat).reshape(size, -1)
