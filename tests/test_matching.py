import copy
import dataclasses
import itertools
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from analyze.lib import baselines
from analyze.lib.baselines import match_layer_by_layer, match_weights_every_axis
from common.align.axes import find_axes
from common.align.matching import (
    SIMILARITIES,
    Moments,
    Summed,
    assign,
    assign_blocks,
    describe,
    match_activations,
    match_weights,
    match_weights_best,
    matched_sum,
    objective,
    similarities,
)
from common.align.permutation import inverse, permute, random_permutation
from common.models import build_model
from tests.conftest import same
from tests.test_axes import Network, our_models, make_channels_distinct


def two_seeds(name, width, size):
    """Source, target and their axes."""
    source, target = (build_model(name, width, 10, (3, size, size), seed) for seed in (0, 1))
    return source, target, find_axes(source, (3, size, size))


def matched_weights(axes, *models):
    """The weights of each model that weight matching compares."""
    return [{name: model.state_dict()[name] for name in axes.weights} for model in models]


def permuted_copy(target, axes):
    """A randomly permuted copy of `target`, and the permutation that undoes it."""
    source, permutation = copy.deepcopy(target), random_permutation(axes, seed=2)
    source.load_state_dict(permute(target.state_dict(), axes.dims, permutation))
    return source, inverse(permutation)


def never_decreases(history):
    return all(later >= earlier for earlier, later in itertools.pairwise(history))


def test_correlation_equals_numpy_on_batches_of_different_size():
    rng = np.random.default_rng(0)
    target = rng.normal(1000, 0.5, (700, 4))  # a large mean must not swallow a small variance
    source = target[:, [2, 0, 3]] * [1, -2, 0.5] + rng.normal(0, 0.3, (700, 3))
    source[:, 2] = 7  # no variance: correlation 0
    moments = Moments()
    for pair in zip(*(torch.tensor(x).float().split([100, 550, 50]) for x in (target, source))):
        moments.add(*pair)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(target.T, source.T)[:4, 4:])
    assert np.abs(moments.correlation().numpy() - expected).max() < 1e-4
    assert moments.correlation().dtype == torch.float64


def test_a_similarity_is_summed_over_batches_and_its_shape_is_checked():
    def products(target, source):
        return target.T @ source

    def transposed(target, source):
        return source.T @ target

    target, source = torch.ones(4, 2), torch.tensor([[1.0, 2, -3]]).expand(4, 3)
    summed = Summed(products)
    for _ in range(2):
        summed.add(target, source)
    assert summed.result().tolist() == 2 * [[8, 16, -24]]
    with pytest.raises(ValueError, match=r"transposed returned a \(3, 2\) tensor.* \(2, 3\)"):
        Summed(transposed).add(source, source)
    with pytest.raises(ValueError, match=r"<lambda> returned a \(4, 3\) tensor"):
        Summed(lambda _, source: source).add(source, source)


def test_a_similarity_that_is_nan_for_a_dead_channel_names_the_axis(monkeypatch):
    def cosine(target, source):
        return (target / target.norm(dim=0)).T @ (source / source.norm(dim=0))

    monkeypatch.setitem(SIMILARITIES, "cosine", cosine)
    networks = two_seeds("mlp", 0.125, 8)
    networks[1].get_parameter("1.bias").data[3] = -100
    with pytest.raises(ValueError, match="cosine is NaN or inf along 1, perhaps because of dead"):
        similarities(*networks, torch.randn(2, 4, 3, 8, 8), statistic="cosine")


def test_assignment_by_hand():
    # Both targets are most similar to source 1; the sum decides: 0.8 + 0.7 > 0.9 + 0.1.
    assert assign(torch.tensor([[0.8, 0.9], [0.1, 0.7]])).tolist() == [0, 1]
    similarity = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.2, 0.8], [0.7, 0.0, 0.0]])
    assert assign(similarity).tolist() == [1, 2, 0]


@our_models
def test_a_planted_permutation_is_recovered(name, width, size):
    """Exactly from weights; from activations, but for channels that they do not distinguish."""
    images = torch.randn(48, 3, size, size)
    target = make_channels_distinct(build_model(name, width, 10, (3, size, size)), images)
    axes = find_axes(target, (3, size, size))
    source, expected = permuted_copy(target, axes)
    states = matched_weights(axes, source, target)
    permutation, history = match_weights(*states, axes)
    assert same(permutation, expected)
    assert history[-1] > history[0] == pytest.approx(objective(*states))
    assert never_decreases(history)
    assert history[-1] == pytest.approx(objective(states[1], states[1]))
    assert match_weights(*states, axes, start=permutation)[1][-1] == pytest.approx(history[-1])
    networks, batches = (source, target, axes), images.split(32)
    permutation, _ = match_activations(*networks, batches)
    for axis, matrix in similarities(*networks, batches).items():
        # Dead channels, and those that are active for one and the same image, are interchangeable.
        best = matched_sum(matrix, expected[axis])
        assert matched_sum(matrix, permutation[axis]) == pytest.approx(best), axis
        assert best > 0.5 * len(matrix)
    source.load_state_dict(permute(source.state_dict(), axes.dims, permutation))
    with torch.no_grad():
        assert torch.allclose(source(images), target(images), rtol=1e-3, atol=1e-4)


