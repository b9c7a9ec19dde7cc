import copy
import itertools
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
from tests.test_axes import Network, ours, tell_apart


def two_seeds(name, width, size):
    """Source, target and their axes."""
    source, target = (build_model(name, width, 10, (3, size, size), seed) for seed in (0, 1))
    return source, target, find_axes(source, (3, size, size))


def matched(axes, *models):
    """What weight matching looks at, of each."""
    return [{name: model.state_dict()[name] for name in axes.weights} for model in models]


def planted(target, axes):
    """A copy of `target` with permuted channels, and the permutation that undoes it."""
    source, permutation = copy.deepcopy(target), random_permutation(axes, seed=2)
    source.load_state_dict(permute(target.state_dict(), axes.dims, permutation))
    return source, inverse(permutation)


def never_falls(history):
    return all(later >= earlier for earlier, later in itertools.pairwise(history))


def test_correlation_equals_numpy_on_batches_of_different_size():
    rng = np.random.default_rng(0)
    target = rng.normal(1000, 0.5, (700, 4))  # a large mean must not swallow a small variance
    source = target[:, [2, 0, 3]] * [1, -2, 0.5] + rng.normal(0, 0.3, (700, 3))
    source[:, 2] = 7  # without variance: correlates 0
    moments = Moments()
    for pair in zip(*(torch.tensor(x).float().split([100, 550, 50]) for x in (target, source))):
        moments.add(*pair)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(target.T, source.T)[:4, 4:])
    assert np.abs(moments.correlation().numpy() - expected).max() < 1e-4
    assert moments.correlation().dtype == torch.float64


def test_a_similarity_is_summed_over_batches_and_told_when_it_is_none():
    def products(target, source):
        return target.T @ source

    def turned(target, source):
        return source.T @ target

    target, source = torch.ones(4, 2), torch.tensor([[1.0, 2, -3]]).expand(4, 3)
    summed = Summed(products)
    for _ in range(2):
        summed.add(target, source)
    assert summed.result().tolist() == 2 * [[8, 16, -24]]
    with pytest.raises(ValueError, match=r"turned made a \(3, 2\) tensor.* \(2, 3\)"):
        Summed(turned).add(source, source)
    with pytest.raises(ValueError, match=r"<lambda> made a \(4, 3\) tensor"):
        Summed(lambda _, source: source).add(source, source)


def test_a_similarity_that_is_nan_for_a_dead_channel_names_the_axis(monkeypatch):
    def cosine(target, source):
        return (target / target.norm(dim=0)).T @ (source / source.norm(dim=0))

    monkeypatch.setitem(SIMILARITIES, "cosine", cosine)
    networks = two_seeds("mlp", 0.125, 8)
    networks[1].get_parameter("1.bias").data[3] = -100
    with pytest.raises(ValueError, match="cosine is NaN or inf along 1, perhaps of dead"):
        similarities(*networks, torch.randn(2, 4, 3, 8, 8), statistic="cosine")


def test_assignment_by_hand():
    # Target 0 likes source 1 best and target 1 too; the sum decides: 0.8 + 0.7 > 0.9 + 0.1.
    assert assign(torch.tensor([[0.8, 0.9], [0.1, 0.7]])).tolist() == [0, 1]
    three = torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.2, 0.8], [0.7, 0.0, 0.0]])
    assert assign(three).tolist() == [1, 2, 0]


@ours
def test_a_planted_permutation_is_undone(name, width, size):
    """Exactly by weights, whose objective never falls, and by activations as far as they tell."""
    images = torch.randn(48, 3, size, size)
    target = tell_apart(build_model(name, width, 10, (3, size, size)), images)
    axes = find_axes(target, (3, size, size))
    source, undone = planted(target, axes)
    ends = matched(axes, source, target)
    found, history = match_weights(*ends, axes)
    assert same(found, undone)
    assert never_falls(history) and history[-1] > history[0] == pytest.approx(objective(*ends))
    assert history[-1] == pytest.approx(objective(ends[1], ends[1]))
    assert match_weights(*ends, axes, start=found)[1][-1] == pytest.approx(history[-1])
    networks, batches = (source, target, axes), images.split(32)
    found, _ = match_activations(*networks, batches)
    for axis, matrix in similarities(*networks, batches).items():
        # Dead channels, and those that only the same one image wakes, may go anywhere among their
        # like.
        best = matched_sum(matrix, undone[axis])
        assert matched_sum(matrix, found[axis]) == pytest.approx(best), axis
        assert best > 0.5 * len(matrix)
    source.load_state_dict(permute(source.state_dict(), axes.dims, found))
    with torch.no_grad():
        assert torch.allclose(source(images), target(images), rtol=1e-3, atol=1e-4)


def test_one_pass_finds_what_layer_by_layer_matching_finds():
    networks, batches = two_seeds("resnet20", 0.5, 16), torch.randn(3, 64, 3, 16, 16)
    one_pass, _ = match_activations(*networks, batches)
    layered = match_layer_by_layer(*networks, batches)
    assert one_pass.keys() == layered.keys()
    for axis, matrix in similarities(*networks, batches).items():  # of dead channels any is as good
        found, best = (matched_sum(matrix, way[axis]) for way in (one_pass, layered))
        assert found == pytest.approx(best) and found > float(matrix.trace()), axis


