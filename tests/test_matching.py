import copy
import itertools

import numpy as np
import pytest
import torch

from analyze.plain import match_layer_by_layer, match_weights_plainly
from common.axes import find_axes
from common.matching import (
    Moments,
    assign,
    assign_blocks,
    match_activations,
    match_weights,
    matched_weights,
    objective,
    similarities,
)  # fmt: skip
from common.models import build_model
from common.permutation import inverse, permute, random_permutation
from tests.test_axes import tell_apart
from tests.test_permutation import built


def test_correlation_equals_numpy_on_batches_of_different_size():
    rng = np.random.default_rng(0)
    target = rng.normal(1000, 0.5, (700, 4))  # a large mean must not swallow a small variance
    source = target[:, [2, 0, 3]] * [1, -2, 0.5] + rng.normal(0, 0.3, (700, 3))
    moments = Moments()
    for part in (slice(0, 100), slice(100, 650), slice(650, 700)):
        moments.add(torch.tensor(target[part], dtype=torch.float32), torch.tensor(source[part], dtype=torch.float32))
    expected = np.corrcoef(target.T, source.T)[:4, 4:]
    assert np.abs(moments.correlation().numpy() - expected).max() < 1e-4
    assert moments.correlation().dtype == torch.float64


def test_a_channel_without_variance_correlates_zero():
    moments = Moments()
    target = torch.tensor([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0]])
    moments.add(target, target)
    assert moments.correlation().tolist() == [[pytest.approx(1), 0], [0, 0]]


def test_assignment_by_hand():
    # Target 0 likes source 1 best and target 1 likes source 1 too; the sum decides: 0.8 + 0.7 > 0.9 + 0.1.
    assert assign(torch.tensor([[0.8, 0.9], [0.1, 0.7]])).tolist() == [0, 1]
    assert assign(torch.tensor([[0.1, 0.9, 0.0], [0.0, 0.2, 0.8], [0.7, 0.0, 0.0]])).tolist() == [1, 2, 0]


@pytest.mark.parametrize("name, width, size", [
    ("mlp", 0.125, 8), ("mlp", 0.25, 8), ("vgg11", 0.125, 32), ("vgg11", 0.25, 64),
    ("resnet20", 0.5, 16), ("resnet20", 2, 16), ("resnet50", 0.125, 64), ("resnet50", 0.25, 64),
])  # fmt: skip
def test_a_planted_permutation_is_recovered_exactly(name, width, size):
    target = built(name, width, size)
    axes = find_axes(target, (3, size, size))
    planted = random_permutation(axes, seed=2)
    source = copy.deepcopy(target)
    source.load_state_dict(permute(target.state_dict(), axes.dims, planted))
    images = torch.randn(48, 3, size, size)
    matrices = similarities(source, target, axes, [images[:32], images[32:]])
    found, rows = match_activations(source, target, axes, [images[:32], images[32:]])
    undone = inverse(planted)
    alive = 0
    for axis, index in found.items():
        # Dead channels, and those that only the same one image wakes, may go anywhere among their like.
        alike = matrices[axis] > matrices[axis].max(1, keepdim=True).values - 1e-6
        varies = alike.sum(1) == 1
        assert torch.equal(index[varies], undone[axis][varies]), axis
        alive += int(varies.sum())
    assert alive > 0.5 * sum(axes.sizes.values())
    restored = permute(source.state_dict(), axes.dims, found)
    source.load_state_dict(restored)
    with torch.no_grad():
        assert torch.allclose(source(images), target(images), rtol=1e-3, atol=1e-4)
        wrong = dict(restored)
        key = next(key for key, layouts in axes.dims.items() if layouts[0] and key.endswith("weight"))
        wrong[key] = wrong[key].roll(1, 0)
        source.load_state_dict(wrong)
        assert not torch.allclose(source(images), target(images), rtol=1e-3, atol=1e-4)
    for row in rows:
        assert row["after"] >= row["before"] and row["moved"] == int(
            (found[row["axis"]] != torch.arange(row["channels"])).sum()
        )


@pytest.mark.parametrize("name, width, size", [("resnet20", 0.5, 16), ("vgg11", 0.125, 32), ("mlp", 0.125, 8)])
def test_one_pass_finds_what_layer_by_layer_matching_finds(name, width, size):
    source, target = (build_model(name, width, 10, (3, size, size), seed) for seed in (0, 1))
    axes = find_axes(source, (3, size, size))
    batches = [torch.randn(64, 3, size, size) for _ in range(3)]
    one_pass, _ = match_activations(source, target, axes, batches)
    layered = match_layer_by_layer(source, target, axes, lambda: batches)
    assert one_pass.keys() == layered.keys()
    for axis, matrix in similarities(source, target, axes, batches).items():
        alive = matrix.abs().sum(0) > 0  # dead channels are interchangeable
        placed = (alive[one_pass[axis]] | alive[layered[axis]]) & (matrix.abs().sum(1) > 0)
        assert torch.equal(one_pass[axis][placed], layered[axis][placed]), axis
        assert placed.sum() > len(placed) / 2
    assert any(not torch.equal(index, torch.arange(len(index))) for index in one_pass.values())


