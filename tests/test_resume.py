"""Stages that are called again, and stages that were cut off."""

import io
import json
import os
import shutil
import signal
import sys
import threading
import time

import pandas as pd
import pytest

from common.runtime import resume
from tests.conftest import (
    fork,
    forks,
    refuse,
    result,
    same,
    stage1,
    stage2,
    stage3,
    stage4,
    start,
    state,
    succeed,
    weights,
)

ALIGNED = "align/activation/seed0-seed1"


def copied(runs, folder):
    """A copy of the pipeline; its source, target and masks."""
    shutil.copytree(runs, folder)
    return folder / "dense/seed0", folder / "dense/seed1", folder / "imp/seed0"


class Deadly(io.StringIO):
    """An output that kills its process at the first line that contains a text."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def write(self, text):
        if self.seen in text:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(text)


def kill_when(seen, *command):
    """Call a stage in a process of its own, which is killed at the first line that has `seen`."""

    def child():
        sys.stdout = Deadly(seen)
        start(*command)

    process = fork(child)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_called_again_a_stage_does_nothing_and_says_so(runs, tmp_path):
    root = tmp_path / "copy"
    source, target, masks = copied(runs, root)
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    dense = stage1(root / "dense")
    naive = stage4("naive", target, masks, root / "sparse/naive/seed0-seed1")
    for command in (
        (*dense, "--seed", 0, 1),
        stage2(source, masks, "--keep-rounds"),
        stage3(source, target, masks, root / ALIGNED),
        naive,
    ):
        assert "nothing to do" in succeed(*command)
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert "nothing to do" in succeed(*dense, "--save-epochs", 0)
    refuse((*dense, "--save-epochs", 1, 2), "save_epochs")
    more = succeed(*dense, "--seed", 0, 4)
    assert "seed0 is finished" in more and "seed 4  epoch   3/3" in more
    one = succeed(*naive, "--sparsity", 0.5, "--seed", 1)  # the seed that is the default
    assert one.count("nothing to do") == 2


def test_a_mask_that_came_later_is_permuted_without_matching_again(runs, tmp_path):
    ends, folder = copied(runs, tmp_path / "copy"), tmp_path / "copy" / ALIGNED
    (folder / "mask_0.70.pt").unlink()
    (folder / "result.json").write_text(json.dumps(result(folder) | {"seconds": 1000}))
    out = succeed(*stage3(*ends, folder))
    assert "objective" not in out and "mask_0.70.pt" in out and "mask_0.50.pt" not in out
    assert same(*(state(place / "mask_0.70.pt")["mask"] for place in (folder, runs / ALIGNED)))
    assert 1000 < result(folder)["seconds"] < 1100  # of both calls


@forks
def test_a_chain_goes_on_for_other_sparsities_as_if_each_were_asked_for_alone(runs, tmp_path):
    imp, out = stage2(runs / "dense/seed0", tmp_path / "imp"), tmp_path / "imp"
    succeed(*imp, "--sparsity", 0.3)
    kill_when("round  5", *imp, "--sparsity", 0.7)
    assert state(out / "chain.pt")["round"] >= 4 and not (out / "mask_0.70.pt").exists()
    # Going on needs the chain's latest round only; what branches off earlier starts it again.
    assert "round  1" not in succeed(*imp, "--sparsity", 0.7)
    kept = (out / "mask_0.70.pt").stat().st_mtime_ns
    assert "round  1" in succeed(*imp)
    assert (out / "mask_0.70.pt").stat().st_mtime_ns == kept
    for name in ("sparse_0.50.pt", "sparse_0.70.pt"):
        assert same(weights(out / name), weights(runs / "imp/seed0" / name))
    logs = [pd.read_csv(folder / "log.csv")["kept"] for folder in (out, runs / "imp/seed0")]
    assert set(logs[0]) == {*logs[1], 2621}  # of 0.3
    assert not list(out.glob("round_*.pt"))


@forks
def test_stages_that_were_killed_end_with_the_same_numbers(runs, tmp_path):
    source, masks, sparse = tmp_path / "dense/seed0", tmp_path / "imp", tmp_path / "sparse"
    goes_on, lth = "goes on after epoch 2", stage4("lth", source, masks, sparse)
    for seen, command, told, untold in (
        ("epoch   2/3", stage1(tmp_path / "dense"), goes_on, "epoch   2/3"),
        ("round  3", stage2(source, masks, "--keep-rounds"), "round  3", "round  2"),
        ("s0.50_k001  epoch   2/3", lth, goes_on, "s0.50_k000  epoch"),
        ("axis", stage3(source, runs / "dense/seed1", masks, tmp_path / "align"), "wrote", "axis"),
    ):
        kill_when(seen, *command)
        out = succeed(*command)
        assert told in out and untold not in out
    for killed, undisturbed in (
        ("dense/seed0/epoch_0003.pt", "dense/seed0/epoch_0003.pt"),
        ("imp/sparse_0.70.pt", "imp/seed0/sparse_0.70.pt"),
        ("sparse/s0.50_k001/final.pt", "sparse/lth/seed0-seed0/s0.50_k001/final.pt"),
        ("sparse/s0.70_k001/final.pt", "sparse/lth/seed0-seed0/s0.70_k001/final.pt"),
    ):
        assert same(weights(tmp_path / killed), weights(runs / undisturbed)), killed
    folders = (tmp_path / "align", runs / ALIGNED)
    assert same(*(state(folder / "mask_0.70.pt")["mask"] for folder in folders))
    logs = [pd.read_csv(folder / "log.csv") for folder in (masks, runs / "imp/seed0")]
    pd.testing.assert_frame_equal(*(log.drop(columns="seconds") for log in logs))


@forks
def test_a_run_whose_state_was_cut_off_starts_over_and_keeps_what_it_set_out_to(runs, tmp_path):
    kill_when("epoch   2/3", *stage1(tmp_path, "--save-epochs", 0, 1, 2))
    cut = tmp_path / "seed0/resume.pt"
    cut.write_bytes(cut.read_bytes()[:100])
    assert "starts again" in succeed(*stage1(tmp_path))
    kept = sorted(path.name for path in tmp_path.glob("seed0/*.pt"))
    assert kept == [f"epoch_000{k}.pt" for k in range(4)]
    last = "seed0/epoch_0003.pt"
    assert same(weights(tmp_path / last), weights(runs / "dense" / last))


@pytest.mark.parametrize("more", [(), ("--parallel", 2)])
def test_sigterm_lets_runs_finish_their_step_and_keep_their_state(tmp_path, more, capfd):
    command = stage1(tmp_path, "--epochs", 10**5, "--save-epochs", 9, "--seed", 0, 1, *more)
    process, last = fork(start, *command), tmp_path / f"seed{1 if more else 0}"
    while not (last / "epoch_0009.pt").is_file():
        assert process.is_alive()
        time.sleep(0.05)
    process.terminate()
    process.join()
    assert process.exitcode == 130
    assert capfd.readouterr().err.count("the same command goes on") == 1
    rows = state(last / "resume.pt")["rows"]
    assert len(rows) >= 9 and not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "seed1").exists() == bool(more)  # no other run was begun


def test_an_evaluation_ends_early_where_sigterm_came(monkeypatch):
    monkeypatch.setattr(resume, "stopping", threading.Event())
    batches = resume.until_stopped(iter(range(9)))
    assert [next(batches), next(batches)] == [0, 1]
    resume.stopping.set()
    assert list(batches) == [] and list(resume.until_stopped(iter(range(9)))) == [0]


def test_a_chain_whose_record_is_missing_is_finished(runs, tmp_path):
    shutil.copytree(runs / "imp/seed0", tmp_path / "imp")
    (tmp_path / "imp/result.json").unlink()
    succeed(*stage2(runs / "dense/seed0", tmp_path / "imp", "--keep-rounds"))
    rows = [
        pd.read_csv(folder / "log.csv")["kept"] for folder in (tmp_path / "imp", runs / "imp/seed0")
    ]
    assert rows[0].equals(rows[1]) and (tmp_path / "imp/result.json").is_file()


def test_a_mask_does_not_depend_on_the_others_that_were_asked_for(tmp_path):
    succeed(*stage1(tmp_path, "--width", 0.25, "--epochs", 1))
    alone, beside, dense = tmp_path / "alone", tmp_path / "beside", tmp_path / "seed0"
    succeed(*stage2(dense, alone, "--sparsity", 0.3))
    # The first two differ from the chain's round and from each other by a weight or two of 58,624.
    succeed(*stage2(dense, beside, "--sparsity", 0.19998, 0.29997, 0.3))
    for name, key in (("mask_0.30.pt", "mask"), ("sparse_0.30.pt", "state_dict")):
        assert same(state(alone / name)[key], state(beside / name)[key]), name
