import copy

import numpy as np
import pytest
import torch

from analyze.benchmark import match_layer_by_layer
from common.axes import find_axes
from common.matching import Moments, assign, match_activations, match_weights, matched_weights, objective, similarities
from common.models import build_model
from common.permutation import inverse, permute, random_permutation
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
        varies = matrices[axis].abs().sum(1) > 0  # a dead channel may go anywhere among the dead ones
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
