"""Stage 3 beyond the paper's settings: other statistics, and networks trained elsewhere."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from common import masking
from common.align import inputs
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import load_data
from tests.conftest import (
    refuse,
    result,
    same,
    stage2,
    stage3,
    stage4,
    start,
    state,
    succeed,
    weights,
)

VARIANTS = {
    "activation-mean": "--stream mean",
    "activation-pre-covariance": "--match-on pre --statistic covariance",
}


@pytest.mark.parametrize("method", VARIANTS)
def test_variants_of_activation_matching_have_their_own_permutation_and_name(
    runs, ends, tmp_path, method
):
    succeed(*stage3(*ends, tmp_path, VARIANTS[method]))
    variant = state(tmp_path / "permutation.pt")
    default = state(runs / "align/activation/seed0-seed1/permutation.pt")
    assert variant["method"] == state(tmp_path / "mask_0.70.pt")["method"] == method
    no_effect = method == "activation-mean"  # an mlp has no residual stream
    assert same(variant["permutation"], default["permutation"]) == no_effect
    refuse(stage3(*ends, tmp_path), "method", method)


def test_each_pair_has_a_random_permutation_of_its_own(runs, ends, aligned, tmp_path):
    expected = state(aligned / "random/permutation.pt")["permutation"]
    other_pair = (runs / "dense/seed2", runs / "dense/seed3", runs / "imp/seed2")
    for pair in (ends, other_pair):
        out = tmp_path / pair[0].name
        succeed(*stage3(*pair, out, "--method random"))
        assert same(state(out / "permutation.pt")["permutation"], expected) == (pair == ends)


def test_a_tag_is_appended_to_the_inputs_and_the_code_of_the_mask_is_kept(ends, tmp_path):
    succeed(*stage3(*ends, tmp_path / "align", "--method identity --tag one"))
    for tag, joined in ((None, "one"), ("one", "one"), ("two", "one+two")):
        flags = "--sparsity 0.5 --rewind 1" + (f" --tag {tag}" if tag else "")
        succeed(*stage4("permuted", ends[1], tmp_path / "align", tmp_path / f"{tag}", flags))
        run = result(tmp_path / f"{tag}/s0.50_k001")
        assert run["arguments"]["tag"] == joined
        assert run["mask_code"] == state(ends[2] / "mask_0.50.pt")["code"]
    succeed(*stage2(ends[0], tmp_path / "imp", "--sparsity 0.5 --tag pruned"))
    succeed(*stage3(*ends[:2], tmp_path / "imp", tmp_path / "inherits", "--method identity"))
    assert result(tmp_path / "inherits")["arguments"]["tag"] == "pruned"


def test_all_training_images_are_matched_by_default():
    data = load_data({"name": "glyphs", "image_size": 8, "limit_train": 100})
    images = torch.cat([*inputs.matched_images(data, None, 30)])
    assert torch.equal(images, torch.cat([batch for batch, _ in data.eval_batches("train")]))
    assert len(torch.cat([*inputs.matched_images(data, 20, 30)])) == 20


# ---------------------------------------------------------------- user-supplied networks

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def parallel():
    return nn.DataParallel(Net())


shared = Net()


def one():
    return shared


def needs(width):
    return Net()


def broken():
    raise ValueError("a bug")


class Encoded(nn.Module):
    def __init__(self, persistent=True):
        super().__init__()
        self.stem, self.head, self.fixed = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.register_buffer("encoding", torch.arange(8.0), persistent)

    def forward(self, x):
        return self.fixed(self.head((self.stem(x) + self.encoding).relu()).relu())


def normed():
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    return nn.Sequential(*layers)


def not_persistent():
    return Encoded(persistent=False)
"""


