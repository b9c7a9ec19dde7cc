"""Stages that are called again, and stages that were cut off."""

import json
import shutil
import signal
import subprocess
import sys

import pandas as pd

from tests.conftest import IMP, ROOT, TINY, call, refused, same, sparse, state, succeed


def ends(root):
    return "--source", root / "dense/seed0", "--target", root / "dense/seed1", "--masks", root / "imp/seed0"


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
        call("align_mask", *ends(root), "--out", root / "align/activation/seed0-seed1"),
        sparse("naive", root / "dense/seed1", root / "imp/seed0", root / "sparse/naive/seed0-seed1"),
    ]
    for outcome in calls:
        assert outcome.code == 0 and "nothing to do" in outcome.out, outcome
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    fewer = call("train_dense", *TINY, "--epochs", 3, "--save-epochs", 0, "--seed", 0, 1, "--out", root / "dense")
    assert fewer.out.count("nothing to do") == 2 and (root / "dense/seed0/epoch_0001.pt").exists()
    refused(call("train_dense", *TINY, "--epochs", 3, "--save-epochs", 1, 2, "--out", root / "dense"), "save_epochs")
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
    result = json.loads((aligned / "result.json").read_text())
    (aligned / "result.json").write_text(json.dumps(result | {"seconds": 1000}))
    out = succeed("align_mask", *ends(root), "--out", aligned)
    assert "objective" not in out and "mask_0.70.pt" in out and "mask_0.50.pt" not in out
    assert same(
        state(aligned / "mask_0.70.pt")["mask"], state(runs / "align/activation/seed0-seed1/mask_0.70.pt")["mask"]
    )
    assert 1000 < json.loads((aligned / "result.json").read_text())["seconds"] < 1100  # of both calls


def test_a_chain_that_was_cut_off_does_not_leak_into_one_with_more_stops(runs, tmp_path):
    """Rounds of an unfinished chain to 0.7 must not serve a chain that has to stop at 0.5."""
    out = tmp_path / "imp"
    kill_when("round  5", "prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.7, *IMP, "--out", out)
    assert len(list(out.glob("round_*.pt"))) >= 4
    succeed("prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.5, 0.7, *IMP, "--out", out)
    for name in ("sparse_0.50.pt", "sparse_0.70.pt"):
        assert same(state(out / name)["state_dict"], state(runs / "imp/seed0" / name)["state_dict"]), name
    assert pd.read_csv(out / "log.csv")["kept"].tolist() == pd.read_csv(runs / "imp/seed0/log.csv")["kept"].tolist()
    assert not list(out.glob("round_*.pt"))


DEADLY = """
import os, runpy, signal, sys

seen, sys.argv = sys.argv[1], sys.argv[2:]
write = sys.stdout.write


def write_and_die(text):
    write(text)
    if seen in text:
        os.kill(os.getpid(), signal.SIGKILL)


sys.stdout.write = write_and_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_when(seen, script, *arguments):
    """Start a script in its own process, which is killed at the first line that contains `seen`."""
    command = [sys.executable, "-c", DEADLY, seen, str(ROOT / f"{script}.py"), *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


def test_rounds_of_a_chain_that_was_given_up_do_not_stay(runs, tmp_path):
    imp = "--dense", runs / "dense/seed0", *IMP, "--keep-rounds", "--out", tmp_path / "imp"
    succeed("prune_imp", *imp, "--sparsity", 0.3)
    shutil.copy(tmp_path / "imp/round_02.pt", tmp_path / "imp/round_07.pt")
    succeed("prune_imp", *imp, "--sparsity", 0.3, 0.4)
    assert [path.name for path in sorted((tmp_path / "imp").glob("round*"))] == [f"round_{n:02d}.pt" for n in (1, 2, 3)]


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


def test_a_run_that_goes_on_keeps_the_epochs_it_set_out_to_keep(runs, tmp_path):
    arguments = [*TINY, "--epochs", 3, "--seed", 0, "--out", tmp_path]
    kill_when("epoch   1/3", "train_dense", *arguments, "--save-epochs", 0, 1, 2)
    succeed("train_dense", *arguments, "--save-epochs", 1)
    assert sorted(path.name for path in tmp_path.glob("seed0/*.pt")) == [f"epoch_000{k}.pt" for k in range(4)]


def test_a_resume_file_that_was_cut_off_starts_the_run_over(runs, tmp_path):
    arguments = [*TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, "--out", tmp_path]
    kill_when("epoch   2/3", "train_dense", *arguments)
    resume = tmp_path / "seed0/resume.pt"
    resume.write_bytes(resume.read_bytes()[:100])
    assert "starts again" in succeed("train_dense", *arguments)
    assert same(
        state(tmp_path / "seed0/epoch_0003.pt")["state_dict"], state(runs / "dense/seed0/epoch_0003.pt")["state_dict"]
    )
