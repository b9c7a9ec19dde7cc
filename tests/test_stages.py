"""What each stage writes when called through its command line, at a tiny budget."""

import shutil
import subprocess
import sys

import pandas as pd
import pytest

from common import data, masking
from common.align.axes import find_axes
from common.align.matching import match_weights
from common.align.permutation import permute
from common.data import glyphs, load_data, stage_seed
from common.models import build_model
from common.training import learning_rates, train
from tests.conftest import (
    ROOT,
    imagenet1,
    refuse,
    result,
    same,
    save_images,
    sgd,
    stage1,
    stage2,
    stage3,
    stage4,
    state,
    succeed,
    weights,
    words,
)

ALIGNED = "align/activation/seed0-seed1"
RATES = learning_rates("cosine", 0.08, 3)  # of the dense runs


def train_by_hand(start, epoch, stage, rates, mask=None, seed=0, optimiser=sgd(0.9, 5e-4)):
    """Return the weights that a stage should get when it trains from a checkpoint and an epoch."""
    model, data = build_model(**start["model"]), load_data(start["dataset"])
    model.load_state_dict(masking.apply(start["state_dict"], mask or {}))
    settings = {"name": "by hand", "folder": None, "batch_size": 64, "precision": "fp32"}
    settings |= {"make_optimiser": optimiser, "seed": stage_seed(seed, stage)}
    train(model, data, rates, first_epoch=epoch, mask=mask, **settings)
    return model.state_dict()


def test_dense_runs_save_the_initialisation_the_requested_epochs_and_the_last(runs):
    folder = runs / "dense/seed1"
    files = "epoch_0000.pt epoch_0001.pt epoch_0003.pt arguments.json log.csv result.json"
    assert {path.name for path in folder.iterdir()} == set(files.split())
    first, last = (state(folder / f"epoch_000{epoch}.pt") for epoch in (0, 3))
    assert set(first) == {*"model dataset seed epoch state_dict code commit tag".split()}
    assert [(saved["seed"], saved["epoch"]) for saved in (first, last)] == [(1, 0), (1, 3)]
    assert same(first["state_dict"], build_model(**first["model"], seed=1).state_dict())
    # A seed gives the same weights as when it is trained alone.
    assert same(last["state_dict"], train_by_hand(first, 0, "dense", RATES, seed=1))
    log = pd.read_csv(folder / "log.csv")
    assert log["epoch"].tolist() == [1, 2, 3]
    assert log["lr"].tolist() == pytest.approx(RATES) == [0.08, 0.06, 0.02]
    assert result(folder)["test_acc"] == pytest.approx(log["test_acc"].iloc[-1])


def test_imp_prunes_20_percent_per_round_and_branches_off_to_each_sparsity(runs):
    folder, dense = runs / "imp/seed0", state(runs / "dense/seed0/epoch_0003.pt")
    chain = [3744, 2995, 2396, 1917, 1534, 1227]  # minus 20% each, rounded
    log = pd.read_csv(folder / "log.csv")
    assert log["kept"].tolist() == sorted(chain[1:] + [1872, 1123], reverse=True)
    names = [*state(folder / "mask_0.50.pt")["mask"]]
    networks = [dense | {"mask": masking.dense_mask(dense["state_dict"], names), "round": 0}]
    networks += [state(folder / f"round_{number:02d}.pt") for number in range(1, 6)]
    rounds = [*zip(networks, networks[1:], chain[1:])]
    # A sparsity branches off the last round that keeps more weights.
    for sparsity, last, keep in (("0.50", networks[3], 1872), ("0.70", networks[5], 1123)):
        mask_info = state(folder / f"mask_{sparsity}.pt")
        network = state(folder / f"sparse_{sparsity}.pt")
        rounds.append((last, network, keep))
        assert same(mask_info["mask"], network["mask"])
        expected = {"source_seed": 0, "target_seed": None, "sparsity": 1 - keep / chain[0]}
        assert expected.items() <= mask_info.items()
        assert same(mask_info["signs"], masking.signs(dense["state_dict"], names))
    for before, network, keep in rounds:
        number = network["round"]
        mask = masking.prune_by_magnitude(before["state_dict"], before["mask"], keep)
        assert number == before["round"] + 1 and same(network["mask"], mask)
        # Every round has epoch numbers, and so a data order, of its own.
        assert same(network["state_dict"], train_by_hand(before, 2 + number, "imp", [0.01], mask))


def test_rounds_of_several_epochs_continue_the_count_of_epochs(runs, tmp_path):
    flags = "--epochs 2 --sparsity 0.3 --keep-rounds"
    succeed(*stage2(runs / "dense/seed0", tmp_path, flags))
    first, second = (state(tmp_path / name) for name in ("round_01.pt", "sparse_0.30.pt"))
    rates = learning_rates("cosine", 0.01, 2)
    expected = train_by_hand(first, 3 + 2, "imp", rates, second["mask"])
    assert same(second["state_dict"], expected)


