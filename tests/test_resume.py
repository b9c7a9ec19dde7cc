"""Stages that are called again, and stages that were cut off; at any moment: test_kills.py."""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import types

import pandas as pd
import pytest
from torch import nn

from common import models
from common.runtime import resume
from tests.conftest import (
    ending_at,
    fork,
    forks,
    interrupt,
    refuse,
    result,
    same,
    same_files,
    snapshot,
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


def kill_when(seen, *command):
    """Call a stage in a process of its own, which is killed at the first line that has `seen`."""

    def write(text):
        if seen in text:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        sys.stdout = types.SimpleNamespace(write=write, flush=lambda: None)
        start(*command)

    process = fork(child)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_called_again_a_stage_does_nothing_and_says_so(runs, tmp_path):
    root = shutil.copytree(runs, tmp_path / "copy")
    source, target, masks = root / "dense/seed0", root / "dense/seed1", root / "imp/seed0"
    before = snapshot(root)
    dense = stage1(root / "dense")
    naive = stage4("naive", target, masks, root / "sparse/naive/seed0-seed1")
    for command in (
        (*dense, "--seed 0 1"),
        (*dense, "--save-epochs 0"),
        stage2(source, masks, "--keep-rounds"),
        stage3(source, target, masks, root / ALIGNED),
        (*naive, "--sparsity 0.5 --seed 1"),  # the seed that is the default
    ):
        assert "nothing to do" in succeed(*command)
    assert snapshot(root) == before
    shutil.rmtree(root / "sparse/naive/seed0-seed1/s0.50_k001")
    more = succeed(*naive)
    assert "s0.50_k001  epoch   3/3" in more and "s0.50_k000  epoch" not in more
    same_files(root, runs)
    refuse((*dense, "--save-epochs 1 2"), "save_epochs")
    more = succeed(*dense, "--seed 0 4")
    assert "seed0 is finished" in more and "seed 4  epoch   3/3" in more


def test_a_mask_that_came_later_is_permuted_without_matching_again(runs, ends, tmp_path):
    folder = shutil.copytree(runs / ALIGNED, tmp_path / ALIGNED)
    (folder / "mask_0.70.pt").unlink()
    (folder / "result.json").write_text(json.dumps(result(folder) | {"seconds": 1000}))
    out = succeed(*stage3(*ends, folder))
    assert "objective" not in out and "mask_0.70.pt" in out and "mask_0.50.pt" not in out
    assert 1000 < result(folder)["seconds"] < 1100  # of both calls
    same_files(tmp_path, runs)


@forks
def test_a_chain_goes_on_for_other_sparsities_as_if_each_were_asked_for_alone(runs, tmp_path):
    imp, out = stage2(runs / "dense/seed0", tmp_path / "imp"), tmp_path / "imp"
    succeed(*imp, "--sparsity 0.3")
    kill_when("round  5", *imp, "--sparsity", 0.7)
    assert (out / "round_04.pt").exists() and not (out / "mask_0.70.pt").exists()
    # Going on needs the chain's latest round only; what branches off earlier starts it again.
    assert "round  1" not in succeed(*imp, "--sparsity 0.7")
    kept = (out / "mask_0.70.pt").stat().st_mtime_ns
    # Of the first two, one differs by a weight from a round of the chain, and one from 0.5.
    assert "round  1" in succeed(*imp, "--sparsity 0.4877 0.4998 0.5 0.7")
    assert (out / "mask_0.70.pt").stat().st_mtime_ns == kept
    for name in ("sparse_0.50.pt", "sparse_0.70.pt"):
        assert same(weights(out / name), weights(runs / "imp/seed0" / name))
    logs = [pd.read_csv(folder / "log.csv")["kept"] for folder in (out, runs / "imp/seed0")]
    assert set(logs[0]) == {*logs[1], 2621, 1918, 1873}
    assert [path.name for path in out.glob("round_*.pt")] == ["round_05.pt"]


@forks
def test_a_run_whose_state_was_cut_off_starts_over_and_keeps_what_it_set_out_to(runs, tmp_path):
    kill_when("epoch   2/3", *stage1(tmp_path, "--save-epochs 0 1 2"))
    cut = tmp_path / "seed0/resume.pt"
    cut.write_bytes(cut.read_bytes()[:100])
    assert "starts again" in succeed(*stage1(tmp_path))
    (tmp_path / "seed0/epoch_0002.pt").unlink()  # which no other run kept
    same_files(tmp_path, runs / "dense")


def test_a_run_that_goes_on_keeps_the_initialisation_that_it_had(tmp_path, monkeypatch):
    """Also where the code makes another by now; a state of another network is refused."""
    with pytest.raises(InterruptedError), ending_at(1, 0, interrupt):
        start(*stage1(tmp_path))
    first, before = tmp_path / "seed0/epoch_0000.pt", snapshot(tmp_path)
    monkeypatch.setitem(
        models.MODELS, "mlp", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    )
    refuse(stage1(tmp_path), "resume.pt does not fit")
    assert snapshot(tmp_path)[first] == before[first]
    monkeypatch.undo()
    monkeypatch.setattr(models, "initialise", lambda model: model)
    succeed(*stage1(tmp_path))
    assert snapshot(tmp_path)[first] == before[first]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_every_run_and_keeps_its_state(tmp_path, sent, beside, capfd):
    """It is sent to the command alone, and waits for the end of a step."""

    def stoppable():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        start(*command, "--parallel 2" * beside)

    command = stage1(tmp_path, "--epochs 100000 --save-epochs 9 --seed 0 1")
    process, last = fork(stoppable), tmp_path / f"seed{int(beside)}"
    try:
        while not (last / "epoch_0009.pt").is_file():
            assert process.is_alive()
            time.sleep(0.05)
        os.kill(process.pid, sent)
        process.join(60)
        assert process.exitcode == 130
        assert capfd.readouterr().err.count("the same command goes on") == 1
        assert len(state(last / "resume.pt")["rows"]) >= 9
        assert (tmp_path / "seed1").exists() == beside  # no other run was begun
        assert not list(tmp_path.rglob("*.tmp"))
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.killpg(process.pid, 0)  # any of the group
                time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setattr(resume, "stop_requested", threading.Event())
    with resume.stop_on_signals():
        for first in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_evaluation_ends_early_where_sigterm_came(monkeypatch):
    monkeypatch.setattr(resume, "stop_requested", threading.Event())
    for batch in resume.until_stopped(iter(range(9))):
        if batch == 1:
            resume.stop_requested.set()
    assert batch == 1


def test_a_chain_whose_record_is_missing_is_finished(runs, tmp_path):
    folder = shutil.copytree(runs / "imp/seed0", tmp_path / "imp/seed0")
    (folder / "result.json").unlink()
    succeed(*stage2(runs / "dense/seed0", folder, "--keep-rounds"))
    assert (folder / "result.json").is_file()
    same_files(tmp_path, runs)
