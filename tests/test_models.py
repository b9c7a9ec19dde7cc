import pytest
import torch

from common import masking
from common.masking import layer_weights, prunable
from common.models import build_model
from tests.conftest import same


def count_weights(model, names):
    return sum(model.get_parameter(name).numel() for name in names)


def test_resnet20_has_the_papers_layers_and_counts():
    model = build_model("resnet20")
    # Stem; stages 6*2304, 4608+5*9216, 18432+5*36864; linear layer; and the 3x3 shortcuts.
    pruned, shortcuts = 432 + 13824 + 50688 + 202752 + 640, 4608 + 18432
    assert count_weights(model, prunable(model)) == pruned
    assert count_weights(model, layer_weights(model)) == pruned + shortcuts
    # The paper's "95%", as a share of all weights.
    assert 0.95 * pruned / (pruned + shortcuts) == pytest.approx(0.875, abs=1e-3)


# Model, width, image size in px, the name of a weight and its expected shape. VGG11 reduces images
# of 64 px to 2x2.
WEIGHT_SHAPES = """\
resnet20 4 32 fc.weight 10 256
mlp 0.5 8 1.weight 256 192
vgg11 0.25 64 22.weight 10 512
resnet50 0.5 224 conv1.weight 32 3 7 7
resnet50 0.5 224 layer4.2.conv2.weight 256 256 3 3
resnet50 0.5 224 fc.weight 10 1024"""


@pytest.mark.parametrize("line", WEIGHT_SHAPES.splitlines())
def test_width_multiplies_every_channel_count(line):
    name, width, size, weight, *shape = line.split()
    model = build_model(name, float(width), 10, (3, int(size), int(size)))
    assert model.get_parameter(weight).shape == tuple(map(int, shape))


def test_resnet50_prunes_all_but_the_shortcuts():
    model = build_model("resnet50", 0.25)
    dense = set(layer_weights(model)) - set(prunable(model))
    assert dense == {f"layer{stage}.0.downsample.0.weight" for stage in (1, 2, 3, 4)}


def test_shortcuts_match_a_part_of_a_name_or_the_whole_name(monkeypatch):
    model = build_model("resnet20", 0.25)
    monkeypatch.setattr(masking, "SHORTCUTS", {"fc", "conv1.weight", "blocks.0.conv1"})
    assert {*layer_weights(model)} - {*prunable(model)} == {"fc.weight", "conv1.weight"}


@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20", "resnet50"])
def test_initialisation_depends_on_the_seed_alone(name):
    before = torch.random.get_rng_state()
    first, again, other = (build_model(name, 0.125, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())  # the global generator is unchanged
    assert same(first.state_dict(), again.state_dict())
    for weight in layer_weights(first):
        assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))
