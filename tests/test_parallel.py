"""Runs side by side: the same numbers as one run after the other."""

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
BOTH = [parallel._in_processes, parallel._in_threads]
HOWS = [pytest.param(BOTH[0], marks=forks), BOTH[1]]


@pytest.mark.parametrize("how", HOWS)
def test_a_run_that_fails_stops_no_other(tmp_path, how, monkeypatch, capfd):
    def user():
        raise UserError("the disk\nis full")

    runs = {"x": user, "y": lambda: 1 / 0} | {name: (tmp_path / name).touch for name in "abc"}
    monkeypatch.setattr(parallel, "_in_processes", how)
    with pytest.raises(RuntimeError, match=r"2 of 5 runs failed \(y\)"):
        parallel.side_by_side(runs, 2, CPU)
    assert all((tmp_path / name).exists() for name in "abc")
    del runs["y"]
    with pytest.raises(UserError, match=r"1 of 4 runs failed \(x\)"):
        parallel.side_by_side(runs, 2, CPU)
    err = capfd.readouterr().err
    assert "x: error: the disk is full\n" in err and "ZeroDivisionError" in err


@pytest.mark.parametrize("how", HOWS)
def test_a_reader_that_has_read_enough_is_no_bug(how, monkeypatch, capfd):
    """As `| head`, which closes what is printed to."""

    def printing():
        raise BrokenPipeError

    monkeypatch.setattr(parallel, "_in_processes", how)
    with pytest.raises(BrokenPipeError):
        parallel.side_by_side({"a": printing, "b": lambda: None}, 2, CPU)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("sent, kind", [("SIGKILL", UserError), ("SIGUSR1", RuntimeError)])
def test_a_killed_process_is_named(capfd, sent, kind):
    """SIGKILL is what a machine without memory sends; other signals are bugs."""
    runs = {"killed": lambda: os.kill(os.getpid(), signal.Signals[sent]), "well": lambda: None}
    with pytest.raises(kind, match=r"1 of 2 runs failed \(killed\)"):
        parallel.side_by_side(runs, 2, CPU)
    err = capfd.readouterr().err
    assert f"killed: error: killed by {sent}" in err and ("memory" in err) == (kind is UserError)


def test_a_run_side_by_side_has_one_thread_whatever_the_others_have():
    runs = {name: lambda: 1 / (torch.get_num_threads() == 1) for name in "ab"}
    try:
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2  # a thread asks for the number once, and keeps it
        for how, count in ((BOTH[0], 1), (BOTH[0], 2), (BOTH[1], 2)):
            assert how(runs, count, CPU) == {}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# Cores, --parallel, runs, width, where the data are; and how many runs go side by side. No more
# than a few share a few cores.
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
def test_how_many_run_side_by_side(monkeypatch, line):
    cores, asked, runs, width, where, count = line.split()
    imagenet = types.SimpleNamespace(device=torch.device("cuda"))
    data = {"cpu": resident(), "gpu": resident(device="meta"), "imagenet": imagenet}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(int(cores)))
    assert parallel.pick_count(asked, int(runs), float(width), data[where]) == int(count)


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


@forks
def test_every_stage_gives_the_same_whatever_runs_beside_it(runs, ends, tmp_path):
    """The tiny pipeline runs on one thread, as every run side by side does."""
    succeed(*stage1(tmp_path / "dense", "--seed 0 1 2 --parallel 2"))
    roots = (runs / "dense", tmp_path / "imp")
    chains, outs = ([root / f"seed{n}" for n in (0, 2)] for root in roots)
    more = ("--dense", *chains, "--out", *outs, "--parallel auto")
    succeed(*stage2(chains[0], tmp_path, *more))
    naive = tmp_path / "sparse/naive/seed0-seed1"
    succeed(*stage4("naive", *ends[1:], naive, "--parallel 3"))
    same_files(tmp_path, runs)
    assert len([*tmp_path.rglob("final.pt")]) == 4
