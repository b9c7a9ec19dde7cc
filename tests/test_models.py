import pytest
import torch

from common.errors import UserError
from common.masking import layer_weights, prunable
from common.models import build_model
from common.vision import torchvision


def count(model, names):
    weights = model.state_dict()
    return sum(weights[name].numel() for name in names)


def test_resnet20_has_the_papers_layers_and_counts():
    model = build_model("resnet20", 1, 10, (3, 32, 32))
    # By hand: stem 432; stages 6*2304, 4608+5*9216, 18432+5*36864; linear 640; 3x3 shortcuts 4608+18432.
    pruned, shortcuts = 432 + 13824 + 50688 + 202752 + 640, 4608 + 18432
    assert count(model, prunable(model)) == pruned
    assert count(model, layer_weights(model)) == pruned + shortcuts
    assert 0.95 * pruned / (pruned + shortcuts) == pytest.approx(0.875, abs=1e-3)  # the paper's "95%" of all weights
    assert not any("shortcut" in name for name in prunable(model))


def test_width_multiplies_every_channel_count():
    assert build_model("resnet20", 4).fc.in_features == 256
    assert build_model("mlp", 0.5, 10, (3, 8, 8))[1].weight.shape == (256, 192)
    assert build_model("vgg11", 0.25, 7, (3, 64, 64))[-1].weight.shape == (7, 128 * 4)  # 2x2 places are left of 64 px
    wide, plain = build_model("resnet50", 0.5, 10), torchvision.models.resnet50(num_classes=10)
    assert list(wide.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        fixed = {"conv1.weight": {1}, "fc.weight": {0}, "fc.bias": {0}}.get(name, set())  # colours and classes
        halved = [n if dim in fixed or dim > 1 else n // 2 for dim, n in enumerate(value.shape)]
        assert list(wide.state_dict()[name].shape) == halved, name


def test_resnet50_prunes_all_but_the_shortcuts():
    model = build_model("resnet50", 0.25)
    left = set(layer_weights(model)) - set(prunable(model))
    assert left == {f"layer{stage}.0.downsample.0.weight" for stage in (1, 2, 3, 4)}


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20", "resnet50"])
def test_initialisation_depends_on_the_seed_alone(name):
    width = 0.125
    first = build_model(name, width, seed=3).state_dict()
    torch.rand(100)
    again, other = build_model(name, width, seed=3).state_dict(), build_model(name, width, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = layer_weights(build_model(name, width))
    assert not any(torch.equal(first[key], other[key]) for key in weights)
    before = torch.random.get_rng_state()
    build_model(name, width, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's generator is left alone


def test_kaiming_scale():
    weight = build_model("resnet20", 4).blocks[8].conv2.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name, width, shape, words", [
    ("resnet20", 0.3, (3, 32, 32), "4.8"), ("mlp", 0.001, (3, 8, 8), "0.512"), ("vgg11", 1, (3, 16, 16), "32 px"), ("lenet", 1, (3, 32, 32), "lenet"),
])  # fmt: skip
def test_impossible_models_are_refused(name, width, shape, words):
    with pytest.raises(UserError, match=words):
        build_model(name, width, 10, shape)