@pytest.fixture(scope="module")
def supplied(tmp_path_factory):
    """A user's module, two state dicts, and the first of them pruned by torch.nn.utils.prune."""
    folder = tmp_path_factory.mktemp("supplied")
    (folder / "my_nets.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    import my_nets

    for name in ("my_b", "my_a"):
        network = my_nets.Net()
        torch.save(network.state_dict(), folder / f"{name}.pt")
    prune.l1_unstructured(network.conv, "weight", 0.5)
    torch.save({"state_dict": network.state_dict()}, folder / "my_a_pruned.pt")
    yield folder
    sys.path.remove(str(folder))


def align(supplied, out, *more):
    files = (supplied / f"{name}.pt" for name in ("my_a", "my_b", "my_a_pruned"))
    return *stage3(*files, out), "--model-fn my_nets:Net --method weight", *more


@pytest.mark.parametrize("method", ["activation", "weight", "masked"])
def test_user_supplied_networks(supplied, tmp_path, method):
    import my_nets

    images = "--dataset glyphs --image-size 16 --match-images 200"
    command = align(supplied, tmp_path, "--method", method, images * (method != "weight"))
    assert "same function" in succeed(*command)
    assert "nothing to do" in succeed(*command)
    permuted, pruned = state(tmp_path / "mask_0.50.pt"), weights(supplied / "my_a_pruned.pt")
    name = "permutation_0.50.pt" if method == "masked" else "permutation.pt"
    permutation = state(tmp_path / name)["permutation"]
    assert permutation["conv"].tolist() != list(range(6))
    blocks = {int(channel) // 3 for channel in permutation["conv"][:3]}
    assert len(blocks) == 1  # the groups of GroupNorm stay together
    mask = {"conv.weight": pruned["conv.weight_mask"].bool()}
    axes = find_axes(my_nets.Net(), (3, 16, 16))
    assert same(permuted["mask"], permute(mask, axes.dims, permutation))
    metadata = {"source_seed": "my_a", "target_seed": "my_b", "sparsity": 0.5}
    assert metadata.items() <= permuted.items()
    change = "--input-shape 3 24 24" if method == "weight" else "--match-images 100"
    refuse((*command, change), "another experiment", change.split()[0][2:].replace("-", "_"))


def test_a_buffer_that_both_networks_share_is_not_permuted(supplied, tmp_path):
    """Such as an encoding of positions, of which B keeps its own."""
    import my_nets

    for name in "ab":
        network = my_nets.not_persistent()
        torch.save(network.state_dict(), tmp_path / f"{name}.pt")
        torch.save(network.state_dict() | {"encoding": network.encoding}, tmp_path / f"{name}2.pt")
        network = my_nets.normed()
        network[1].running_mean = torch.arange(6.0)
        torch.save(network.state_dict(), tmp_path / f"{name}3.pt")
    torch.save({"mask": {"head.weight": torch.rand(8, 8) > 0.5}}, tmp_path / "mask_0.50.pt")
    flags = "--method weight --input-shape 4 --model-fn"
    ends = (tmp_path / f"{name}.pt" for name in "ab")
    out = succeed(*stage3(*ends, tmp_path, tmp_path / "o"), flags, "my_nets:not_persistent")
    assert "stem: 8 channels stay in place" in out and "fixed: 2 channels" not in out
    ends = (tmp_path / f"{name}2.pt" for name in "ab")
    command = *stage3(*ends, tmp_path, tmp_path / "o2"), flags, "my_nets:Encoded"
    refuse(command, "encoding is the same in source and target", "persistent=False")
    assert not (tmp_path / "o2").exists()
    # Statistics of a BatchNorm that was frozen are equal, too, and move.
    (tmp_path / "masks").mkdir()
    torch.save(
        {"mask": {"0.weight": torch.rand(6, 3, 3, 3) > 0.5}}, tmp_path / "masks/mask_0.50.pt"
    )
    ends = (tmp_path / f"{name}3.pt" for name in "ab")
    command = *stage3(*ends, tmp_path / "masks", tmp_path / "o3"), "--method random"
    succeed(*command, "--model-fn my_nets:normed --input-shape 3 8 8")


def test_a_bug_in_the_function_that_builds_the_network_shows_its_traceback(supplied, tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        start(*align(supplied, tmp_path / "o", "--model-fn my_nets:broken"))


def test_a_pruned_source_is_matched_as_masked_and_says_so(supplied, tmp_path):
    pruned = supplied / "my_a_pruned.pt"
    assert "is pruned" not in succeed(*align(supplied, tmp_path / "dense"))
    command = align(supplied, tmp_path / "masked", "--source", pruned)
    assert f"{pruned} is pruned" in succeed(*command)


def test_half_precision_weights_are_matched_like_their_fp32_values(supplied, tmp_path):
    permutations = []
    for dtype in (torch.half, torch.float):
        file, out = tmp_path / f"{dtype}.pt", tmp_path / str(dtype)
        values = {name: value.half() for name, value in state(supplied / "my_a.pt").items()}
        torch.save({name: value.to(dtype) for name, value in values.items()}, file)
        succeed(*align(supplied, out, "--source", file))
        permutations.append(state(out / "permutation.pt")["permutation"])
    assert same(*permutations)


def test_the_weights_and_the_mask_of_a_pruned_network():
    layer = prune.random_unstructured(nn.Linear(4, 3), "weight", 5)
    values, mask = masking.from_prune(layer.state_dict())
    assert values.keys() == {"weight", "bias"} and masking.num_kept(mask) == 12 - 5
    assert torch.equal(values["weight"], layer.weight)


def test_networks_with_parametrized_layers_and_saved_parameters(supplied, tmp_path, monkeypatch):
    """A layer's `weight` may be computed, and a state dict may hold nn.Parameters."""
    code = "from torch import nn\nfrom torch.nn.utils.parametrizations import weight_norm\n"
    code += "def net():\n    return nn.Sequential(weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), "
    code += "nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "normed.py").write_text(code)
    network = importlib.import_module("normed").net()
    torch.save(dict(network.named_parameters()), "a.pt")
    torch.save({"mask": {"2.weight": network[2].weight > 0}}, tmp_path / "mask_0.50.pt")
    torch.save(importlib.import_module("normed").net().state_dict(), "b.pt")
    command = stage3("a.pt", "b.pt", tmp_path, "out")
    succeed(*command, "--method weight --model-fn normed:net --input-shape 3 16 16")
    sparsity = state(tmp_path / "out/mask_0.50.pt")["sparsity_total"]
    assert sparsity == int((network[2].weight <= 0).sum()) / (6 * 27 + 4 * 54 + 2 * 4)


REFUSED = """\
--method activation | --dataset
--masks {supplied}/my_a.pt | no masks in | my_a.pt
--masks {broken} | holds no mask
--model-fn my_nets:Nut | my_nets:Nut | package.module:function
--target-epoch 1 | --target-epoch
--match-images 9 | --match-images
--model-fn nowhere | nowhere
--model-fn math:pi | math:pi is a float
--model-fn my_nets:one | must build a new network
--source {supplied}/my_b.pt | the same network
--masks {permuted} | permuted already
--model-fn ./my_nets.py:Net | package.module:function
--model-fn my_nets:needs | missing a required argument
--model-fn builtins:dict | returned a dict
--source {broken}/list.pt | list.pt is not a state dict
--source {broken}/saved.pt | saved.pt is not a state dict | it holds model, epoch
--model-fn my_nets:parallel | returned a DataParallel | .module
--source {broken}/nan.pt | not finite
--source {broken}/part.pt | part.pt does not fit my_nets:Net
--source {broken}/cut.pt | cut.pt does not fit my_nets:Net"""


def test_user_supplied_networks_that_do_not_fit_are_refused(supplied, tmp_path):
    plain, pruned = state(supplied / "my_a.pt"), weights(supplied / "my_a_pruned.pt")
    for name, content in (
        ("list", [1]),
        ("saved", {"model": plain, "epoch": 3}),
        ("nan", {name: value * float("nan") for name, value in plain.items()}),
        ("part", {"conv.weight": torch.zeros(6, 3, 3, 3)}),
        ("cut", pruned | {"conv.weight_mask": pruned["conv.weight_mask"][:5]}),
        ("mask_0.50", {"mask": {}}),
    ):
        torch.save(content, tmp_path / f"{name}.pt")
    permuted = tmp_path / "permuted"
    succeed(*align(supplied, permuted))
    folders = {"supplied": supplied, "broken": tmp_path, "permuted": permuted}
    for line in REFUSED.format(**folders).splitlines():
        flags, *words = line.split(" | ")
        refuse(align(supplied, tmp_path / "o", flags), *words)
    assert not (tmp_path / "o").exists()
