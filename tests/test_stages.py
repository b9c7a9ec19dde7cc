"""Every stage through its command line, at a tiny budget: what it writes."""

import subprocess
import sys

import pandas as pd
import pytest
import torch

import train_sparse
from common import masking
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import Resident, load_described, stage_seed
from common.models import build_model
from common.training import learning_rates, train
from tests.conftest import (
    FAST,
    ROOT,
    refuse,
    result,
    same,
    save_pictures,
    sgd,
    stage1,
    stage2,
    stage3,
    stage4,
    state,
    succeed,
    weights,
)


def files(folder, pattern="*"):
    return {path.name for path in folder.glob(pattern)}


def test_dense_runs_keep_the_initialisation_the_asked_epochs_and_the_last(runs):
    folder = runs / "dense/seed1"
    kept = {f"epoch_000{epoch}.pt" for epoch in (0, 1, 3)}
    assert files(folder) == kept | {"arguments.json", "log.csv", "result.json"}
    first = state(folder / "epoch_0000.pt")
    assert {"model", "dataset", "seed", "epoch", "state_dict", "code", "commit", "tag"} == set(
        first
    )
    assert (first["epoch"], first["seed"], first["tag"]) == (0, 1, None)
    untrained = build_model(**first["model"], seed=1).state_dict()
    assert same(first["state_dict"], untrained)
    log = pd.read_csv(folder / "log.csv")
    assert log["epoch"].tolist() == [1, 2, 3]
    assert log["lr"].tolist() == pytest.approx([0.08, 0.06, 0.02])
    assert result(folder)["test_acc"] == pytest.approx(log["test_acc"].iloc[-1])
    about = {"name", "data_dir", "image_size", "limit_train", "classes", "mean", "std"}
    assert about <= set(first["dataset"])


def test_a_seed_alone_equals_the_seed_after_others(runs, tmp_path):
    succeed(*stage1(tmp_path, "--seed", 1))
    for name in ("seed1/epoch_0001.pt", "seed1/epoch_0003.pt"):
        assert same(weights(tmp_path / name), weights(runs / "dense" / name))
    zero, one = (weights(runs / f"dense/seed{seed}/epoch_0003.pt") for seed in (0, 1))
    assert not same(zero, one)


def test_imp_prunes_20_percent_a_round_and_branches_off_to_each_sparsity(runs):
    folder, dense = runs / "imp/seed0", weights(runs / "dense/seed0/epoch_0003.pt")
    total = 3744
    chain = [total, 2995, 2396, 1917, 1534, 1227]  # less 20%, to the nearest weight
    goals = {0.5: (3, 1872), 0.7: (5, 1123)}  # the last round that keeps more, and the weights kept
    log = pd.read_csv(folder / "log.csv")
    assert log["kept"].tolist() == sorted(chain[1:] + [1872, 1123], reverse=True)
    everything = masking.dense_mask(dense, [*state(folder / "mask_0.50.pt")["mask"]])
    networks = [{"mask": everything, "state_dict": dense}]
    networks += [state(folder / f"round_{number:02d}.pt") for number in range(1, 6)]
    assert networks[-1]["round"] == state(folder / "chain.pt")["round"] == 5

    def check_pruned(before, after, keep):
        expected = masking.prune_by_magnitude(before["state_dict"], before["mask"], keep)
        assert same(after["mask"], expected) and masking.kept(expected) == keep
        for name, entry in after["mask"].items():
            assert (after["state_dict"][name][~entry] == 0).all()

    for before, after, keep in zip(networks, networks[1:], chain[1:]):
        check_pruned(before, after, keep)
    for sparsity, (number, keep) in goals.items():
        masks, network = (
            state(folder / f"{kind}_{sparsity:.2f}.pt") for kind in ("mask", "sparse")
        )
        check_pruned(networks[number], network, keep)
        assert network["round"] == number + 1 and same(masks["mask"], network["mask"])
        assert (masks["source_seed"], masks["target_seed"], masks["tag"]) == (0, None, None)
        assert masks["sparsity"] == 1 - keep / total and "code" in masks
        assert same(masks["signs"], masking.signs(dense, [*everything]))


