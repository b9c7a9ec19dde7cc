import pytest
import torch

from common.masking import layer_weights, prunable
from common.models import build_model
from common.vision import torchvision
from tests.conftest import same


def count(model, names):
    return sum(model.get_parameter(name).numel() for name in names)


def test_resnet20_has_the_papers_layers_and_counts():
    model = build_model("resnet20", 1, 10, (3, 32, 32))
    # By hand: stem; stages 6*2304, 4608+5*9216, 18432+5*36864; linear; 3x3 shortcuts.
    pruned, shortcuts = 432 + 13824 + 50688 + 202752 + 640, 4608 + 18432
    assert count(model, prunable(model)) == pruned
    assert count(model, layer_weights(model)) == pruned + shortcuts
    # The paper's "95%" of all weights.
    assert 0.95 * pruned / (pruned + shortcuts) == pytest.approx(0.875, abs=1e-3)


def test_width_multiplies_every_channel_count():
    assert build_model("resnet20", 4).fc.in_features == 256
    assert build_model("mlp", 0.5, 10, (3, 8, 8))[1].weight.shape == (256, 192)
    last = build_model("vgg11", 0.25, 7, (3, 64, 64))[-1]
    assert last.weight.shape == (7, 128 * 4)  # 2x2 places are left of 64 px
    wide = build_model("resnet50", 0.5).state_dict()
    assert list(wide) == list(torchvision.models.resnet50().state_dict())
    assert wide["conv1.weight"].shape == (32, 3, 7, 7) and wide["fc.weight"].shape == (10, 1024)
    assert wide["layer4.2.conv2.weight"].shape == (256, 256, 3, 3)


def test_resnet50_prunes_all_but_the_shortcuts():
    model = build_model("resnet50", 0.25)
    left = set(layer_weights(model)) - set(prunable(model))
    assert left == {f"layer{stage}.0.downsample.0.weight" for stage in (1, 2, 3, 4)}


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20", "resnet50"])
def test_initialisation_depends_on_the_seed_alone(name):
    before = torch.random.get_rng_state()
    one, again, other = (build_model(name, 0.125, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's is left alone
    assert same(one, again)
    for weight in layer_weights(build_model(name, 0.125)):
        assert not torch.equal(one[weight], other[weight])
