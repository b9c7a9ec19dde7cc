"""Runs side by side: the same numbers as one run after the other."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

from common import checkpoint, parallel
from common.errors import UserError
from common.models import build_model
from common.seeding import seeded
from common.training import train
from tests.conftest import ROOT, TINY, call, forks, same, sparse, succeed
from tests.test_data import resident
from tests.test_training import SETTINGS

CPU = torch.device("cpu")
HOWS = [pytest.param(parallel._in_processes, marks=forks), parallel._in_threads]


def network(seed=0):
    return build_model("resnet20", 0.25, 2, (3, 8, 8), seed)


def test_the_order_of_an_epoch_is_read_by_slices_and_by_tensors_alike():
    data = resident(count=20, pad=1, flip=True)
    draw = data.draw(3, 7)
    batches = list(data.train_batches(8, 3, 7))
    assert len(batches) == 2
    for number, (images, labels) in enumerate(batches):
        again = data.batch(draw, torch.arange(8) + 8 * number)
        assert torch.equal(again[0], images) and torch.equal(again[1], labels)


@pytest.mark.parametrize("how", HOWS)
def test_runs_side_by_side_are_those_of_the_run_alone(tmp_path, how):
    data, states = resident(count=32, pad=1), {}

    def run(seed, folder):
        model = network(seed)
        train(model, data, [0.1] * (1 + seed % 3), folder=folder, **SETTINGS | {"seed": seed, "progress": False})
        checkpoint.save(model.state_dict(), folder / "end.pt")

    for seed in range(5):
        run(seed, tmp_path / f"alone{seed}")
        states[seed] = checkpoint.load(tmp_path / f"alone{seed}/end.pt")
    runs = {f"run{seed}": (lambda seed=seed: run(seed, tmp_path / f"run{seed}")) for seed in range(5)}
    assert how(runs, 3, CPU) == {}
    for seed in range(5):
        assert same(checkpoint.load(tmp_path / f"run{seed}/end.pt"), states[seed])
    assert not same(states[0], states[1])


@pytest.mark.parametrize("how", HOWS)
def test_a_run_that_fails_stops_no_other(tmp_path, how, monkeypatch, capfd):
    def user():
        raise UserError("the disk\nis full")

    runs = {name: (tmp_path / name).touch for name in "abc"}
    runs = {"x": user, **runs, "y": lambda: 1 / 0, "z": lambda: None}
    assert how(runs, 2, CPU) == {"x": 2, "y": 1}
    assert all((tmp_path / name).exists() for name in "abc")
    monkeypatch.setattr(parallel, "_in_processes", how)
    with pytest.raises(RuntimeError, match=r"2 of 6 runs failed \(y\)"):
        parallel.side_by_side(runs, 2, CPU)
    del runs["y"]
    with pytest.raises(UserError, match=r"1 of 5 runs failed \(x\)"):
        parallel.side_by_side(runs, 2, CPU)
    err = capfd.readouterr().err
    assert "x: error: the disk is full\n" in err and "ZeroDivisionError" in err


@pytest.mark.parametrize(
    "sent, kind, memory", [(signal.SIGKILL, UserError, True), (signal.SIGUSR1, RuntimeError, False)]
)
def test_a_killed_process_is_named(capfd, sent, kind, memory):
    """SIGKILL is what a machine without memory sends; other signals are bugs."""
    runs = {"killed": lambda: os.kill(os.getpid(), sent), "well": lambda: None}
    with pytest.raises(kind, match=r"1 of 2 runs failed \(killed\)"):
        parallel.side_by_side(runs, 2, CPU)
    err = capfd.readouterr().err
    assert f"killed: error: ended by {sent.name}" in err and ("memory" in err) == memory


def test_a_run_side_by_side_has_one_thread_whatever_the_others_have():
    def run():
        assert torch.get_num_threads() == 1

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for count in (1, 2):
            parallel.side_by_side({"a": run, "b": run}, count, CPU)
        assert parallel._in_threads({"a": run, "b": run}, 2, CPU) == {}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_how_many_run_side_by_side(monkeypatch):
    data = resident()
    assert parallel.pick_count("3", 9, 1, data) == 3 and parallel.pick_count("3", 2, 1, data) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 5})  # two cores
    assert [parallel.pick_count("auto", runs, 1, data) for runs in (1, 2, 3, 4, 5, 99)] == [1, 2, 3, 2, 2, 2]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16))
    assert [parallel.pick_count("auto", runs, 1, data) for runs in (3, 16, 17, 31)] == [3, 16, 16, 16]
    gpu = dataclasses.replace(data, train=data.train.to("meta"))  # any device that is no CPU
    assert [parallel.pick_count("auto", 99, width, gpu) for width in (0.25, 1, 4, 16, 32)] == [32, 16, 4, 1, 1]
    streamed = types.SimpleNamespace(device=torch.device("cuda"))  # ImageNet
    assert parallel.pick_count("auto", 99, 1, streamed) == 1 and parallel.pick_count("2", 99, 1, streamed) == 2


def test_the_generator_of_one_thread_is_not_moved_by_another():
    expected = network(1).state_dict()
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            with seeded(7):
                torch.rand(1)

    other = threading.Thread(target=disturb)
    other.start()
    try:
        assert all(same(network(1).state_dict(), expected) for _ in range(30))
    finally:
        stop.set()
        other.join()


def test_a_stop_reaches_every_run(tmp_path):
    command = [
        sys.executable,
        "train_dense.py",
        *TINY,
        "--epochs",
        "100000",
        "--seed",
        "0",
        "1",
        "--parallel",
        "2",
        "--out",
        tmp_path,
    ]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it would be ignored
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*/resume.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # to the command alone, not to its runs
    try:
        assert "goes on from the last epoch" in process.communicate(timeout=60)[1] and process.returncode == 130
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)  # any of the group
            time.sleep(0.1)


def test_a_stop_ends_threads_too(tmp_path):
    """As networks side by side on a GPU are: the command does not wait for the others."""
    code = """
