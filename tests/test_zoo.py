"""The axes of our models, of torchvision's, and of timm's if it is installed."""

import pytest
import torch

from analyze import coverage
from common.align.axes import find_axes
from common.models import build_model
from tests.conftest import ROOT, call, refused, succeed
from tests.test_axes import check_axes, layout

# One of each family; docs/coverage.md has all.
FAMILIES = (
    "resnet18 densenet121 squeezenet1_1 googlenet mobilenet_v3_small regnet_y_400mf "
    "convnext_tiny shufflenet_v2_x0_5 swin_t swin_v2_t"
).split()


def test_axes_of_resnet20():
    axes = find_axes(build_model("resnet20", 1), (3, 32, 32))
    streams = {"conv1": 16, "blocks.3.conv2": 32, "blocks.6.conv2": 64}
    inner = {f"blocks.{i}.conv1": (16, 32, 64)[i // 3] for i in range(9)}
    assert axes.sizes == streams | inner
    assert list(axes.pinned) == ["fc"] and "output" in axes.pinned["fc"][1]
    stream, inside = ("blocks.3.conv2", 32, 1), ("blocks.5.conv1", 32, 1)
    assert layout(axes, "blocks.3.shortcut.0.weight") == {0: stream, 1: ("conv1", 16, 1)}
    assert layout(axes, "blocks.5.conv1.weight") == {0: inside, 1: stream}
    assert layout(axes, "conv1.weight") == {0: ("conv1", 16, 1)}  # the input's colours have no axis
    # The last activation of a stream is the output of its last block, after the nonlinearity and
    # before pooling.
    last = [axes.activations[name][-1].tensor for name in streams]
    assert last == ["relu_6", "relu_12", "relu_18"]
    # The first stream has the outputs of the stem and of three blocks.
    first = [place.tensor for place in axes.activations["conv1"]]
    assert first == ["relu", "relu_2", "relu_4", "relu_6"]
    assert [axes.pre_activation[name] for name in first[:2]] == ["batch_norm", "add"]


def test_a_channel_has_several_entries_after_a_flatten():
    axes = find_axes(build_model("vgg11", 0.125, 10, (3, 64, 64)), (3, 64, 64))
    assert list(axes.sizes.values()) == [8, 16, 32, 32, 64, 64, 64, 64]
    (place,) = (place for place in axes.dims["22.weight"] if place.dim == 1)
    # 64 channels of 2x2 pixels.
    assert place.axis == "18" and torch.equal(place.positions, torch.arange(256).view(64, 4))


@pytest.mark.parametrize("name", FAMILIES + coverage.timm_names())
def test_networks_keep_their_function_and_have_the_documented_axes(name):
    size = coverage.image_size(name)
    counts = coverage.count(check_axes(coverage.build(name), (3, size, size)))
    row = " | ".join(f"{number:,}" for number in counts.values())
    assert f"| {name} | {row} |" in (ROOT / "docs/coverage.md").read_text()


def test_heads_and_hidden_units_of_a_vision_transformer():
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 40}
    vit = coverage.torchvision.models.VisionTransformer(32, 8, **sizes)
    axes = check_axes(vit, (3, 32, 32), single=20)
    layer = "encoder.layers.encoder_layer_0"
    rows = f"{layer}.self_attention.in_proj"
    assert axes.groups[1] == ((rows, f"{rows}.2"), 4)  # queries with keys, and values
    assert axes.sizes["conv_proj"] == 24 and axes.sizes[f"{layer}.mlp.0"] == 40


WIDTHS = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3  # inside the blocks of resnet50
LAYERS = 6 + 12 + 24 + 16  # of densenet121
# The input channels of each block of mobilenet_v2 but the first; inside it is six times wider.
INPUTS = [16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3
STREAMS = [32, 16, 24, 32, 64, 96, 160, 320, 1280]


@pytest.mark.parametrize(
    "name, channels",
    [
        ("mobilenet_v2", STREAMS + [6 * width for width in INPUTS]),
        ("densenet121", [64, 128, 256, 512] + [128, 32] * LAYERS),
        ("resnet50", [64, 256, 512, 1024, 2048] + 2 * WIDTHS),
    ],
)
def test_axes_that_can_move_independently_are_separate(name, channels):
    axes = find_axes(coverage.build(name), (3, 64, 64))
    assert sorted(axes.sizes.values()) == sorted(channels)


def test_coverage_of_a_user_supplied_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), "
    code += "nn.LocalResponseNorm(3), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))\n"
    (tmp_path / "own_net.py").write_text(code)
    out = succeed("analyze.coverage", "--model-fn", "own_net:net", "--out", "table.md")
    assert "8 channels of 0" in out and "in 1 (LocalResponseNorm" in out
    assert "| own_net:net | 1 | 6 | 0 | 10 |" in (tmp_path / "table.md").read_text()
    refused(call("analyze.coverage", "resnet7"), "resnet7", "choose from")
    *_, row = succeed("analyze.coverage", "resnet18").splitlines()
    assert row.split()[:5] == ["resnet18", "12", "2,880", "0", "10"]


def test_coverage_of_a_network_that_cannot_be_exported_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "narrow.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Linear(8, 4)\n"
    )
    command = "analyze.coverage", "--model-fn narrow:net --input-shape 9 --out table.md"
    refused(call(*command), "cannot follow Linear")
    assert not (tmp_path / "table.md").exists()