def test_one_pass_finds_what_layer_by_layer_matching_finds():
    networks, batches = two_seeds("resnet20", 0.5, 16), torch.randn(3, 64, 3, 16, 16)
    one_pass, _ = match_activations(*networks, batches)
    layered = match_layer_by_layer(*networks, batches)
    assert one_pass.keys() == layered.keys()
    for axis, matrix in similarities(*networks, batches).items():  # dead channels are alike
        best = matched_sum(matrix, one_pass[axis])
        assert best == pytest.approx(matched_sum(matrix, layered[axis])), axis
        assert best > float(matrix.trace()), axis


def test_weight_matching_by_hand():
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    axes = find_axes(model, (1,))
    assert axes.weights == ("0.weight", "0.bias", "2.weight", "2.bias")
    rest = {"0.bias": torch.zeros(3), "2.weight": torch.ones(1, 3), "2.bias": torch.tensor([7.0])}
    weights = torch.tensor([[3.0], [1], [2]]), torch.tensor([[1.0], [2], [3]])
    source, target = ({"0.weight": weight} | rest for weight in weights)
    permutation, history = match_weights(source, target, axes)
    assert permutation["0"].tolist() == [1, 2, 0]
    assert describe(permutation) == [{"axis": "0", "channels": 3, "moved": 3}]
    # 3 + 2 + 6 = 11 before and 1 + 4 + 9 = 14 after, plus 3 from 2.weight and 49 from 2.bias.
    assert history[0] == 63 and history[-1] == 66


def repeated(net, x):
    """Applies the layer `two` twice: one axis lies along both dimensions of its weight."""
    return net.fc(F.relu(net.two(F.relu(net.two(F.relu(net.one(x)))))))


def test_weight_matching_of_a_layer_that_is_applied_twice_never_decreases():
    for seed in range(5):
        source, target = (
            Network(repeated, one=nn.Linear(3, 8), two=nn.Linear(8, 8), fc=nn.Linear(8, 2))
            for _ in range(2)
        )
        axes = find_axes(source, (3,))
        states = matched_weights(axes, source, target)
        permutation, history = match_weights(*states, axes, seed=seed)
        assert never_decreases(history)
        permuted = permute(states[0], axes.dims, permutation)
        assert objective(permuted, states[1]) == pytest.approx(history[-1])
        again = match_weights(*states, axes, permutation, seed + 1)[1]
        assert again[-1] == pytest.approx(history[-1])


@pytest.mark.parametrize(
    "name, width, size, pruned", [("mlp", 0.25, 8, "5.weight"), ("resnet20", 0.5, 16, None)]
)
def test_weight_matching_is_as_good_as_solving_every_axis_in_every_sweep(name, width, size, pruned):
    *models, axes = two_seeds(name, width, size)
    states = matched_weights(axes, *models)
    if pruned:  # a whole layer
        states[0][pruned] = torch.zeros_like(states[0][pruned])
    for seed in range(3):
        _, history = match_weights(*states, axes, seed=seed)
        _, baseline = match_weights_every_axis(*states, axes, seed=seed)
        assert history[-1] >= baseline * (1 - 1e-6) and baseline > history[0]


def test_the_baseline_permutes_only_the_weights_of_an_axis(monkeypatch):
    """As the published code does; otherwise it would be slower than that."""
    *models, axes = two_seeds("mlp", 0.25, 8)
    calls = []

    def count(tensors, *arguments):
        calls.append(len(tensors))
        return permute(tensors, *arguments)

    monkeypatch.setattr(baselines, "permute", count)
    match_weights_every_axis(*matched_weights(axes, *models), axes)
    assert max(calls[:-1]) < calls[-1] == len(axes.weights)


# ---------------------------------------------------------------- grouped convolutions, GroupNorm


def brute_force(free, fixed, blocks):
    """The best score over all orders of blocks, and of channels in the blocks of `free` axes."""

    def best(similarity, is_free):
        identity = [*range(len(similarity))]
        orders = permutations(identity) if is_free else [identity]
        return max(matched_sum(similarity, list(order)) for order in orders)

    def score(block_order):
        return sum(
            best(similarity.chunk(blocks)[target].chunk(blocks, 1)[source], is_free)
            for matrices, is_free in ((free, True), (fixed, False))
            for similarity in matrices
            for target, source in enumerate(block_order)
        )

    return max(map(score, permutations(range(blocks))))