def test_hyperparameters_of_stage_4_are_those_of_the_flags(runs, ends, tmp_path):
    flags = "--sparsity 0.5 --rewind 1 --epochs 5 --warmup 2 --schedule step --lr 0.03"
    flags += " --weight-decay 0 --momentum 0.5"
    succeed(*stage4("naive", *ends[1:], tmp_path, flags))
    mask, start = state(ends[2] / "mask_0.50.pt")["mask"], state(ends[1] / "epoch_0001.pt")
    rates = [0.015, 0.03, 0.03, 0.03]
    expected = train_by_hand(start, 1, "sparse", rates, mask, seed=1, optimiser=sgd(0.5, 0))
    assert same(weights(tmp_path / "s0.50_k001/final.pt"), expected)


def test_no_stage_sees_the_batches_of_another():
    assert len({stage_seed(0, stage) for stage in ("dense", "imp", "sparse")}) == 3


def test_imp_with_rewinding_trains_from_epoch_k_on_the_dense_schedule(runs, tmp_path):
    flags = "--sparsity 0.2 --rewind 1 --device cpu --precision fp32"
    # The batch size and other hyperparameters are the dense run's.
    succeed("prune_imp", flags, f"--dense {runs}/dense/seed0 --out {tmp_path}")
    pruned = state(tmp_path / "sparse_0.20.pt")
    assert same(pruned["mask"], state(runs / "imp/seed0/round_01.pt")["mask"])
    start = state(runs / "dense/seed0/epoch_0001.pt")
    expected = train_by_hand(start, 1, "imp", RATES[1:], pruned["mask"])
    assert same(pruned["state_dict"], expected)


def test_one_shot_prunes_in_a_single_round(runs, tmp_path):
    succeed(*stage2(runs / "dense/seed0", tmp_path, "--one-shot"))
    log = pd.read_csv(tmp_path / "log.csv")
    assert log[["round", "kept"]].to_numpy().tolist() == [[1, 1872], [1, 1123]]


def test_every_method_permutes_masks_and_signs_by_the_saved_permutation(runs, ends, aligned):
    source, _, imp = ends
    model, before = state(source / "epoch_0003.pt")["model"], state(imp / "mask_0.70.pt")
    axes, objectives = find_axes(build_model(**model), model["input_shape"]), {}
    for folder in (runs / ALIGNED, *aligned.iterdir()):
        name = "permutation_0.70.pt" if folder.name == "masked" else "permutation.pt"
        saved, after = (state(folder / file) for file in (name, "mask_0.70.pt"))
        permutation, method = saved["permutation"], after["method"]
        objectives[method] = saved["objective"]
        for key in ("mask", "signs"):
            assert same(after[key], permute(before[key], axes.dims, permutation))
            assert same(after[key], before[key]) == (method == "identity")
        expected = {"source_seed": 0, "target_seed": 1, "match_epoch": 3}
        assert expected.items() <= after.items() and after["sparsity"] == before["sparsity"]
    assert objectives["weight"][1] > max(objectives["random"][1], objectives["weight"][0])
    assert objectives["masked"][1] > objectives["masked"][0]
    assert len({*objectives["identity"]}) == 1
    # The pruned source has another inner product with the target than the dense one.
    assert objectives["masked"][0] != objectives["weight"][0]
    # Mask-aware matching starts from activation matching.
    dense = (state(folder / "epoch_0003.pt")["state_dict"] for folder in ends[:2])
    w_a, w_b = ({name: network[name] for name in axes.weights} for network in dense)
    initial = state(runs / ALIGNED / "permutation.pt")["permutation"]
    expected, _ = match_weights(masking.apply(w_a, before["mask"]), w_b, axes, initial)
    assert same(state(aligned / "masked/permutation_0.70.pt")["permutation"], expected)
    log = pd.read_csv(runs / ALIGNED / "log.csv", dtype={"axis": str})
    assert log["axis"].tolist() == list(axes.sizes)
    assert (log["after"] > log["before"]).all() and log["moved"].sum() > 0


ARMS = [("lth", 0, "imp/seed0"), ("naive", 1, "imp/seed0"), ("permuted", 1, ALIGNED)]


@pytest.mark.parametrize("arm, target, masks", ARMS)
def test_sparse_runs_train_the_given_weights_under_the_given_mask(runs, arm, target, masks):
    """With the data order of the target's seed, so that the arms of a pair share their batches."""
    folder, mask = runs / f"sparse/{arm}/seed0-seed{target}", state(runs / masks / "mask_0.70.pt")
    start, final = runs / f"dense/seed{target}/epoch_0001.pt", state(folder / "s0.70_k001/final.pt")
    assert same(final["mask"], mask["mask"])
    rates = learning_rates("cosine", 0.02, 2)  # T - k epochs, on a new schedule
    expected = train_by_hand(state(start), 1, "sparse", rates, mask["mask"], target)
    assert same(final["state_dict"], expected)
    log = pd.read_csv(folder / "s0.70_k001/log.csv")
    assert log["epoch"].tolist() == [2, 3] and log["lr"].tolist() == pytest.approx([0.02, 0.01])
    expected = {"arm": arm, "source_seed": 0, "target_seed": target, "rewind": 1}
    assert expected.items() <= result(folder / "s0.70_k001")["arguments"].items()


