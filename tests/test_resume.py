"""Stages that are run again, and interrupted stages; kills at random: test_kills.py."""

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
from torch.nn.utils.parametrizations import weight_norm

from common import checkpoint, models
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


def kill_when(printed, *command):
    """Call a stage in a new process, and kill it as soon as it prints `printed`."""

    def write(text):
        if printed in text:
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        sys.stdout = types.SimpleNamespace(write=write, flush=lambda: None)
        start(*command)

    process = fork(child)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_finished_stage_does_nothing_when_run_again(runs, tmp_path):
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
        (*naive, "--sparsity 0.5 --seed 1"),  # the default seed
    ):
        assert "nothing to do" in succeed(*command)
    assert snapshot(root) == before
    shutil.rmtree(root / "sparse/naive/seed0-seed1/s0.50_k001")
    out = succeed(*naive)
    assert "s0.50_k001  epoch   3/3" in out and "s0.50_k000  epoch" not in out
    same_files(root, runs)
    refuse((*dense, "--save-epochs 1 2"), "save_epochs")
    refuse((*dense, "--compile"), "compile is False there and True here")
    out = succeed(*dense, "--seed 0 4")
    assert "seed0 is finished" in out and "seed 4  epoch   3/3" in out


def test_a_new_mask_is_permuted_without_matching_again(runs, ends, tmp_path):
    folder = shutil.copytree(runs / ALIGNED, tmp_path / ALIGNED)
    (folder / "mask_0.70.pt").unlink()
    (folder / "result.json").write_text(json.dumps(result(folder) | {"seconds": 1000}))
    out = succeed(*stage3(*ends, folder))
    assert "objective" not in out and "mask_0.70.pt" in out and "mask_0.50.pt" not in out
    assert 1000 < result(folder)["seconds"] < 1100  # the sum of both calls
    same_files(tmp_path, runs)


@forks
def test_masks_do_not_depend_on_the_order_in_which_sparsities_are_requested(runs, tmp_path):
    command, out = stage2(runs / "dense/seed0", tmp_path / "imp"), tmp_path / "imp"
    succeed(*command, "--sparsity 0.3")
    kill_when("round  5", *command, "--sparsity", 0.7)
    assert (out / "round_04.pt").exists() and not (out / "mask_0.70.pt").exists()
    chain = state(out / "round_04.pt")
    checkpoint.save(chain | {"precision": "bf16"}, out / "round_04.pt")
    refuse((*command, "--sparsity 0.7"), "round_04.pt was trained in bf16 and not fp32")
    del chain["precision"]  # as in files of earlier versions
    checkpoint.save(chain, out / "round_04.pt")
    # A higher sparsity resumes from the latest round; a lower one repeats the chain.
    assert "round  1" not in succeed(*command, "--sparsity 0.7")
    before = (out / "mask_0.70.pt").stat().st_mtime_ns
    # 0.4877 differs by one weight from a round of the chain, and 0.4998 from 0.5.
    assert "round  1" in succeed(*command, "--sparsity 0.4877 0.4998 0.5 0.7")
    assert (out / "mask_0.70.pt").stat().st_mtime_ns == before
    for name in ("sparse_0.50.pt", "sparse_0.70.pt"):
        assert same(weights(out / name), weights(runs / "imp/seed0" / name))
    logs = [pd.read_csv(folder / "log.csv")["kept"] for folder in (out, runs / "imp/seed0")]
    assert set(logs[0]) == {*logs[1], 2621, 1918, 1873}
    assert [path.name for path in out.glob("round_*.pt")] == ["round_05.pt"]


@forks
def test_a_run_with_a_truncated_state_starts_over_and_saves_the_same_epochs(runs, tmp_path):
    kill_when("epoch   2/3", *stage1(tmp_path, "--save-epochs 0 1 2"))
    resume_file = tmp_path / "seed0/resume.pt"
    resume_file.write_bytes(resume_file.read_bytes()[:100])
    assert "starts again" in succeed(*stage1(tmp_path))
    (tmp_path / "seed0/epoch_0002.pt").unlink()  # not saved by the run to compare with
    same_files(tmp_path, runs / "dense")


def test_a_resumed_run_keeps_its_initialisation(tmp_path, monkeypatch):
    """Even if the code has changed the initialisation; the state of another network is refused."""
    with pytest.raises(InterruptedError), ending_at(1, 0, interrupt):
        start(*stage1(tmp_path))
    initialisation, before = tmp_path / "seed0/epoch_0000.pt", snapshot(tmp_path)
    monkeypatch.setitem(
        models.MODELS, "mlp", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    )
    refuse(stage1(tmp_path), "resume.pt does not fit")
    assert snapshot(tmp_path)[initialisation] == before[initialisation]
    monkeypatch.undo()
    monkeypatch.setattr(models, "initialise", lambda model: model)
    succeed(*stage1(tmp_path))
    assert snapshot(tmp_path)[initialisation] == before[initialisation]


def test_a_network_that_cannot_be_pruned_is_refused_before_training(tmp_path, monkeypatch):
    def build(*_):
        return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(192, 10)))

    monkeypatch.setitem(models.MODELS, "mlp", build)
    refuse(stage1(tmp_path / "dense"), "1.weight cannot be pruned")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_every_run_and_saves_its_state(tmp_path, signal_number, parallel, capfd):
    """The signal is sent to the command only; runs stop at the end of a step."""

    def child():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        start(*command, "--parallel 2" * parallel)

    command = stage1(tmp_path, "--epochs 100000 --save-epochs 9 --seed 0 1")
    process, last = fork(child), tmp_path / f"seed{int(parallel)}"
    try:
        while not (last / "epoch_0009.pt").is_file():
            assert process.is_alive()
            time.sleep(0.05)
        os.kill(process.pid, signal_number)
        process.join(60)
        assert process.exitcode == 130
        assert capfd.readouterr().err.count("run the same command again") == 1
        assert len(state(last / "resume.pt")["rows"]) >= 9
        assert (tmp_path / "seed1").exists() == parallel  # no further run has started
        assert not list(tmp_path.rglob("*.tmp"))
        with pytest.raises(ProcessLookupError):
            for _ in range(100):
                os.killpg(process.pid, 0)  # no process of the group is left
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


def test_an_evaluation_ends_early_after_sigterm(monkeypatch):
    monkeypatch.setattr(resume, "stop_requested", threading.Event())
    for batch in resume.until_stopped(iter(range(9))):
        if batch == 1:
            resume.stop_requested.set()
    assert batch == 1


def test_a_chain_without_result_json_is_finished(runs, tmp_path):
    folder = shutil.copytree(runs / "imp/seed0", tmp_path / "imp/seed0")
    (folder / "result.json").unlink()
    succeed(*stage2(runs / "dense/seed0", folder, "--keep-rounds"))
    assert (folder / "result.json").is_file()
    same_files(tmp_path, runs)
