"""Stage 3 beyond the paper's setting: other statistics, and networks that these scripts did not train."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from common import masking
from common.axes import find_axes
from common.permutation import permute
from tests.conftest import call, refused, same, state, succeed


@pytest.fixture(scope="module")
def ends(runs):
    return (
        "--source",
        runs / "dense/seed0",
        "--target",
        runs / "dense/seed1",
        "--masks",
        runs / "imp/seed0",
        "--device",
        "cpu",
    )


@pytest.mark.parametrize("flags, label", [
    (("--match-on", "pre"), "activation-pre"),
    (("--statistic", "covariance"), "activation-covariance"),
    (("--stream", "mean"), "activation-mean"),
    (("--match-on", "pre", "--statistic", "covariance"), "activation-pre-covariance"),
])  # fmt: skip
def test_other_statistics_give_another_permutation_and_a_name_of_their_own(runs, ends, tmp_path, flags, label):
    succeed("align_mask", *ends, *flags, "--out", tmp_path)
    found, usual = state(tmp_path / "permutation.pt"), state(runs / "align/activation/seed0-seed1/permutation.pt")
    assert found["method"] == state(tmp_path / "mask_0.70.pt")["method"] == label
    same = all(torch.equal(index, usual["permutation"][axis]) for axis, index in found["permutation"].items())
    assert same == (label == "activation-mean")  # an mlp has no stream
    refused(call("align_mask", *ends, "--out", tmp_path), "method", label)


def test_what_does_not_go_together_is_refused(ends, tmp_path):
    refused(call("align_mask", *ends, "--method", "weight", "--match-on", "pre", "--out", tmp_path), "--match-on")
    refused(call("align_mask", *ends, "--dataset", "glyphs", "--out", tmp_path), "--model-fn")
    refused(call("align_mask", *ends[:4], "--out", tmp_path), "--masks")


# ---------------------------------------------------------------- networks of one's own

MODULE = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A module that is no model of ours, two state dicts, and the first of them pruned by torch."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_nets.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    import my_nets

    for seed, name in enumerate(("my_a", "my_b")):
        torch.manual_seed(seed)
        torch.save(my_nets.Net().state_dict(), folder / f"{name}.pt")
    pruned = my_nets.Net()
    pruned.load_state_dict(state(folder / "my_a.pt"))
    prune.l1_unstructured(pruned.conv, "weight", 0.5)
    torch.save({"state_dict": pruned.state_dict()}, folder / "my_a_pruned.pt")
    yield folder
    sys.path.remove(str(folder))


@pytest.mark.parametrize("method", ["activation", "weight", "masked"])
def test_networks_of_ones_own(own, tmp_path, method):
    import my_nets

    images = () if method == "weight" else ("--dataset", "glyphs", "--image-size", 16, "--match-images", 200)
    out = succeed(
        "align_mask", "--source", own / "my_a.pt", "--target", own / "my_b.pt", "--masks", own / "my_a_pruned.pt",
        "--model-fn", "my_nets:Net", "--method", method, *images, "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert "same function" in out
    found, pruned = state(tmp_path / "mask_0.50.pt"), state(own / "my_a_pruned.pt")["state_dict"]
    permutation = state(tmp_path / ("permutation_0.50.pt" if method == "masked" else "permutation.pt"))["permutation"]
    assert permutation["conv"].tolist() != list(range(6))
    assert {int(channel) // 3 for channel in permutation["conv"][:3]} in ({0}, {1})  # GroupNorm's blocks stay together
    before = {"conv.weight": pruned["conv.weight_mask"].bool()}
    assert torch.equal(
        found["mask"]["conv.weight"],
        permute(before, find_axes(my_nets.Net(), (3, 16, 16)).dims, permutation)["conv.weight"],
    )
    assert (found["source_seed"], found["target_seed"], found["sparsity"]) == ("my_a", "my_b", 0.5)
    # Back into torch's form, for one's own training of B.
    network = my_nets.Net()
    prune.identity(network.conv, "weight")
    network.load_state_dict(masking.to_prune(state(own / "my_b.pt"), found["mask"]))
    assert torch.equal(network.conv.weight_mask.bool(), found["mask"]["conv.weight"])
    again = call(
        "align_mask", "--source", own / "my_a.pt", "--target", own / "my_b.pt", "--masks", own / "my_a_pruned.pt",
        "--model-fn", "my_nets:Net", "--method", method, *images, "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert "nothing to do" in again.out
    if method == "weight":
        other = call(
            "align_mask", "--source", own / "my_a.pt", "--target", own / "my_b.pt", "--masks", own / "my_a_pruned.pt",
            "--model-fn", "my_nets:Net", "--method", method, "--input-shape", 3, 24, 24, "--device", "cpu", "--out", tmp_path,
        )  # fmt: skip
        refused(other, "another experiment", "input_shape")


def test_weights_of_half_precision_are_matched_as_their_values(own, tmp_path):
    for name in ("my_a", "my_b"):
        half = {key: value.half() for key, value in state(own / f"{name}.pt").items()}
        values = {key: value.float() for key, value in half.items()}
        torch.save(half if name == "my_a" else values, tmp_path / f"{name}.pt")
        (tmp_path / "float").mkdir(exist_ok=True)
        torch.save(values, tmp_path / f"float/{name}.pt")
    found = []
    for folder in (tmp_path, tmp_path / "float"):
        ends = "--source", folder / "my_a.pt", "--target", folder / "my_b.pt", "--masks", own / "my_a_pruned.pt"
        more = "--model-fn", "my_nets:Net", "--method", "weight", "--device", "cpu", "--out", folder / "out"
        succeed("align_mask", *ends, *more)
        found.append(state(folder / "out/permutation.pt")["permutation"])
    assert same(*found)


def test_a_pruned_state_dict_and_back():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    prune.random_unstructured(module[0], "weight", 5)
    pruned = module.state_dict()
    weights, mask = masking.from_prune(pruned)
    assert weights.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"} and masking.kept(mask) == 12 - 5
    assert torch.equal(weights["0.weight"], pruned["0.weight_orig"] * pruned["0.weight_mask"])
    back = masking.to_prune(weights | {"0.weight": pruned["0.weight_orig"]}, mask)
    assert back.keys() == pruned.keys() and all(torch.equal(back[name], value) for name, value in pruned.items())


def test_own_networks_that_do_not_fit_are_refused(own, tmp_path):
    ends = ("--source", own / "my_a.pt", "--target", own / "my_b.pt", "--out", tmp_path / "o", "--device", "cpu")
    fn, weight = ("--model-fn", "my_nets:Net"), ("--method", "weight")
    refused(call("align_mask", *ends, *fn), "--dataset")
    refused(call("align_mask", *ends, *fn, *weight), "no masks in", "my_a.pt")
    refused(call("align_mask", *ends, "--model-fn", "my_nets:Nut", *weight), "my_nets:Nut", "package.module:function")
    refused(call("align_mask", *ends, "--model-fn", "nowhere", *weight), "nowhere")
    refused(call("align_mask", *ends, "--model-fn", "math:pi", *weight), "math:pi")
    refused(call("align_mask", *ends, "--model-fn", "builtins:dict", *weight), "made a dict")
    torch.save([1], tmp_path / "list.pt")
    refused(call("align_mask", "--source", tmp_path / "list.pt", *ends[2:], *fn, *weight), "list.pt is no state dict")
    torch.save({name: value * float("nan") for name, value in state(own / "my_a.pt").items()}, tmp_path / "nan.pt")
    refused(call("align_mask", "--source", tmp_path / "nan.pt", *ends[2:], *fn, *weight), "not finite")
    torch.save({"mask": {}}, tmp_path / "mask_0.50.pt")
    refused(call("align_mask", *ends, *fn, *weight, "--masks", tmp_path), "holds no mask")
    torch.save({"conv.weight": torch.zeros(6, 3, 3, 3)}, tmp_path / "part.pt")
    outcome = call("align_mask", "--source", tmp_path / "part.pt", *ends[2:], *fn, *weight)
    refused(outcome, "part.pt does not fit my_nets:Net")
    assert not (tmp_path / "o").exists()