@pytest.mark.parametrize(
    "blocks, sizes, free",
    [(1, [4], 1), (3, [6, 3], 2), (3, [6, 9], 1), (2, [6, 2, 4], 2), (4, [4], 1)],
)
def test_assignment_in_blocks_is_optimal(blocks, sizes, free):
    matrices = [torch.rand(size, size, dtype=torch.float64) for size in sizes]
    parts = matrices[:free], matrices[free:]
    orders = assign_blocks(*parts, blocks)
    assert sum(map(matched_sum, matrices, orders)) == pytest.approx(brute_force(*parts, blocks))
    block_orders = [order.view(blocks, -1) * blocks // len(order) for order in orders]
    for block_order in block_orders:  # all axes have the same order of blocks
        assert (block_order == block_orders[0][:, :1]).all()
    for order in orders[free:]:  # a fixed axis keeps its order within blocks
        assert (order.view(blocks, -1).diff(dim=1) == 1).all()


def test_a_planted_permutation_of_grouped_channels_is_recovered():
    target = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(24, 32, 1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 10, 1),
        nn.Flatten(),
    )
    make_channels_distinct(target, torch.randn(8, 3, 8, 8))
    axes = find_axes(target, (3, 8, 8))
    assert dict(axes.groups) == {("0", "2"): 4, ("4",): 4}
    source, expected = permuted_copy(target, axes)
    assert (expected["2"].view(4, 6)[:, 0] // 6).tolist() != [0, 1, 2, 3]  # blocks are permuted
    permutation, _ = match_activations(source, target, axes, [torch.randn(64, 3, 8, 8)])
    assert same(permutation, expected)
    states = matched_weights(axes, source, target)
    assert same(match_weights_best(*states, axes, restarts=5), expected)
    assert all(never_decreases(match_weights(*states, axes, seed=seed)[1]) for seed in range(5))


def test_restarts_keep_the_best_objective():
    *models, axes = two_seeds("mlp", 1 / 16, 8)
    states = matched_weights(axes, *models)

    def objectives(restarts):
        starts = [None, *(random_permutation(axes, seed) for seed in range(1, restarts))]
        runs = (match_weights(*states, axes, start, seed) for seed, start in enumerate(starts))
        return [history[-1] for _, history in runs]

    expected = objectives(5)
    assert expected[0] < max(expected) > expected[-1]
    best = match_weights_best(*states, axes, restarts=5)
    assert objective(permute(states[0], axes.dims, best), states[1]) == pytest.approx(max(expected))


def test_an_axis_without_activations_stays_in_place_and_is_listed():
    *models, axes = two_seeds("mlp", 1 / 16, 8)
    first, *others = axes.sizes
    without = dataclasses.replace(axes, activations=axes.activations | {first: []})
    permutation, rows = match_activations(*models, without, [torch.randn(64, 3, 8, 8)])
    assert permutation[first].tolist() == [*range(axes.sizes[first])]
    assert [row["axis"] for row in rows] == [first, *others]
    assert "after" not in rows[0] and all(row["moved"] and row["after"] for row in rows[1:])


# ---------------------------------------------------------------- options of activation matching


def residual(net, x):
    """fc(relu(s + block(s))) with s = relu(stem(x))."""
    x = torch.relu(net.stem(x))
    return net.fc(torch.relu(x + net.block(x)))


def test_activations_before_the_nonlinearity_and_over_the_stream_by_hand():
    source, target = (
        Network(residual, stem=nn.Linear(2, 3), block=nn.Linear(3, 3), fc=nn.Linear(3, 1))
        for _ in range(2)
    )
    axes, x = find_axes(source, (2,)), torch.randn(50, 2)

    @torch.no_grad()
    def activations(model, match_on):
        """The two activations of the stream."""
        first = model.stem(x)
        second = first.relu() + model.block(first.relu())
        stream = (first, second) if match_on == "pre" else (first.relu(), second.relu())
        return [value.T.numpy() for value in stream]

    for match_on in ("pre", "post"):
        first, last = (
            np.cov(*pair, bias=True)[:3, 3:]
            for pair in zip(activations(target, match_on), activations(source, match_on))
        )
        for stream, expected in (("last", last), ("mean", (first + last) / 2)):
            options = match_on, "covariance", stream
            matrices = similarities(source, target, axes, [x[:20], x[20:]], *options)
            assert np.abs(matrices["stem"].numpy() - expected).max() < 1e-5, options
