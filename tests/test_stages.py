"""Every stage through its command line, at a tiny budget."""

import json
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch

from common import masking
from common.models import build_model
from common.permutation import find_axes, permute
from tests.conftest import ROOT, TINY, call, sparse, succeed

IMP = ("--epochs", 1, "--batch-size", 64, "--device", "cpu", "--precision", "fp32")


def state(path):
    return torch.load(path, weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------- what the stages write


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
    out = succeed(
        "prune_imp",
        "--dense",
        runs / "dense/seed0",
        "--sparsity",
        0.2,
        "--rewind",
        1,
        "--batch-size",
        64,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--out",
        tmp_path,
    )
    assert "lr 0.0600" in out and "lr 0.0200" in out and "lr 0.0800" not in out and "epoch   2/3" in out
    trained = state(tmp_path / "sparse_0.20.pt")["state_dict"]
    fine_tuned = state(runs / "imp/seed0/round_01.pt")
    assert same(state(tmp_path / "sparse_0.20.pt")["mask"], fine_tuned["mask"]) and not same(
        trained, fine_tuned["state_dict"]
    )
    # The same by stage 4's loop: the masked weights of epoch 1, trained on the rest of the dense schedule.
    assert (
        call(
            "prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.2, "--rewind", 1, "--lr", 1, "--out", tmp_path
        ).code
        == 2
    )


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


# ---------------------------------------------------------------- called again


def test_called_again_a_stage_does_nothing_and_says_so(runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(runs, root)
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    calls = [
        call("train_dense", *TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, 1, "--out", root / "dense"),
        call(
            "prune_imp",
            "--dense",
            root / "dense/seed0",
            "--sparsity",
            0.5,
            0.7,
            "--keep-rounds",
            *IMP,
            "--out",
            root / "imp/seed0",
        ),
        call(
            "align_mask",
            "--source",
            root / "dense/seed0",
            "--target",
            root / "dense/seed1",
            "--masks",
            root / "imp/seed0",
            "--out",
            root / "align/activation/seed0-seed1",
        ),
        sparse("naive", root / "dense/seed1", root / "imp/seed0", root / "sparse/naive/seed0-seed1"),
    ]
    for outcome in calls:
        assert outcome.code == 0 and "nothing to do" in outcome.out, outcome
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    more = succeed("train_dense", *TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, 4, "--out", root / "dense")
    assert "seed0 is finished" in more and "seed 4  epoch   3/3" in more
    more = sparse(
        "naive",
        root / "dense/seed1",
        root / "imp/seed0",
        root / "sparse/naive/seed0-seed1",
        "--sparsity",
        0.5,
        "--rewind",
        0,
        1,
        "--seed",
        1,
    )
    assert more.out.count("nothing to do") == 2


def test_a_mask_that_came_later_is_permuted_without_matching_again(runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(runs, root)
    aligned = root / "align/activation/seed0-seed1"
    (aligned / "mask_0.70.pt").unlink()
    out = succeed(
        "align_mask",
        "--source",
        root / "dense/seed0",
        "--target",
        root / "dense/seed1",
        "--masks",
        root / "imp/seed0",
        "--out",
        aligned,
    )
    assert "permutation that is there" in out
    assert same(
        state(aligned / "mask_0.70.pt")["mask"], state(runs / "align/activation/seed0-seed1/mask_0.70.pt")["mask"]
    )


# ---------------------------------------------------------------- cut off by SIGKILL


def kill_when(seen, script, *arguments):
    """Start a script in its own process and kill it at the first line that contains `seen`."""
    command = [sys.executable, "-u", str(ROOT / f"{script}.py"), *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if seen in line:
                process.send_signal(signal.SIGKILL)
                break
        else:
            raise AssertionError("".join(lines))
    assert process.returncode == -signal.SIGKILL


def test_stages_that_were_killed_end_with_the_same_numbers(runs, tmp_path):
    dense = [*TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, "--out", tmp_path / "dense"]
    kill_when("epoch   2/3", "train_dense", *dense)
    assert not (tmp_path / "dense/seed0/result.json").exists()
    assert "goes on after epoch 2" in succeed("train_dense", *dense)
    imp = [
        "--dense",
        tmp_path / "dense/seed0",
        "--sparsity",
        0.5,
        0.7,
        "--keep-rounds",
        *IMP,
        "--out",
        tmp_path / "imp",
    ]
    kill_when("round  3", "prune_imp", *imp)
    assert "round  2" not in succeed("prune_imp", *imp)
    arm = ["--arm", "lth", "--weights", tmp_path / "dense/seed0", "--masks", tmp_path / "imp", "--out", tmp_path / "sparse", "--batch-size", 64,
           "--device", "cpu", "--precision", "fp32", "--sparsity", 0.5, 0.7, "--rewind", 0, 1]  # fmt: skip
    kill_when("s0.50 k001  epoch   2/3", "train_sparse", *arm)
    succeed("train_sparse", *arm)
    align = [
        "--source",
        tmp_path / "dense/seed0",
        "--target",
        runs / "dense/seed1",
        "--masks",
        tmp_path / "imp",
        "--device",
        "cpu",
        "--out",
        tmp_path / "align",
    ]
    kill_when("axis", "align_mask", *align)
    succeed("align_mask", *align)

    pairs = {"dense/seed0/epoch_0003.pt": "dense/seed0/epoch_0003.pt", "imp/sparse_0.70.pt": "imp/seed0/sparse_0.70.pt"}
    pairs |= {
        f"sparse/{run}/final.pt": f"sparse/lth/seed0-seed0/{run}/final.pt" for run in ("s0.50_k001", "s0.70_k001")
    }
    for killed, undisturbed in pairs.items():
        assert same(state(tmp_path / killed)["state_dict"], state(runs / undisturbed)["state_dict"]), killed
    assert same(
        state(tmp_path / "align/mask_0.70.pt")["mask"],
        state(runs / "align/activation/seed0-seed1/mask_0.70.pt")["mask"],
    )
    logs = [
        pd.read_csv(root / f"{imp}/log.csv").drop(columns="seconds")
        for root, imp in ((tmp_path, "imp"), (runs, "imp/seed0"))
    ]
    pd.testing.assert_frame_equal(*logs)


# ---------------------------------------------------------------- what a user can get wrong


def refused(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err, outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def files(folder):
    return sorted(folder.rglob("*")) if folder.exists() else []


def dense(out, *more):
    return call("train_dense", *TINY, "--epochs", 1, "--out", out, *more)


@pytest.mark.parametrize("more, words", [
    (("--model", "resnet20", "--width", 0.3), "4.8"),
    (("--model", "vgg11", "--width", 1), "32 px"),
    (("--dataset", "folder", "--data-dir", "/nowhere"), "/nowhere"),
    (("--device", "cuda:99"), "cuda:99"),
    (("--epochs", 0), "--epochs"),
    (("--lr", -1), "--lr"),
    (("--width", "x"), "--width"),
    (("--limit-train", 10**7), "--limit-train"),
    (("--batch-size", 300), "--batch-size 300"),
    (("--save-epochs", 5), "--save-epochs"),
    (("--model", "lenet"), "lenet"),
    (("--dataset", "mnist"), "mnist"),
    (("--momentum", 1), "--momentum"),
])  # fmt: skip
def test_dense_refuses(tmp_path, more, words):
    refused(dense(tmp_path / "out", *more), words)
    assert not files(tmp_path / "out")  # nothing half-written


def test_dense_refuses_a_folder_of_another_experiment(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "dense")
    refused(
        dense(tmp_path / "dense", "--epochs", 3, "--save-epochs", 1, "--lr", 0.5),
        "lr is 0.08 there and 0.5 here",
        "--out",
    )
    refused(dense(tmp_path / "dense", "--epochs", 3, "--save-epochs", 1, "--width", 0.0625), "width is 0.03125 there")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/seed0").write_text("a file")
    refused(dense(tmp_path / "mine"), "no run of this project")


def test_later_stages_refuse_bad_checkpoints(runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(runs, root)
    refused(
        call("prune_imp", "--dense", root / "nowhere", "--sparsity", 0.5, "--out", tmp_path / "o"),
        "nowhere",
        "no dense run",
    )
    refused(call("prune_imp", "--dense", root / "imp/seed0", "--sparsity", 0.5, "--out", tmp_path / "o"), "prune_imp")
    refused(call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 1.5, "--out", tmp_path / "o"), "1.5")
    refused(call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0, "--out", tmp_path / "o"), "above 0")
    refused(
        call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0.5, "--rewind", 2, "--out", tmp_path / "o"),
        "no weights after epoch 2",
        "0, 1, 3",
    )
    last = root / "dense/seed0/epoch_0003.pt"
    last.write_bytes(last.read_bytes()[:500])
    refused(
        call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0.5, "--out", tmp_path / "o"),
        "epoch_0003.pt",
        "cut off",
    )
    torch.save({"weights": 1}, last)
    refused(
        call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0.5, "--out", tmp_path / "o"), "state_dict"
    )
    (root / "dense/seed2/result.json").unlink()
    refused(
        call("prune_imp", "--dense", root / "dense/seed2", "--sparsity", 0.5, "--out", tmp_path / "o"), "not finished"
    )
    assert not files(tmp_path / "o")


def test_stages_refuse_what_does_not_fit_together(runs, tmp_path):
    wide, out = tmp_path / "wide", tmp_path / "o"
    assert dense(wide, "--width", 0.0625, "--epochs", 1).code == 0
    align = ("align_mask", "--masks", runs / "imp/seed0", "--out", out, "--source")
    refused(call(*align, runs / "dense/seed0", "--target", wide / "seed0"), "different networks")
    refused(call(*align, wide / "seed0", "--target", wide / "seed0"), "mask_0.50.pt", "0.0625")
    refused(call(*align, runs / "dense/seed2", "--target", runs / "dense/seed1"), "no mask of the source")
    refused(
        call(
            "align_mask",
            "--masks",
            tmp_path,
            "--out",
            out,
            "--source",
            runs / "dense/seed0",
            "--target",
            runs / "dense/seed1",
        ),
        "no mask_*.pt",
    )
    refused(
        call(*align, runs / "dense/seed0", "--target", runs / "dense/seed1", "--target-epoch", 2),
        "no weights after epoch 2",
    )
    refused(sparse("naive", wide / "seed0", runs / "imp/seed0", out), "mask_0.50.pt", "mlp")
    imp, aligned = runs / "imp/seed0", runs / "align/activation/seed0-seed1"
    refused(sparse("lth", runs / "dense/seed1", imp, out), "--arm lth contradicts", "seed 0")
    refused(sparse("naive", runs / "dense/seed0", imp, out), "--arm naive contradicts")
    refused(sparse("permuted", runs / "dense/seed1", imp, out), "--arm permuted contradicts", "unpermuted")
    refused(sparse("permuted", runs / "dense/seed3", aligned, out), "permuted onto seed 1")
    refused(sparse("naive", runs / "dense/seed1", aligned, out), "--arm naive contradicts")
    refused(
        sparse("naive", runs / "dense/seed1", imp, out, "--sparsity", 0.6, "--rewind", 0),
        "mask_0.60.pt",
        "mask_0.50.pt, mask_0.70.pt",
    )
    refused(
        sparse("naive", runs / "dense/seed1", imp, out, "--sparsity", 0.5, "--rewind", 2),
        "no weights after epoch 2",
        "0, 1, 3",
    )
    refused(sparse("naive", runs / "dense/seed1", imp, out, "--sparsity", 0.5, "--rewind", 3), "no epoch to train")
    assert not files(out)
    changed = tmp_path / "changed"
    changed.mkdir()
    entry = state(imp / "mask_0.70.pt")
    torch.save(entry, changed / "mask_0.50.pt")  # a mask under the name of another sparsity
    refused(sparse("naive", runs / "dense/seed1", changed, out, "--sparsity", 0.5, "--rewind", 0), "prunes 70")
    entry["mask"]["1.weight"] = entry["mask"]["1.weight"][:, :-1]
    torch.save(entry, changed / "mask_0.70.pt")
    refused(
        sparse("naive", runs / "dense/seed1", changed, out, "--sparsity", 0.7, "--rewind", 0),
        "mask_0.70.pt is a mask for",
    )


def test_a_bug_of_ours_shows_its_traceback(monkeypatch):
    import train_dense

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(train_dense, "main", broken)
    with pytest.raises(ZeroDivisionError):
        call("train_dense")
