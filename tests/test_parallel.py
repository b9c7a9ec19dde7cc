"""Runs in parallel give the same numbers as sequential ones."""

import os
import signal
import threading
import types

import pytest
import torch

from common.errors import UserError
from common.runtime import parallel
from common.runtime.seeding import seeded
from tests.conftest import forks, same, same_files, small_resnet, stage1, stage2, stage4, succeed
from tests.test_data import resident

CPU = torch.device("cpu")
EXECUTORS = [pytest.param(parallel._in_processes, marks=forks), parallel._in_threads]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_failed_run_does_not_stop_the_others(tmp_path, executor, monkeypatch, capfd):
    def user_error():
        raise UserError("the disk\nis full")

    runs = {"x": user_error, "y": lambda: 1 / 0} | {name: (tmp_path / name).touch for name in "abc"}
    monkeypatch.setattr(parallel, "_in_processes", executor)
    with pytest.raises(RuntimeError, match=r"2 of 5 runs failed \(y\)"):
        parallel.run_in_parallel(runs, 2, CPU)
    assert all((tmp_path / name).exists() for name in "abc")
    del runs["y"]
    with pytest.raises(UserError, match=r"1 of 4 runs failed \(x\)"):
        parallel.run_in_parallel(runs, 2, CPU)
    err = capfd.readouterr().err
    assert "x: error: the disk is full\n" in err and "ZeroDivisionError" in err


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_closed_stdout_is_not_a_bug(executor, monkeypatch, capfd):
    """`| head` closes it after some lines."""

    def print_to_closed_stdout():
        raise BrokenPipeError

    monkeypatch.setattr(parallel, "_in_processes", executor)
    with pytest.raises(BrokenPipeError):
        parallel.run_in_parallel({"a": print_to_closed_stdout, "b": lambda: None}, 2, CPU)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("sent, kind", [("SIGKILL", UserError), ("SIGUSR1", RuntimeError)])
def test_a_killed_process_is_named(capfd, sent, kind):
    """The kernel sends SIGKILL when memory runs out; other signals are bugs."""
    runs = {"killed": lambda: os.kill(os.getpid(), signal.Signals[sent]), "good": lambda: None}
    with pytest.raises(kind, match=r"1 of 2 runs failed \(killed\)"):
        parallel.run_in_parallel(runs, 2, CPU)
    err = capfd.readouterr().err
    assert f"killed: error: killed by {sent}" in err and ("memory" in err) == (kind is UserError)


def test_each_parallel_run_has_one_thread():
    runs = {name: lambda: 1 / (torch.get_num_threads() == 1) for name in "ab"}
    try:
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2  # the first call fixes it for this thread
        for count in (1, 2):
            assert parallel._in_processes(runs, count, CPU) == {}
        assert parallel._in_threads(runs, 2, CPU) == {}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# Cores, --parallel, runs, width, kind of data; expected number of parallel runs.
COUNTS = """\
2 auto 3 1 cpu 3
2 auto 4 1 cpu 2
16 auto 31 1 cpu 16
2 3 9 1 cpu 3
2 3 2 1 cpu 2
2 auto 99 0.25 gpu 32
2 auto 99 4 gpu 4
2 auto 99 32 gpu 1
2 auto 99 1 imagenet 1"""


@pytest.mark.parametrize("line", COUNTS.splitlines())
def test_the_number_of_parallel_runs(monkeypatch, line):
    cores, flag, runs, width, kind, count = line.split()
    imagenet = types.SimpleNamespace(device=torch.device("cuda"))
    data = {"cpu": resident(), "gpu": resident(device="meta"), "imagenet": imagenet}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(int(cores)))
    assert parallel.pick_count(flag, int(runs), float(width), data[kind]) == int(count)


def test_seeding_is_not_disturbed_by_another_thread():
    expected, stop = small_resnet(1).state_dict(), threading.Event()

    def disturb():
        while not stop.is_set():
            with seeded(7):
                torch.rand(1)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert all(same(small_resnet(1).state_dict(), expected) for _ in range(30))
    finally:
        stop.set()
        thread.join()


@forks
def test_parallel_stages_write_the_same_files_as_sequential_ones(runs, ends, tmp_path):
    """The sequential pipeline also runs on one thread here."""
    succeed(*stage1(tmp_path / "dense", "--seed 0 1 2 --parallel 2"))
    roots = (runs / "dense", tmp_path / "imp")
    dense, imp = ([root / f"seed{n}" for n in (0, 2)] for root in roots)
    succeed(*stage2(dense[0], tmp_path, "--dense", *dense, "--out", *imp, "--parallel auto"))
    naive = tmp_path / "sparse/naive/seed0-seed1"
    succeed(*stage4("naive", *ends[1:], naive, "--parallel 3"))
    same_files(tmp_path, runs)
    assert len([*tmp_path.rglob("final.pt")]) == 4
