"""Every stage through its command line, at a tiny budget: what it writes."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from PIL import Image

import train_sparse
from common import masking
from common.axes import find_axes
from common.data import load_described
from common.models import build_model
from common.permutation import permute
from common.training import learning_rates, train
from tests.conftest import IMP, ROOT, TINY, call, refused, same, sparse, state, succeed


def test_dense_runs_keep_the_initialisation_the_asked_epochs_and_the_last(runs):
    folder = runs / "dense/seed1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "arguments.json",
        "epoch_0000.pt",
        "epoch_0001.pt",
        "epoch_0003.pt",
        "log.csv",
        "result.json",
    ]
    first = state(folder / "epoch_0000.pt")
    assert (
        set(first) == {"model", "dataset", "seed", "epoch", "state_dict"} and first["epoch"] == 0 and first["seed"] == 1
    )
    assert same(first["state_dict"], build_model(**first["model"], seed=1).state_dict())  # untrained
    log = pd.read_csv(folder / "log.csv")
    assert log["epoch"].tolist() == [1, 2, 3] and log["lr"].tolist() == pytest.approx([0.08, 0.06, 0.02])
    assert json.loads((folder / "result.json").read_text())["test_acc"] == pytest.approx(log["test_acc"].iloc[-1])
    assert {"name", "data_dir", "image_size", "limit_train", "classes", "mean", "std"} <= set(first["dataset"])


def test_a_seed_alone_equals_the_seed_after_others(runs, tmp_path):
    succeed("train_dense", *TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 1, "--out", tmp_path)
    for name in ("epoch_0001.pt", "epoch_0003.pt"):
        assert same(state(tmp_path / "seed1" / name)["state_dict"], state(runs / "dense/seed1" / name)["state_dict"])
    assert not same(
        state(runs / "dense/seed0/epoch_0003.pt")["state_dict"], state(runs / "dense/seed1/epoch_0003.pt")["state_dict"]
    )


def test_imp_meets_each_sparsity_to_one_weight_in_one_chain(runs):
    folder = runs / "imp/seed0"
    total = masking.size(state(folder / "mask_0.50.pt")["mask"])
    log = pd.read_csv(folder / "log.csv")
    kept, expected = total, []
    for goal in (0.5, 0.7):
        while kept > masking.keep_count(total, goal):
            kept = max(kept - round(0.2 * kept), masking.keep_count(total, goal))
            expected.append(kept)
    assert log["kept"].tolist() == expected and log["round"].tolist() == list(range(1, len(expected) + 1))
    dense = state(runs / "dense/seed0/epoch_0003.pt")["state_dict"]
    before = None
    for number in log["round"]:
        network = state(folder / f"round_{number:02d}.pt")
        for name, entry in network["mask"].items():
            assert (network["state_dict"][name][~entry] == 0).all()
            assert before is None or not (entry & ~before[name]).any()  # nothing pruned comes back
        before = network["mask"]
    for sparsity in (0.5, 0.7):
        masks, network = state(folder / f"mask_{sparsity:.2f}.pt"), state(folder / f"sparse_{sparsity:.2f}.pt")
        assert same(masks["mask"], network["mask"]) and masks["target_seed"] is None and masks["source_seed"] == 0
        assert abs(masking.sparsity(masks["mask"]) - sparsity) <= 0.5 / total and masks["sparsity"] == masking.sparsity(
            masks["mask"]
        )
        assert all(torch.equal(masks["signs"][name], dense[name] > 0) for name in masks["mask"])
    first = masking.prune_by_magnitude(dense, masking.dense_mask(dense, list(masks["mask"])), expected[0])
    assert same(first, state(folder / "round_01.pt")["mask"])  # the first round prunes the dense weights


def test_a_longer_chain_later_equals_the_chain_at_once(runs, tmp_path):
    succeed("prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.5, *IMP, "--out", tmp_path)
    assert not list(tmp_path.glob("round_*"))
    kept = (tmp_path / "mask_0.50.pt").stat().st_mtime_ns
    succeed("prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.5, 0.7, *IMP, "--out", tmp_path)
    assert (tmp_path / "mask_0.50.pt").stat().st_mtime_ns == kept
    for name in ("sparse_0.50.pt", "sparse_0.70.pt"):
        assert same(state(tmp_path / name)["state_dict"], state(runs / "imp/seed0" / name)["state_dict"])
    assert (
        pd.read_csv(tmp_path / "log.csv")["kept"].tolist() == pd.read_csv(runs / "imp/seed0/log.csv")["kept"].tolist()
    )
    succeed("prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.6, *IMP, "--out", tmp_path)  # between the two
    assert masking.sparsity(state(tmp_path / "mask_0.60.pt")["mask"]) == pytest.approx(0.6, abs=1e-3)


def test_imp_with_rewinding_trains_from_epoch_k_on_the_dense_schedule(runs, tmp_path):
    arguments = (
        "--dense",
        runs / "dense/seed0",
        "--sparsity",
        0.2,
        "--rewind",
        1,
        "--device",
        "cpu",
        "--precision",
        "fp32",
    )
    succeed("prune_imp", *arguments, "--out", tmp_path / "imp")  # batch size and all else are the dense run's
    found = state(tmp_path / "imp/sparse_0.20.pt")
    assert same(found["mask"], state(runs / "imp/seed0/round_01.pt")["mask"])
    # The same by hand: the masked weights of epoch 1, trained on the rest of the dense schedule.
    weights = state(runs / "dense/seed0/epoch_0001.pt")
    model = build_model(**weights["model"])
    model.load_state_dict(masking.apply(weights["state_dict"], found["mask"]))
    rates = learning_rates("cosine", 0.08, 3)[1:]
    train(
        model, load_described(weights["dataset"]), rates, name="by hand", folder=tmp_path, seed=0, batch_size=64, momentum=0.9,
        weight_decay=5e-4, precision="fp32", first_epoch=1, mask=found["mask"],
    )  # fmt: skip
    assert same(found["state_dict"], model.state_dict())
    refused(call("prune_imp", *arguments, "--lr", 1, "--out", tmp_path / "o"), "--rewind")


def test_one_shot_prunes_in_a_single_round(runs, tmp_path):
    succeed("prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.5, 0.7, "--one-shot", *IMP, "--out", tmp_path)
    dense = state(runs / "dense/seed0/epoch_0003.pt")["state_dict"]
    for sparsity in (0.5, 0.7):
        mask = state(tmp_path / f"mask_{sparsity:.2f}.pt")["mask"]
        expected = masking.prune_by_magnitude(
            dense, masking.dense_mask(dense, list(mask)), masking.keep_count(masking.size(mask), sparsity)
        )
        assert same(mask, expected)
    assert pd.read_csv(tmp_path / "log.csv")["round"].tolist() == [1, 1]


def test_alignment_permutes_masks_and_signs_by_the_saved_permutation(runs):
    folder = runs / "align/activation/seed0-seed1"
    source = state(runs / "dense/seed0/epoch_0003.pt")
    axes = find_axes(build_model(**source["model"]), source["model"]["input_shape"])
    permutation = state(folder / "permutation.pt")["permutation"]
    assert {axis: len(index) for axis, index in permutation.items()} == axes.sizes
    before, after = state(runs / "imp/seed0/mask_0.70.pt"), state(folder / "mask_0.70.pt")
    for part in ("mask", "signs"):
        assert same(after[part], permute(before[part], axes.dims, permutation)) and not same(after[part], before[part])
    assert (after["source_seed"], after["target_seed"], after["method"], after["match_epoch"]) == (
        0,
        1,
        "activation",
        3,
    )
    assert after["sparsity"] == before["sparsity"] == masking.sparsity(after["mask"])
    log = pd.read_csv(folder / "log.csv", dtype={"axis": str})
    assert log["axis"].tolist() == list(axes.sizes) and (log["after"] > log["before"]).all() and log["moved"].sum() > 0


def test_sparse_runs_train_the_asked_weights_under_the_asked_mask(runs):
    for arm, pair, masks in (
        ("lth", "seed0-seed0", "imp/seed0"),
        ("naive", "seed0-seed1", "imp/seed0"),
        ("permuted", "seed0-seed1", "align/activation/seed0-seed1"),
    ):
        folder = runs / f"sparse/{arm}/{pair}/s0.70_k001"
        final, mask = state(folder / "final.pt"), state(runs / masks / "mask_0.70.pt")["mask"]
        assert same(final["mask"], mask)
        assert all(
            (final["state_dict"][name][~entry] == 0).all() and final["state_dict"][name][entry].ne(0).any()
            for name, entry in mask.items()
        )
        assert pd.read_csv(folder / "log.csv")["epoch"].tolist() == [2, 3]  # T - k epochs, on a fresh schedule
        assert pd.read_csv(folder / "log.csv")["lr"].tolist() == pytest.approx([0.02, 0.01])
        arguments = json.loads((folder / "result.json").read_text())["arguments"]
        assert (arguments["arm"], arguments["source_seed"], arguments["target_seed"], arguments["rewind"]) == (
            arm,
            0,
            int(pair[-1]),
            1,
        )


def test_every_method_permutes_consistently_and_says_what_it_gained(runs, aligned):
    source = state(runs / "dense/seed0/epoch_0003.pt")
    axes = find_axes(build_model(**source["model"]), source["model"]["input_shape"])
    gains = {}
    for method in ("weight", "masked", "random", "identity"):
        name = "permutation_0.70.pt" if method == "masked" else "permutation.pt"
        found = state(aligned / method / name)
        before, after = state(runs / "imp/seed0/mask_0.70.pt"), state(aligned / method / "mask_0.70.pt")
        assert after["method"] == method and same(
            after["mask"], permute(before["mask"], axes.dims, found["permutation"])
        )
        gains[method] = found["objective"]
    assert gains["weight"][1] > gains["random"][1] and gains["weight"][1] > gains["weight"][0]
    assert gains["masked"][1] > gains["masked"][0] and gains["identity"][0] == gains["identity"][1]
    assert gains["masked"][0] != gains["weight"][0]  # the pruned source has another inner product
    assert {path.name for path in (aligned / "masked").glob("permutation*")} == {
        "permutation_0.50.pt",
        "permutation_0.70.pt",
    }


def test_controls_start_from_what_they_say(runs, aligned, tmp_path):
    imp = runs / "imp/seed0"
    target = state(runs / "dense/seed1/epoch_0000.pt")["state_dict"]
    cell = ("--sparsity", 0.7, "--rewind", 0)
    for arm, weights, masks, more in (
        ("shuffled", 1, imp, ()), ("random-permutation", 1, aligned / "random", ()), ("imp-target", 0, imp, ()),
        ("permuted", 1, aligned / "masked", ("--signs",)), ("naive", 1, imp, ("--signs", "--fan-in")),
    ):  # fmt: skip
        outcome = sparse(arm, runs / f"dense/seed{weights}", masks, tmp_path / arm, *cell, *more)
        assert outcome.code == 0, outcome.err
    mask = state(imp / "mask_0.70.pt")["mask"]
    shuffled = state(tmp_path / "shuffled/s0.70_k000/final.pt")["mask"]
    assert {name: int(e.sum()) for name, e in mask.items()} == {name: int(e.sum()) for name, e in shuffled.items()}
    assert not same(mask, shuffled)
    masks = state(aligned / "masked/mask_0.70.pt")
    start = train_sparse.start_weights(target, masks, signs=True, fan_in=False)
    for name, entry in masks["mask"].items():
        assert torch.equal(start[name][entry] > 0, masks["signs"][name][entry]) and (start[name][~entry] == 0).all()
        assert torch.equal(start[name][entry].abs(), target[name][entry].abs())
    arguments = json.loads((tmp_path / "naive/s0.70_k000/result.json").read_text())["arguments"]
    assert arguments["signs"] and arguments["fan_in"] and arguments["mask_dataset"] == "glyphs"


def test_early_matching_uses_the_targets_early_weights(runs, tmp_path):
    ends = ("--source", runs / "dense/seed0", "--target", runs / "dense/seed1", "--masks", runs / "imp/seed0")
    succeed("align_mask", *ends, "--target-epoch", 1, "--device", "cpu", "--out", tmp_path / "early")
    early, late = state(tmp_path / "early/permutation.pt"), state(runs / "align/activation/seed0-seed1/permutation.pt")
    assert early["match_epoch"] == 1 and not same(early["permutation"], late["permutation"])


def test_the_seed_of_stage_4_changes_the_data_order_and_nothing_else(runs, tmp_path):
    ends = ("naive", runs / "dense/seed1", runs / "imp/seed0")
    cell = ("--sparsity", 0.5, "--rewind", 1)
    assert sparse(*ends, tmp_path / "same", *cell, "--seed", 1).code == 0
    assert sparse(*ends, tmp_path / "other", *cell, "--seed", 7).code == 0
    before = state(runs / "sparse/naive/seed0-seed1/s0.50_k001/final.pt")["state_dict"]
    assert same(state(tmp_path / "same/s0.50_k001/final.pt")["state_dict"], before)  # by default that of the weights
    assert not same(state(tmp_path / "other/s0.50_k001/final.pt")["state_dict"], before)
    assert "seed is 7 there" in sparse(*ends, tmp_path / "other", *cell).err


def test_a_folder_is_the_same_with_a_slash_at_its_end(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.effect_noise((8, 8), 50).convert("RGB").save(tmp_path / split / name / f"{i}.png")
    flags = ["--dataset", "folder", "--model", "mlp", "--width", 1 / 64, "--epochs", 1, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "out"]  # fmt: skip
    succeed("train_dense", *flags, "--data-dir", tmp_path)
    assert "nothing to do" in succeed("train_dense", *flags, "--data-dir", f"{tmp_path}/")


def test_imagenet_trains_in_a_process_of_its_own(tmp_path):
    """Beside a CPU-only torch, torchvision must come in through common/vision.py alone."""
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (40 * i, 9, 90)).save(tmp_path / split / name / f"{i}.png")
    flags = f"--dataset imagenet --data-dir {tmp_path} --workers 0 --model mlp --width 0.015625 --epochs 1 --batch-size 2".split()
    command = [sys.executable, str(ROOT / "train_dense.py"), *flags, "--warmup", "0", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/seed0/result.json").read_text())
    assert result["test_top5"] == 100  # of two classes
    assert "test_top5" in (tmp_path / "out/seed0/log.csv").read_text()