def test_no_stage_sees_the_batches_of_another_and_arms_of_a_pair_share_theirs(
    runs, tmp_path, monkeypatch
):
    seen, draw = [], Resident.draw

    def recorded(data, seed, epoch):
        drawn = draw(data, seed, epoch)
        seen.append((epoch, tuple(drawn[0].tolist())))
        return drawn

    def orders(command, *more):
        seen.clear()
        succeed(*command, *more)
        return set(seen)

    monkeypatch.setattr(Resident, "draw", recorded)
    masks, one = runs / "imp/seed0", ("--sparsity", 0.5, "--rewind", 0)
    dense, target = orders(stage1(tmp_path / "dense")), runs / "dense/seed1"
    flags = ("--dense", runs / "dense/seed0", "--sparsity", 0.2, "--rewind", 0, "--device", "cpu")
    pruned = orders(("prune_imp", *flags, "--out", tmp_path / "imp"))
    lth = orders(stage4("lth", runs / "dense/seed0", masks, tmp_path / "lth"), *one)
    naive = orders(stage4("naive", target, masks, tmp_path / "naive"), *one)
    aligned = runs / "align/activation/seed0-seed1"
    permuted = orders(stage4("permuted", target, aligned, tmp_path / "permuted"), *one)
    assert {epoch for epoch, _ in dense} == {epoch for epoch, _ in lth} == {0, 1, 2}
    assert not dense & lth and not dense & pruned and not pruned & lth
    assert naive == permuted and not naive & lth


