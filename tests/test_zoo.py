"""The axes of torchvision's networks, and of timm's if it is there."""

import pytest

from analyze import coverage
from common.align.axes import find_axes
from tests.conftest import call, refused, succeed
from tests.test_axes import check_axes

FAMILIES = (
    "alexnet vgg11 vgg11_bn resnet18 resnet50 wide_resnet50_2 resnext50_32x4d densenet121 "
    "squeezenet1_1 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small mnasnet0_5 "
    "efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny "
    "shufflenet_v2_x0_5 swin_t swin_v2_t"
).split()


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_networks_move_in_everything_but_their_classes(name):
    size = coverage.image_size(name)
    found = coverage.count(check_axes(coverage.build(name), (3, size, size)))
    assert found["pinned"] == coverage.CLASSES  # of thousands of channels; these and nothing else
    assert found["free"] + found["in blocks"] > 500
    assert (found["in blocks"] > 0) == name.startswith(("resnext", "regnet", "swin"))


@pytest.mark.parametrize("name", coverage.timm_names())
def test_timm_networks_keep_their_function(name):
    size = coverage.image_size(name)
    found = coverage.count(check_axes(coverage.build(name), (3, size, size)))
    free = found["free"] + found["in blocks"]
    assert free > found["pinned"] or name == "timm.ecaresnet50d"  # slides over its channels


def test_heads_and_hidden_units_of_a_vision_transformer():
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 40}
    vit = coverage.torchvision.models.VisionTransformer(32, 8, **sizes)
    axes = check_axes(vit, (3, 32, 32), alone=20)
    layer = "encoder.layers.encoder_layer_0"
    rows = f"{layer}.self_attention.in_proj"
    assert axes.groups[1] == ((rows, f"{rows}.2"), 4)  # queries with keys, and values
    assert axes.sizes["conv_proj"] == 24 and axes.sizes[f"{layer}.mlp.0"] == 40


LAYERS = 6 + 12 + 24 + 16  # of densenet121
# What each block of mobilenet_v2 but the first reads; it is six times wider inside.
READS = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3
STREAMS = [32, 16, 24, 32, 64, 96, 160, 320, 1280]


@pytest.mark.parametrize(
    "name, channels",
    [
        ("mobilenet_v2", STREAMS + [6 * width for width in READS]),
        ("densenet121", [64, 128, 256, 512] + [128, 32] * LAYERS),
    ],
)
def test_no_axes_are_tied_that_could_move_apart(name, channels):
    axes = find_axes(coverage.build(name), (3, 64, 64))
    assert sorted(axes.sizes.values()) == sorted(channels)


def test_coverage_of_a_network_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), "
    code += "nn.LocalResponseNorm(3), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))\n"
    (tmp_path / "own_net.py").write_text(code)
    out = succeed("analyze.coverage", "--model-fn", "own_net:net", "--out", "table.md")
    assert "8 channels of 0" in out and "in 1 (LocalResponseNorm" in out
    assert "| own_net:net | 1 | 6 | 0 | 10 |" in (tmp_path / "table.md").read_text()
    refused(call("analyze.coverage", "resnet7"), "resnet7", "choose from")