@pytest.mark.parametrize(
    "name, width, size", [("mlp", 0.25, 8), ("vgg11", 0.25, 64), ("resnet20", 1, 16), ("resnet50", 0.25, 64)]
)
def test_weight_matching_recovers_a_planted_permutation_and_never_loses(name, width, size):
    model = build_model(name, width, 10, (3, size, size), seed=3)
    axes, names = find_axes(model, (3, size, size)), matched_weights(model)
    target = {key: model.state_dict()[key] for key in names}
    planted = random_permutation(axes, seed=4)
    source = permute(target, axes.dims, planted)
    found, history = match_weights(source, target, axes, seed=0)
    assert all(torch.equal(found[axis], index) for axis, index in inverse(planted).items())
    assert all(later >= earlier for earlier, later in zip(history, history[1:])) and history[-1] > history[0]
    assert history[0] == pytest.approx(objective(source, target)) and history[-1] == pytest.approx(
        objective(target, target)
    )
    assert match_weights(source, target, axes, start=found)[1][-1] == pytest.approx(history[-1])


def test_activations_are_matched_by_cudnn_in_whole_fp32():
    model, seen = build_model("mlp", 1 / 64, 2, (3, 8, 8), 0), []

    def batches():
        flags = torch.backends.cudnn
        seen.append((flags.enabled, flags.deterministic, flags.allow_tf32))
        yield torch.randn(4, 3, 8, 8)

    match_activations(model, model, find_axes(model, (3, 8, 8)), batches())
    assert seen == [(True, True, False)]


def test_weight_matching_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    axes, names = find_axes(model, (1,)), matched_weights(model)
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    target = {"0.weight": [[1.0], [2], [3]], "0.bias": [0.0, 0, 0], "2.weight": [[1.0, 1, 1]], "2.bias": [7.0]}
    source = {"0.weight": [[3.0], [1], [2]], "0.bias": [0.0, 0, 0], "2.weight": [[1.0, 1, 1]], "2.bias": [7.0]}
    source, target = ({key: torch.tensor(value) for key, value in ends.items()} for ends in (source, target))
    found, history = match_weights(source, target, axes)
    assert found["0"].tolist() == [1, 2, 0]
    # 3 + 2 + 6 = 11 before and 1 + 4 + 9 = 14 after, beside 3 of the last weights and 49 of the output bias.
    assert history[0] == 63 and history[-1] == 66


