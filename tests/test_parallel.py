"""Runs side by side: the same numbers as one run after the other."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from functools import partial

import pytest
import torch

from common import checkpoint
from common.errors import UserError
from common.runtime import parallel
from common.runtime.seeding import seeded
from common.training import cpu_state, train
from tests.conftest import (
    ROOT,
    forks,
    same,
    small_resnet,
    stage1,
    stage2,
    stage4,
    state,
    succeed,
    weights,
)
from tests.test_data import resident
from tests.test_training import SETTINGS

CPU = torch.device("cpu")
HOWS = [pytest.param(parallel._in_processes, marks=forks), parallel._in_threads]


def jobs(folder, data, **settings):
    """Five runs of one to three epochs, each of which leaves end.pt in a folder of its own."""

    def run(seed):
        model, rates, out = (
            small_resnet(seed),
            [0.125, 0.5, 0.25][: 1 + seed % 3],
            folder / str(seed),
        )
        about = SETTINGS | {"seed": seed, "progress": False} | settings
        train(model, data, rates, folder=out, **about)
        checkpoint.save(cpu_state(model), out / "end.pt")

    return {str(seed): partial(run, seed) for seed in range(5)}


def trained(folder):
    return [checkpoint.load(folder / f"{seed}/end.pt") for seed in range(5)]


@pytest.mark.parametrize("how", HOWS)
def test_runs_side_by_side_are_those_of_the_run_alone(tmp_path, how):
    data = resident(count=32, pad=1)
    for run in jobs(tmp_path / "alone", data).values():
        run()
    assert how(jobs(tmp_path / "beside", data), 3, CPU) == {}
    alone, beside = trained(tmp_path / "alone"), trained(tmp_path / "beside")
    assert all(map(same, alone, beside)) and not same(*alone[:2])


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
    "sent, kind, memory",
    [(signal.SIGKILL, UserError, True), (signal.SIGUSR1, RuntimeError, False)],
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

    threads, runs = torch.get_num_threads(), {"a": run, "b": run}
    try:
        torch.set_num_threads(2)
        for count in (1, 2):
            parallel.side_by_side(runs, count, CPU)
        assert parallel._in_threads(runs, 2, CPU) == {}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "cores, runs, expected",
    [
        (2, (1, 2, 3, 4, 5, 99), [1, 2, 3, 2, 2, 2]),
        (16, (3, 16, 17, 31), [3, 16, 16, 16]),
    ],
)
def test_how_many_run_side_by_side_on_a_cpu(monkeypatch, cores, runs, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    assert [parallel.pick_count("auto", count, 1, resident()) for count in runs] == expected
    assert [parallel.pick_count("3", count, 1, resident()) for count in (9, 2)] == [3, 2]


def test_how_many_run_side_by_side_on_a_gpu():
    gpu = resident(device="meta")  # any device that is no CPU
    widths = (0.25, 1, 4, 16, 32)
    assert [parallel.pick_count("auto", 99, width, gpu) for width in widths] == [32, 16, 4, 1, 1]
    streamed = types.SimpleNamespace(device=torch.device("cuda"))  # ImageNet
    assert [parallel.pick_count(asked, 99, 1, streamed) for asked in ("auto", "2")] == [1, 2]


def test_the_generator_of_one_thread_is_not_moved_by_another():
    expected, stop = small_resnet(1).state_dict(), threading.Event()

    def disturb():
        while not stop.is_set():
            with seeded(7):
                torch.rand(1)

    other = threading.Thread(target=disturb)
    other.start()
    try:
        assert all(same(small_resnet(1).state_dict(), expected) for _ in range(30))
    finally:
        stop.set()
        other.join()


def test_a_stop_reaches_every_run(tmp_path):
    endless = ("--epochs", 100000, "--seed", 0, 1, "--parallel", 2)
    script, *arguments = map(str, stage1(tmp_path, *endless))
    process = subprocess.Popen(
        [sys.executable, f"{script}.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # In the background it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*/resume.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # to the command alone, not to its runs
    try:
        told = process.communicate(timeout=60)[1]
        assert "goes on from the last epoch" in told and process.returncode == 130
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)  # any of the group
            time.sleep(0.1)


def test_a_stop_ends_threads_too():
    """As networks side by side on a GPU are: the command does not wait for the others."""
    code = """
import os, signal, threading, torch
from common.runtime import parallel
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored
runs = {"waits": threading.Event().wait, "stops": lambda: os.kill(os.getpid(), signal.SIGINT)}
parallel._in_threads(runs, 2, torch.device("cpu"))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "goes on from the last epoch" in done.stderr


@forks
def test_every_stage_gives_the_same_whatever_runs_beside_it(runs, ends, tmp_path):
    """The tiny pipeline runs on one thread, as every run side by side does."""
    source, target, masks = ends
    succeed(*stage1(tmp_path / "dense", "--seed", 0, 1, 2, "--parallel", 2))
    dense, outs = (
        [root / f"seed{n}" for n in (0, 2)] for root in (runs / "dense", tmp_path / "imp")
    )
    more = ("--dense", *dense, "--out", *outs, "--keep-rounds", "--parallel", "auto")
    succeed(*stage2(source, tmp_path, *more))
    naive = "sparse/naive/seed0-seed1"
    succeed(*stage4("naive", target, masks, tmp_path / naive, "--parallel", 3))
    cells = [f"{naive}/s{s}_k{k}/final.pt" for s in ("0.50", "0.70") for k in ("000", "001")]
    epochs = [f"dense/seed{n}/epoch_000{k}.pt" for n in (0, 1, 2) for k in (0, 3)]
    pruned = [f"imp/seed{n}/sparse_0.70.pt" for n in (0, 2)]
    for name in (*epochs, *pruned, *cells):
        assert same(weights(tmp_path / name), weights(runs / name)), name
    for name in pruned:
        assert same(state(tmp_path / name)["mask"], state(runs / name)["mask"])