def test_control_arms_train_the_right_weights_under_the_right_mask(ends, aligned, tmp_path):
    source, target, imp = ends
    for arm, dense, masks, *flags in (
        ("shuffled", target, imp),
        ("random-permutation", target, aligned / "random"),
        ("imp-target", source, imp),
        ("naive", target, imp, "--signs --fan-in"),
    ):
        succeed(*stage4(arm, dense, masks, tmp_path / arm, *flags, "--sparsity 0.7 --rewind 0"))
    mask_info, cell = state(imp / "mask_0.70.pt"), "s0.70_k000"
    mask, shuffled = mask_info["mask"], state(tmp_path / f"shuffled/{cell}/final.pt")["mask"]
    assert not same(mask, shuffled)
    assert all(kept.sum() == shuffled[name].sum() for name, kept in mask.items())
    for arm, file in (("random-permutation", aligned / "random"), ("imp-target", imp)):
        trained = state(tmp_path / arm / cell / "final.pt")["mask"]
        assert same(trained, state(file / "mask_0.70.pt")["mask"])
    expected = {"signs": True, "fan_in": True, "mask_dataset": "glyphs"}
    assert expected.items() <= result(tmp_path / "naive" / cell)["arguments"].items()
    start, rates = state(target / "epoch_0000.pt"), learning_rates("cosine", 0.02, 3)
    masked = masking.apply({name: start["state_dict"][name] for name in mask}, mask)
    signed = masking.with_signs(masked, mask_info["signs"])
    start["state_dict"] |= masking.rescale_fan_in(signed, mask)
    expected = train_by_hand(start, 0, "sparse", rates, mask, seed=1)
    assert same(weights(tmp_path / "naive" / cell / "final.pt"), expected)


def test_early_matching_uses_the_targets_early_weights(runs, ends, tmp_path):
    succeed(*stage3(*ends, tmp_path, "--target-epoch 1"))
    late = state(runs / ALIGNED / "permutation.pt")["permutation"]
    early = state(tmp_path / "permutation.pt")
    assert early["match_epoch"] == 1 and not same(early["permutation"], late)


def test_masks_of_another_data_set_go_through_all_stages(runs, tmp_path, monkeypatch):
    """Table 16: the source is trained and pruned on another data set, here other glyphs."""
    other = glyphs.read_glyphs(8, seed=1)
    monkeypatch.setitem(data.SMALL_IMAGES, "svhn", lambda data_dir, image_size: other)
    source, target = (tmp_path / f"dense/seed{seed}" for seed in (0, 1))
    shutil.copytree(runs / "dense/seed1", target)
    imp, aligned = tmp_path / "imp/seed0", tmp_path / "align/activation/seed0-seed1"
    succeed(*stage1(tmp_path / "dense", "--dataset svhn"))
    succeed(*stage2(source, imp))
    succeed(*stage3(source, target, imp, aligned))
    for arm, masks in (("naive", imp), ("permuted", aligned)):
        succeed(*stage4(arm, target, masks, tmp_path / arm, "--sparsity 0.5 --rewind 1"))
    succeed("analyze.results", tmp_path)
    rows = pd.read_csv(tmp_path / "results.csv")
    assert {*zip(rows["dataset"], rows["mask_dataset"])} == {("glyphs", "svhn")}
    assert rows["variant"].tolist() == ["naive [svhn mask]", "permuted [svhn mask]"]
    succeed("analyze.interpolation", tmp_path, "--points 3 --images 64 --device cpu")


def test_the_seed_of_stage_4_changes_the_data_order(runs, ends, tmp_path):
    command = stage4("naive", *ends[1:], tmp_path, "--sparsity 0.5 --rewind 1 --seed 7")
    succeed(*command)
    cell = "s0.50_k001/final.pt"
    default = runs / "sparse/naive/seed0-seed1"
    assert not same(weights(default / cell), weights(tmp_path / cell))
    refuse((*command, "--seed 1"), "seed is 7 there")


def test_imagenet_trains_in_a_new_process(tmp_path):
    """With a CPU-only torch, every import of torchvision must go through common/vision.py."""
    save_images(tmp_path / "data", (30, 40), train=2, val=1)
    command = imagenet1(tmp_path, tmp_path, "--model mlp --width 0.015625")
    script, *flags = words(*command)
    arguments = [sys.executable, ROOT / f"{script}.py", *flags]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert result(tmp_path / "seed0")["test_top5"] == 100  # there are two classes
    # A slash at the end of a folder makes no difference.
    assert "nothing to do" in succeed(*command, f"--data-dir {tmp_path}/data/")