def test_imp_with_rewinding_trains_from_epoch_k_on_the_dense_schedule(runs, tmp_path):
    command = ("prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.2, "--rewind", 1)
    command += ("--device", "cpu", "--precision", "fp32", "--out", tmp_path / "imp")
    succeed(*command)  # batch size and all else are the dense run's
    found = state(tmp_path / "imp/sparse_0.20.pt")
    assert same(found["mask"], state(runs / "imp/seed0/round_01.pt")["mask"])
    # The same by hand: the masked weights of epoch 1, trained on the rest of the dense schedule.
    dense = state(runs / "dense/seed0/epoch_0001.pt")
    model, data = build_model(**dense["model"]), load_described(dense["dataset"])
    model.load_state_dict(masking.apply(dense["state_dict"], found["mask"]))
    train(
        model,
        data,
        learning_rates("cosine", 0.08, 3)[1:],
        make_optimiser=sgd(0.9, 5e-4),
        name="by hand",
        folder=None,
        seed=stage_seed(0, "imp"),
        batch_size=64,
        precision="fp32",
        first_epoch=1,
        mask=found["mask"],
    )
    assert same(found["state_dict"], model.state_dict())
    refuse((*command, "--lr", 1), "--rewind")


def test_one_shot_prunes_in_a_single_round(runs, tmp_path):
    succeed(*stage2(runs / "dense/seed0", tmp_path, "--one-shot"))
    dense = weights(runs / "dense/seed0/epoch_0003.pt")
    for sparsity, keep in ((0.5, 1872), (0.7, 1123)):
        mask = state(tmp_path / f"mask_{sparsity:.2f}.pt")["mask"]
        everything = masking.dense_mask(dense, [*mask])
        assert same(mask, masking.prune_by_magnitude(dense, everything, keep))
    assert pd.read_csv(tmp_path / "log.csv")["round"].tolist() == [1, 1]


def axes_of_source(runs):
    shape = state(runs / "dense/seed0/epoch_0003.pt")["model"]
    return find_axes(build_model(**shape), shape["input_shape"])


def test_alignment_permutes_masks_and_signs_by_the_saved_permutation(runs):
    folder, axes = runs / "align/activation/seed0-seed1", axes_of_source(runs)
    permutation = state(folder / "permutation.pt")["permutation"]
    assert {axis: len(index) for axis, index in permutation.items()} == axes.sizes
    before, after = (state(place / "mask_0.70.pt") for place in (runs / "imp/seed0", folder))
    for part in ("mask", "signs"):
        assert same(after[part], permute(before[part], axes.dims, permutation))
        assert not same(after[part], before[part])
    made = {"source_seed": 0, "target_seed": 1, "method": "activation", "match_epoch": 3}
    assert made.items() <= after.items()
    assert after["sparsity"] == before["sparsity"] == masking.sparsity(after["mask"])
    log = pd.read_csv(folder / "log.csv", dtype={"axis": str})
    assert log["axis"].tolist() == list(axes.sizes)
    assert (log["after"] > log["before"]).all() and log["moved"].sum() > 0


@pytest.mark.parametrize(
    "arm, target, masks",
    [
        ("lth", 0, "imp/seed0"),
        ("naive", 1, "imp/seed0"),
        ("permuted", 1, "align/activation/seed0-seed1"),
    ],
)
def test_sparse_runs_train_the_asked_weights_under_the_asked_mask(runs, arm, target, masks):
    folder = runs / f"sparse/{arm}/seed0-seed{target}/s0.70_k001"
    final, mask = state(folder / "final.pt"), state(runs / masks / "mask_0.70.pt")["mask"]
    assert same(final["mask"], mask)
    for name, entry in mask.items():
        values = final["state_dict"][name]
        assert (values[~entry] == 0).all() and values[entry].ne(0).any()
    log = pd.read_csv(folder / "log.csv")
    assert log["epoch"].tolist() == [2, 3]  # T - k epochs, on a fresh schedule
    assert log["lr"].tolist() == pytest.approx([0.02, 0.01])
    asked = {"arm": arm, "source_seed": 0, "target_seed": target, "rewind": 1}
    assert asked.items() <= result(folder)["arguments"].items()


def test_every_method_permutes_consistently_and_says_what_it_gained(runs, aligned):
    axes, before = axes_of_source(runs), state(runs / "imp/seed0/mask_0.70.pt")
    gains = {}
    for method in ("weight", "masked", "random", "identity"):
        name = "permutation_0.70.pt" if method == "masked" else "permutation.pt"
        found, after = (state(aligned / method / file) for file in (name, "mask_0.70.pt"))
        assert after["method"] == method
        assert same(after["mask"], permute(before["mask"], axes.dims, found["permutation"]))
        gains[method] = found["objective"]
    assert gains["weight"][1] > max(gains["random"][1], gains["weight"][0])
    assert gains["masked"][1] > gains["masked"][0] and len({*gains["identity"]}) == 1
    assert gains["masked"][0] != gains["weight"][0]  # the pruned source has another inner product
    one_each = {f"permutation_{sparsity}.pt" for sparsity in ("0.50", "0.70")}
    assert files(aligned / "masked", "permutation*") == one_each


def test_controls_start_from_what_they_say(runs, aligned, tmp_path):
    imp = runs / "imp/seed0"
    for arm, seed, masks, more in (
        ("shuffled", 1, imp, ()),
        ("random-permutation", 1, aligned / "random", ()),
        ("imp-target", 0, imp, ()),
        ("permuted", 1, aligned / "masked", ("--signs",)),
        ("naive", 1, imp, ("--signs", "--fan-in")),
    ):
        command = stage4(arm, runs / f"dense/seed{seed}", masks, tmp_path / arm, *more)
        succeed(*command, "--sparsity", 0.7, "--rewind", 0)
    mask = state(imp / "mask_0.70.pt")["mask"]
    shuffled = state(tmp_path / "shuffled/s0.70_k000/final.pt")["mask"]
    assert not same(mask, shuffled)
    for name, entry in mask.items():
        assert entry.sum() == shuffled[name].sum()
    masks, target = (
        state(aligned / "masked/mask_0.70.pt"),
        weights(runs / "dense/seed1/epoch_0000.pt"),
    )
    start = train_sparse.start_weights(target, masks, signs=True, fan_in=False)
    for name, entry in masks["mask"].items():
        assert torch.equal(start[name][entry] > 0, masks["signs"][name][entry])
        assert torch.equal(start[name].abs(), target[name].abs() * entry)
    arguments = result(tmp_path / "naive/s0.70_k000")["arguments"]
    assert arguments["signs"] and arguments["fan_in"] and arguments["mask_dataset"] == "glyphs"


def test_early_matching_uses_the_targets_early_weights(runs, ends, tmp_path):
    succeed(*stage3(*ends, tmp_path, "--target-epoch", 1))
    late = state(runs / "align/activation/seed0-seed1/permutation.pt")["permutation"]
    early = state(tmp_path / "permutation.pt")
    assert early["match_epoch"] == 1 and not same(early["permutation"], late)


def test_the_seed_of_stage_4_changes_the_data_order_and_nothing_else(runs, tmp_path):
    before = weights(runs / "sparse/naive/seed0-seed1/s0.50_k001/final.pt")
    for seed in (1, 7):  # by default that of the weights, 1
        out = tmp_path / str(seed)
        command = stage4("naive", runs / "dense/seed1", runs / "imp/seed0", out)
        command += ("--sparsity", 0.5, "--rewind", 1)
        succeed(*command, "--seed", seed)
        assert same(weights(out / "s0.50_k001/final.pt"), before) == (seed == 1)
    refuse(command, "seed is 7 there")


def test_a_folder_is_the_same_with_a_slash_at_its_end(tmp_path):
    save_pictures(tmp_path, (8, 8), train=3, test=3)
    own = ("--dataset", "folder", "--model", "mlp", "--width", 1 / 64, "--epochs", 1)
    own += (*FAST, "--batch-size", 2, "--out", tmp_path / "out")
    succeed("train_dense", *own, "--data-dir", tmp_path)
    assert "nothing to do" in succeed("train_dense", *own, "--data-dir", f"{tmp_path}/")


def test_imagenet_trains_in_a_process_of_its_own(tmp_path):
    """Beside a CPU-only torch, torchvision must come in through common/vision.py alone."""
    save_pictures(tmp_path, (30, 40), train=3, val=1)
    flags = "--dataset imagenet --workers 0 --model mlp --width 0.015625 --epochs 1 --batch-size 2"
    flags += f" --warmup 0 --data-dir {tmp_path} --out {tmp_path}/out"
    command = [sys.executable, str(ROOT / "train_dense.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "out/seed0")["test_top5"] == 100  # of two classes
    assert "test_top5" in (tmp_path / "out/seed0/log.csv").read_text()