def test_weight_matching_by_hand():
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    axes = find_axes(model, (1,))
    assert axes.weights == ("0.weight", "0.bias", "2.weight", "2.bias")
    rest = {"0.bias": torch.zeros(3), "2.weight": torch.ones(1, 3), "2.bias": torch.tensor([7.0])}
    first = torch.tensor([[3.0], [1], [2]]), torch.tensor([[1.0], [2], [3]])
    source, target = ({"0.weight": weight} | rest for weight in first)
    found, history = match_weights(source, target, axes)
    assert found["0"].tolist() == [1, 2, 0]
    assert describe(found) == [{"axis": "0", "channels": 3, "moved": 3}]
    # 3 + 2 + 6 = 11 before and 1 + 4 + 9 = 14 after, beside 3 of the last weights and 49 of the
    # output bias.
    assert history[0] == 63 and history[-1] == 66


def repeated(net, x):
    """The layer `two` comes twice: its weight lies along one axis in both dimensions."""
    return net.fc(F.relu(net.two(F.relu(net.two(F.relu(net.one(x)))))))


def test_a_layer_used_twice_lies_along_both_dimensions_and_still_never_loses():
    for seed in range(5):
        source, target = (
            Network(repeated, one=nn.Linear(3, 8), two=nn.Linear(8, 8), fc=nn.Linear(8, 2))
            for _ in range(2)
        )
        axes = find_axes(source, (3,))
        ends = matched(axes, source, target)
        found, history = match_weights(*ends, axes, seed=seed)
        assert never_falls(history)
        assert objective(permute(ends[0], axes.dims, found), ends[1]) == pytest.approx(history[-1])
        assert match_weights(*ends, axes, found, seed + 1)[1][-1] == pytest.approx(history[-1])


@pytest.mark.parametrize(
    "name, width, size, pruned", [("mlp", 0.25, 8, "5.weight"), ("resnet20", 0.5, 16, None)]
)
def test_weight_matching_reaches_what_solving_every_axis_anew_reaches(name, width, size, pruned):
    *models, axes = two_seeds(name, width, size)
    ends = matched(axes, *models)
    if pruned:  # a whole layer
        ends[0][pruned] = torch.zeros_like(ends[0][pruned])
    for seed in range(3):
        _, history = match_weights(*ends, axes, seed=seed)
        _, reached = match_weights_every_axis(*ends, axes, seed=seed)
        assert history[-1] >= reached * (1 - 1e-6) and reached > history[0]


# ---------------------------------------------------------------- grouped convolutions, GroupNorm


def brute_force(within, fixed, blocks):
    """The best score over all orders of blocks and of channels inside them."""

    def best_inside(block, free):
        order = [*range(len(block))]
        return max(
            matched_sum(block, list(one)) for one in (permutations(order) if free else [order])
        )

    return max(
        sum(
            best_inside(similarity.chunk(blocks)[here].chunk(blocks, 1)[there], free)
            for matrices, free in ((within, True), (fixed, False))
            for similarity in matrices
            for here, there in enumerate(order)
        )
        for order in permutations(range(blocks))
    )


@pytest.mark.parametrize(
    "blocks, sizes, free",
    [(1, [4], 1), (3, [6, 3], 2), (3, [6, 9], 1), (2, [6, 2, 4], 2), (4, [4], 1)],
)
def test_assignment_in_blocks_is_the_best_there_is(blocks, sizes, free):
    matrices = [torch.rand(size, size, dtype=torch.float64) for size in sizes]
    parts = matrices[:free], matrices[free:]
    found = assign_blocks(*parts, blocks)
    assert sum(map(matched_sum, matrices, found)) == pytest.approx(brute_force(*parts, blocks))
    orders = [index.view(blocks, -1) * blocks // len(index) for index in found]
    for order in orders:  # every axis moves the same blocks
        assert (order == orders[0][:, :1]).all()
    for index in found[free:]:  # and a fixed one keeps its order inside
        assert (index.view(blocks, -1).diff(dim=1) == 1).all()


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
    tell_apart(target, torch.randn(8, 3, 8, 8))
    axes = find_axes(target, (3, 8, 8))
    assert dict(axes.groups) == {("0", "2"): 4, ("4",): 4}
    source, undone = planted(target, axes)
    assert (undone["2"].view(4, 6)[:, 0] // 6).tolist() != [0, 1, 2, 3]  # blocks are permuted, too
    found, _ = match_activations(source, target, axes, [torch.randn(64, 3, 8, 8)])
    assert same(found, undone)
    ends = matched(axes, source, target)
    assert same(match_weights_best(*ends, axes, restarts=5), undone)
    assert all(never_falls(match_weights(*ends, axes, seed=seed)[1]) for seed in range(5))


# ---------------------------------------------------------------- which values are compared


def residual(net, x):
    """The linear layer reads s1 = relu(s0 + block(s0)), the block reads s0 = relu(stem(x))."""
    x = torch.relu(net.stem(x))
    return net.fc(torch.relu(x + net.block(x)))


def test_values_before_the_nonlinearity_and_over_the_stream_by_hand():
    source, target = (
        Network(residual, stem=nn.Linear(2, 3), block=nn.Linear(3, 3), fc=nn.Linear(3, 1))
        for _ in range(2)
    )
    axes, x = find_axes(source, (2,)), torch.randn(50, 2)

    @torch.no_grad()
    def values(model, match_on):
        """Of the stream's two places."""
        first = model.stem(x)
        second = first.relu() + model.block(first.relu())
        both = (first, second) if match_on == "pre" else (first.relu(), second.relu())
        return [value.T.numpy() for value in both]

    for match_on in ("pre", "post"):
        first, last = (
            np.cov(there, here, bias=True)[:3, 3:]
            for here, there in zip(values(source, match_on), values(target, match_on))
        )
        for stream, expected in (("last", last), ("mean", (first + last) / 2)):
            how = match_on, "covariance", stream
            found = similarities(source, target, axes, [x[:20], x[20:]], *how)
            assert np.abs(found["stem"].numpy() - expected).max() < 1e-5, how