import os, signal, threading, torch
from common import parallel
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored
runs = {"waits": threading.Event().wait, "stops": lambda: os.kill(os.getpid(), signal.SIGINT)}
parallel._in_threads(runs, 2, torch.device("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "goes on from the last epoch" in done.stderr


@forks
def test_every_stage_gives_the_same_whatever_runs_beside_it(runs, tmp_path):
    """The tiny pipeline runs on one thread, as every run side by side does."""
    succeed("train_dense", *TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, 1, 2, "--parallel", 2, "--out", tmp_path / "dense")  # fmt: skip
    for seed in range(3):
        for name in ("epoch_0000.pt", "epoch_0003.pt"):
            mine, theirs = (checkpoint.load(root / f"dense/seed{seed}" / name) for root in (tmp_path, runs))
            assert same(mine["state_dict"], theirs["state_dict"])
    imp = ("--sparsity", 0.5, 0.7, "--epochs", 1, "--batch-size", 64, "--device", "cpu", "--precision", "fp32")
    dense, out = (
        [root / f"{kind}/seed{seed}" for seed in (0, 2)] for root, kind in ((runs, "dense"), (tmp_path, "imp"))
    )
    succeed("prune_imp", "--dense", *dense, *imp, "--keep-rounds", "--parallel", "auto", "--out", *out)
    for seed in (0, 2):
        mine, theirs = (checkpoint.load(root / f"imp/seed{seed}/sparse_0.70.pt") for root in (tmp_path, runs))
        assert same(mine["state_dict"], theirs["state_dict"]) and same(mine["mask"], theirs["mask"])
    folder = tmp_path / "sparse"
    outcome = sparse("naive", runs / "dense/seed1", runs / "imp/seed0", folder, "--sparsity", 0.5, 0.7, "--rewind", 0, 1, "--parallel", 3)  # fmt: skip
    assert outcome.code == 0, outcome.err
    for name in ("s0.50_k000", "s0.50_k001", "s0.70_k000", "s0.70_k001"):
        mine, theirs = (
            checkpoint.load(root / name / "final.pt") for root in (folder, runs / "sparse/naive/seed0-seed1")
        )
        assert same(mine["state_dict"], theirs["state_dict"])


def test_a_chain_that_fails_is_one_line_and_the_others_end(runs, tmp_path):
    blocked = tmp_path / "blocked"
    succeed("prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.2, "--epochs", 1, "--batch-size", 64, "--device", "cpu", "--out", blocked)  # fmt: skip
    (blocked / "mask_0.20.pt").unlink()
    (blocked / "sparse_0.20.pt").write_bytes(b"cut off")  # found while it runs
    command = [sys.executable, "prune_imp.py", "--dense", runs / "dense/seed0", runs / "dense/seed2", "--sparsity", "0.2", "--epochs", "1",
               "--batch-size", "64", "--device", "cpu", "--parallel", "2", "--out", blocked, tmp_path / "well"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 2 and "sparse_0.20.pt cannot be read" in lines[0] and "1 of 2 runs failed" in lines[1]
    assert (tmp_path / "well/result.json").is_file()
    for wrong in (["--out", tmp_path], ["--out", tmp_path / "a", tmp_path / "a"]):
        outcome = call("prune_imp", "--dense", runs / "dense/seed0", runs / "dense/seed2", "--sparsity", 0.2, *wrong)
        assert outcome.code == 2 and "--out" in outcome.err


def test_the_number_side_by_side_is_checked():
    for wrong in ("0", "many", "-1"):
        outcome = call("train_dense", "--out", "nowhere", "--parallel", wrong)
        assert outcome.code == 2 and "--parallel" in outcome.err and outcome.err.count("\n") == 1
