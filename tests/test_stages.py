"""Every stage through its command line, at a tiny budget: what it writes."""

import subprocess
import sys

import pandas as pd
import pytest

from common import masking
from common.align.axes import find_axes
from common.align.permutation import permute
from common.data import load_data, stage_seed
from common.models import build_model
from common.training import learning_rates, train
from tests.conftest import (
    ROOT,
    imagenet1,
    refuse,
    result,
    same,
    save_pictures,
    sgd,
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


def train_by_hand(start, epoch, stage, rates, mask=None, seed=0):
    """The weights of a checkpoint that a stage trained on, as it should, from an epoch on."""
    model, data = build_model(**start["model"]), load_data(start["dataset"])
    model.load_state_dict(masking.apply(start["state_dict"], mask or {}))
    settings = {"name": "by hand", "folder": None, "batch_size": 64, "precision": "fp32"}
    settings |= {"make_optimiser": sgd(0.9, 5e-4), "seed": stage_seed(seed, stage)}
    train(model, data, rates, first_epoch=epoch, mask=mask, **settings)
    return model.state_dict()


def test_dense_runs_keep_the_initialisation_the_asked_epochs_and_the_last(runs):
    folder = runs / "dense/seed1"
    kept = "epoch_0000.pt epoch_0001.pt epoch_0003.pt arguments.json log.csv result.json"
    assert {path.name for path in folder.iterdir()} == set(kept.split())
    first, last = (state(folder / f"epoch_000{epoch}.pt") for epoch in (0, 3))
    assert set(first) == {*"model dataset seed epoch state_dict code commit tag".split()}
    assert [(one["seed"], one["epoch"]) for one in (first, last)] == [(1, 0), (1, 3)]
    assert same(first["state_dict"], build_model(**first["model"], seed=1).state_dict())
    # The second of four seeds is what it is alone.
    assert same(last["state_dict"], train_by_hand(first, 0, "dense", RATES, seed=1))
    log = pd.read_csv(folder / "log.csv")
    assert log["epoch"].tolist() == [1, 2, 3]
    assert log["lr"].tolist() == pytest.approx(RATES) == [0.08, 0.06, 0.02]
    assert result(folder)["test_acc"] == pytest.approx(log["test_acc"].iloc[-1])


def test_imp_prunes_20_percent_a_round_and_branches_off_to_each_sparsity(runs):
    folder, dense = runs / "imp/seed0", state(runs / "dense/seed0/epoch_0003.pt")
    chain = [3744, 2995, 2396, 1917, 1534, 1227]  # less 20%, to the nearest weight
    log = pd.read_csv(folder / "log.csv")
    assert log["kept"].tolist() == sorted(chain[1:] + [1872, 1123], reverse=True)
    names = [*state(folder / "mask_0.50.pt")["mask"]]
    networks = [dense | {"mask": masking.dense_mask(dense["state_dict"], names), "round": 0}]
    networks += [state(folder / f"round_{number:02d}.pt") for number in range(1, 6)]
    steps = [*zip(networks, networks[1:], chain[1:])]
    # Off the last round that keeps more.
    for sparsity, last, keep in (("0.50", networks[3], 1872), ("0.70", networks[5], 1123)):
        masks, network = (state(folder / f"{kind}_{sparsity}.pt") for kind in ("mask", "sparse"))
        steps.append((last, network, keep))
        assert same(masks["mask"], network["mask"])
        made = {"source_seed": 0, "target_seed": None, "sparsity": 1 - keep / chain[0]}
        assert made.items() <= masks.items()
        assert same(masks["signs"], masking.signs(dense["state_dict"], names))
    for before, network, keep in steps:
        number = network["round"]
        mask = masking.prune_by_magnitude(before["state_dict"], before["mask"], keep)
        assert number == before["round"] + 1 and same(network["mask"], mask)
        # On an epoch that no round before it, nor the dense run, has seen.
        assert same(network["state_dict"], train_by_hand(before, 2 + number, "imp", [0.01], mask))


def test_no_stage_sees_the_batches_of_another():
    assert len({stage_seed(0, stage) for stage in ("dense", "imp", "sparse")}) == 3


def test_imp_with_rewinding_trains_from_epoch_k_on_the_dense_schedule(runs, tmp_path):
    flags = "--sparsity 0.2 --rewind 1 --device cpu --precision fp32"
    # Batch size and all else are the dense run's.
    succeed("prune_imp", flags, f"--dense {runs}/dense/seed0 --out {tmp_path}")
    found = state(tmp_path / "sparse_0.20.pt")
    assert same(found["mask"], state(runs / "imp/seed0/round_01.pt")["mask"])
    start = state(runs / "dense/seed0/epoch_0001.pt")
    expected = train_by_hand(start, 1, "imp", RATES[1:], found["mask"])
    assert same(found["state_dict"], expected)


def test_one_shot_prunes_in_a_single_round(runs, tmp_path):
    succeed(*stage2(runs / "dense/seed0", tmp_path, "--one-shot"))
    log = pd.read_csv(tmp_path / "log.csv")
    assert log[["round", "kept"]].to_numpy().tolist() == [[1, 1872], [1, 1123]]


def test_every_method_permutes_masks_and_signs_by_the_saved_permutation(runs, ends, aligned):
    source, _, imp = ends
    shape, before = state(source / "epoch_0003.pt")["model"], state(imp / "mask_0.70.pt")
    axes, gains = find_axes(build_model(**shape), shape["input_shape"]), {}
    for folder in (runs / ALIGNED, *aligned.iterdir()):
        name = "permutation_0.70.pt" if folder.name == "masked" else "permutation.pt"
        found, after = (state(folder / file) for file in (name, "mask_0.70.pt"))
        permutation, method = found["permutation"], after["method"]
        gains[method] = found["objective"]
        for part in ("mask", "signs"):
            assert same(after[part], permute(before[part], axes.dims, permutation))
            assert same(after[part], before[part]) == (method == "identity")
        made = {"source_seed": 0, "target_seed": 1, "match_epoch": 3}
        assert made.items() <= after.items() and after["sparsity"] == before["sparsity"]
    assert gains["weight"][1] > max(gains["random"][1], gains["weight"][0])
    assert gains["masked"][1] > gains["masked"][0] and len({*gains["identity"]}) == 1
    assert gains["masked"][0] != gains["weight"][0]  # the pruned source has another inner product
    log = pd.read_csv(runs / ALIGNED / "log.csv", dtype={"axis": str})
    assert log["axis"].tolist() == list(axes.sizes)
    assert (log["after"] > log["before"]).all() and log["moved"].sum() > 0


ARMS = [("lth", 0, "imp/seed0"), ("naive", 1, "imp/seed0"), ("permuted", 1, ALIGNED)]


@pytest.mark.parametrize("arm, target, masks", ARMS)
def test_sparse_runs_train_the_asked_weights_under_the_asked_mask(runs, arm, target, masks):
    """In the order of the target's seed, so that the arms of a pair share their batches."""
    folder, mask = runs / f"sparse/{arm}/seed0-seed{target}", state(runs / masks / "mask_0.70.pt")
    start, final = runs / f"dense/seed{target}/epoch_0001.pt", state(folder / "s0.70_k001/final.pt")
    assert same(final["mask"], mask["mask"])
    rates = learning_rates("cosine", 0.02, 2)  # T - k epochs, on a fresh schedule
    expected = train_by_hand(state(start), 1, "sparse", rates, mask["mask"], target)
    assert same(final["state_dict"], expected)
    log = pd.read_csv(folder / "s0.70_k001/log.csv")
    assert log["epoch"].tolist() == [2, 3] and log["lr"].tolist() == pytest.approx([0.02, 0.01])
    asked = {"arm": arm, "source_seed": 0, "target_seed": target, "rewind": 1}
    assert asked.items() <= result(folder / "s0.70_k001")["arguments"].items()


def test_controls_start_from_what_they_say(ends, aligned, tmp_path):
    source, target, imp = ends
    for arm, dense, masks, *more in (
        ("shuffled", target, imp),
        ("random-permutation", target, aligned / "random"),
        ("imp-target", source, imp),
        ("naive", target, imp, "--signs --fan-in"),
    ):
        succeed(*stage4(arm, dense, masks, tmp_path / arm, *more, "--sparsity 0.7 --rewind 0"))
    entry, cell = state(imp / "mask_0.70.pt"), "s0.70_k000"
    mask, shuffled = entry["mask"], state(tmp_path / f"shuffled/{cell}/final.pt")["mask"]
    assert not same(mask, shuffled)
    assert all(entry.sum() == shuffled[name].sum() for name, entry in mask.items())
    asked = {"signs": True, "fan_in": True, "mask_dataset": "glyphs"}
    assert asked.items() <= result(tmp_path / "naive" / cell)["arguments"].items()
    start, rates = state(target / "epoch_0000.pt"), learning_rates("cosine", 0.02, 3)
    kept = masking.apply({name: start["state_dict"][name] for name in mask}, mask)
    signed = masking.with_signs(kept, entry["signs"])
    start["state_dict"] |= masking.rescale_fan_in(signed, mask)
    expected = train_by_hand(start, 0, "sparse", rates, mask, seed=1)
    assert same(weights(tmp_path / "naive" / cell / "final.pt"), expected)


def test_early_matching_uses_the_targets_early_weights(runs, ends, tmp_path):
    succeed(*stage3(*ends, tmp_path, "--target-epoch 1"))
    late = state(runs / ALIGNED / "permutation.pt")["permutation"]
    early = state(tmp_path / "permutation.pt")
    assert early["match_epoch"] == 1 and not same(early["permutation"], late)


def test_the_seed_of_stage_4_changes_the_data_order(runs, ends, tmp_path):
    command = stage4("naive", *ends[1:], tmp_path, "--sparsity 0.5 --rewind 1 --seed 7")
    succeed(*command)
    cell = "s0.50_k001/final.pt"
    usual = runs / "sparse/naive/seed0-seed1"
    assert not same(weights(usual / cell), weights(tmp_path / cell))
    refuse((*command, "--seed 1"), "seed is 7 there")


def test_imagenet_trains_in_a_process_of_its_own(tmp_path):
    """Beside a CPU-only torch, torchvision must come in through common/vision.py alone."""
    save_pictures(tmp_path / "data", (30, 40), train=2, val=1)
    run = imagenet1(tmp_path, tmp_path, "--model mlp --width 0.015625")
    script, *flags = words(*run)
    command = [sys.executable, ROOT / f"{script}.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "seed0")["test_top5"] == 100  # of two classes
    # A folder is the same with a slash at its end.
    assert "nothing to do" in succeed(*run, f"--data-dir {tmp_path}/data/")