def test_a_layer_used_twice_lies_along_both_dimensions_and_still_never_loses():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.fc = torch.nn.Linear(3, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(torch.relu(self.two(torch.relu(self.two(torch.relu(self.one(x)))))))

    for seed in range(5):
        torch.manual_seed(seed)
        source, target = Twice(), Twice()
        names, axes = matched_weights(source), find_axes(source, (3,))
        ends = [{key: model.state_dict()[key] for key in names} for model in (source, target)]
        found, history = match_weights(*ends, axes, seed=seed)
        assert all(later >= earlier for earlier, later in zip(history, history[1:]))
        assert objective(permute(ends[0], axes.dims, found), ends[1]) == pytest.approx(history[-1])


# ---------------------------------------------------------------- blocks: grouped convolutions and GroupNorm


def brute_force(within, fixed, blocks):
    """The best score over all orders of blocks and of channels inside them."""
    best = -float("inf")
    for order in itertools.permutations(range(blocks)):
        score = 0.0
        for position, similarity in enumerate([*within, *fixed]):
            size = len(similarity) // blocks
            for here, there in enumerate(order):
                block = similarity[here * size : (here + 1) * size, there * size : (there + 1) * size]
                inner = itertools.permutations(range(size)) if position < len(within) else [range(size)]
                score += max(sum(float(block[i, j]) for i, j in enumerate(one)) for one in inner)
        best = max(best, score)
    return best


def test_assignment_in_blocks_is_the_best_there_is():
    generator = torch.Generator().manual_seed(0)
    for blocks, sizes, free in ((1, [4], 1), (3, [6, 3], 2), (3, [6, 9], 1), (2, [6, 2, 4], 2), (4, [4], 1)):
        matrices = [torch.rand(size, size, dtype=torch.float64, generator=generator) for size in sizes]
        found = assign_blocks(matrices[:free], matrices[free:], blocks)
        score = sum(float(m[torch.arange(len(m)), index].sum()) for m, index in zip(matrices, found))
        assert score == pytest.approx(brute_force(matrices[:free], matrices[free:], blocks))
        orders = [index.view(blocks, -1) * blocks // len(index) for index in found]
        assert all((order == orders[0][:, :1]).all() for order in orders)  # every axis moves the same blocks
        for index in found[free:]:
            assert (index.view(blocks, -1).diff(dim=1) == 1).all()  # and a fixed one keeps its order inside


@pytest.mark.parametrize("match", ["activation", "weight"])
def test_a_planted_permutation_of_grouped_channels_is_recovered(match):
    torch.manual_seed(0)
    target = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 24, 3, groups=4), torch.nn.ReLU(),
        torch.nn.Conv2d(24, 32, 1), torch.nn.GroupNorm(4, 32), torch.nn.ReLU(), torch.nn.Conv2d(32, 10, 1), torch.nn.Flatten(),
    )  # fmt: skip
    tell_apart(target, torch.randn(8, 3, 8, 8))
    axes = find_axes(target, (3, 8, 8))
    assert {unit.axes: unit.blocks for unit in axes.units} == {("0", "2"): 4, ("4",): 4}
    planted = random_permutation(axes, seed=2)
    source = copy.deepcopy(target)
    source.load_state_dict(permute(target.state_dict(), axes.dims, planted))
    if match == "activation":
        found, _ = match_activations(source, target, axes, [torch.randn(64, 3, 8, 8)])
    else:
        ends = [{name: model.state_dict()[name] for name in matched_weights(model)} for model in (source, target)]
        tries = [match_weights(*ends, axes, seed=seed) for seed in range(5)]
        assert all(b >= a for _, history in tries for a, b in zip(history, history[1:]))
        found, history = max(tries, key=lambda one: one[1][-1])
        assert history[-1] == pytest.approx(objective(ends[1], ends[1]))
    for axis, index in inverse(planted).items():
        assert torch.equal(found[axis], index), axis


# ---------------------------------------------------------------- which values are compared


def test_values_before_the_nonlinearity_and_over_the_stream_by_hand():
    class Stream(torch.nn.Module):
        """x -> stem -> relu = s0; s1 = relu(s0 + block(s0)); the linear layer reads s1, the block read s0."""

        def __init__(self):
            super().__init__()
            self.stem, self.block, self.fc = torch.nn.Linear(2, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.fc(torch.relu(x + self.block(x)))

    torch.manual_seed(0)
    source, target = Stream(), Stream()
    axes, x = find_axes(source, (2,)), torch.randn(50, 2)
    values = {}
    with torch.no_grad():
        for name, model in (("source", source), ("target", target)):
            first = model.stem(x)
            second = first.relu() + model.block(first.relu())
            values[name] = [(first, first.relu()), (second, second.relu())]
    for match_on, post in (("pre", 0), ("post", 1)):
        for statistic, reference in (
            ("correlation", np.corrcoef),
            ("covariance", lambda a, b: np.cov(a, b, bias=True)),
        ):
            with np.errstate(invalid="ignore"):  # a unit that never varies correlates 0
                each = [
                    np.nan_to_num(reference(target[post].T.numpy(), source[post].T.numpy())[:3, 3:])
                    for source, target in zip(values["source"], values["target"])
                ]
            for stream, expected in (("last", each[1]), ("mean", (each[0] + each[1]) / 2)):
                found = similarities(source, target, axes, [x[:20], x[20:]], match_on, statistic, stream)
                assert np.abs(found["stem"].numpy() - expected).max() < 1e-5, (match_on, statistic, stream)


# ---------------------------------------------------------------- against the plain way


@pytest.mark.parametrize("name, width, size", [("mlp", 0.25, 8), ("resnet20", 1, 16)])
def test_weight_matching_reaches_what_the_plain_way_reaches(name, width, size):
    source, target = (build_model(name, width, 10, (3, size, size), seed) for seed in (0, 1))
    axes = find_axes(source, (3, size, size))
    ends = [{key: model.state_dict()[key] for key in matched_weights(model)} for model in (source, target)]
    for seed in range(3):
        _, history = match_weights(*ends, axes, seed=seed)
        _, reached = match_weights_plainly(*ends, axes, seed=seed)
        assert history[-1] >= reached * (1 - 1e-6) and reached > history[0]
