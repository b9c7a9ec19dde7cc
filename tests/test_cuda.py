"""Training on a GPU: a captured graph computes what single launches do, alone and beside others.

Where there is none, on a pretended one (tests/pretend_gpu.py), and then to the last bit.
"""

import dataclasses
import subprocess
import sys
import threading
import time
from functools import partial
from unittest import mock

import pytest
import torch

from common.runtime import graph, parallel
from common.runtime.graph import GraphedStep
from common.training import cpu_state, train
from tests.conftest import (
    ROOT,
    distance,
    ending_at,
    interrupt,
    small_cnn,
    small_resnet,
    stage1,
    weights,
    words,
)
from tests.pretend_gpu import Generator, pretend_gpu
from tests.test_data import resident
from tests.test_training import SETTINGS, half_mask, tiny

REAL = torch.cuda.is_available()
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2} if REAL else {"fp32": 0}
network = small_resnet if REAL else small_cnn
RATES = [0.125, 0.5, 0.25, 0.0625, 0.25]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with pretend_gpu():
        yield
        torch.cuda.set_sync_debug_mode("default")


def data_of(count=16):
    return resident(count=count, pad=1, flip=True, mean=0.3, std=0.2, device="cuda")


def plain(*arguments, **settings):
    """As `train`, without a graph."""
    with mock.patch.object(graph, "capturable", lambda *_: False):
        return train(*arguments, folder=None, **settings)


@pytest.fixture
def captures(monkeypatch):
    """What each came to: the replay of a graph, or the step itself."""
    names, capture = [], GraphedStep._capture

    def noted(step):
        replay = capture(step)
        names.append(replay.__name__)
        return replay

    monkeypatch.setattr(GraphedStep, "_capture", noted)
    return names


@pytest.mark.parametrize("count", [16, 6])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_graph_trains_as_the_plain_loop(tmp_path, captures, precision, count, capfd):
    """Also where it is cut off and goes on: place in the epoch, learning rate, momenta."""
    settings = SETTINGS | {"precision": precision, "first_epoch": 2, "mask": half_mask(network())}
    by_graph, by_loop, data = network(), network(), data_of(count)
    expected = plain(by_loop, data, RATES, **settings)
    settings |= {"folder": tmp_path, "checkpoint_minutes": 0}
    steps = data.steps(4)
    for done, step in [(1, 0), (2, 2)] if steps > 1 else [(1, 0)]:
        with pytest.raises(InterruptedError), ending_at(done, step, interrupt):
            train(network(), data, RATES, **settings)
    rows = train(by_graph, data, RATES, **settings)
    assert "starts again" not in capfd.readouterr().out
    # A set of one batch is captured in a later epoch, and not before it was cut off.
    assert captures == ["replay"] * (3 if steps > 1 else 1)
    tolerance = TOLERANCES[precision]
    assert distance(cpu_state(by_loop), cpu_state(by_graph)) <= tolerance
    for key in ("train_loss", "train_acc", "test_loss"):
        found, wanted = ([row[key] for row in some] for some in (rows, expected))
        assert found == pytest.approx(wanted, rel=10 * tolerance, abs=100 * tolerance), key


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad])
def test_any_optimiser_trains_in_a_graph_or_without(captures, make):
    """The step count of AdamW is in the graph; others cannot be captured, and train without."""
    settings = SETTINGS | {"make_optimiser": partial(make, lr=0.1)}
    ends = []
    for way in (plain, partial(train, folder=None)):
        model = tiny()
        way(model, data_of(), [2**-7] * 2, **settings)
        ends.append(cpu_state(model))
    assert distance(*ends) < 1e-3 and bool(captures) == (make is torch.optim.AdamW)


def test_the_host_never_waits_within_an_epoch(monkeypatch):
    call, seen = GraphedStep.__call__, []

    def watched(step):
        call(step)
        strict = step.calls > graph.EAGER_STEPS and step.calls % step.steps
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        seen.append(strict)

    monkeypatch.setattr(GraphedStep, "__call__", watched)
    train(tiny(), data_of(), RATES[:4], folder=None, **SETTINGS)
    assert sum(map(bool, seen)) == 4 * 3 - graph.EAGER_STEPS


def test_networks_side_by_side_are_those_of_the_run_alone():
    """On a GPU more of them than CUDA has streams to hand out, of one to three epochs."""
    data, ends = data_of(), [[], [], []]

    def run(seed, data):
        model, rates = small_cnn(seed), RATES[: 1 + seed]
        train(model, data, rates, folder=None, **SETTINGS | {"seed": seed, "progress": False})
        ends[seed].append(cpu_state(model))

    for seed in range(3):
        run(seed, data)
    # By a kernel, for which the other streams have to wait.
    data = dataclasses.replace(data_of(), train=data.train.clone())
    runs = {str(number): partial(run, number % 3, data) for number in range(30 if REAL else 3)}
    parallel.side_by_side(runs, 8 if REAL else 2, data.device)
    for alone, *beside in ends:
        assert beside and all(distance(alone, end) <= TOLERANCES["fp32"] for end in beside)
    assert distance(ends[0][0], ends[1][0]) > 1e-2


def test_a_graph_is_replayed_while_another_is_captured():
    data, calls = data_of(), []
    ready, capturing, replayed = (threading.Event() for _ in range(3))

    def first():
        step = GraphedStep(lambda x, y: None, data, 4)
        for _ in range(graph.EAGER_STEPS + 1):
            step()
        ready.set()
        assert capturing.wait(9)
        step()
        replayed.set()

    def second():
        def hold(x, y):
            calls.append(step)
            if len(calls) > graph.EAGER_STEPS:
                capturing.set()
                assert replayed.wait(9)

        step = GraphedStep(hold, data, 4)
        assert ready.wait(9)
        for _ in range(graph.EAGER_STEPS + 1):
            step()

    parallel.side_by_side({"first": first, "second": second}, 2, data.device)


def test_networks_are_set_up_one_at_a_time():
    """To compile waits for the whole device, and so breaks what another thread captures."""
    data, busy, seen = data_of(), threading.Lock(), []

    def run():
        def one_by_one(x, y):
            seen.append(busy.acquire(blocking=False))
            time.sleep(0.02)
            if seen[-1]:
                busy.release()

        step = GraphedStep(one_by_one, data, 4)
        for _ in range(graph.EAGER_STEPS + 2):
            step()

    parallel.side_by_side({"first": run, "second": run}, 2, data.device)
    assert seen == [True] * 2 * (graph.EAGER_STEPS + 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(tmp_path):
    """A network with BatchNorm, whose statistics are taken over both."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node"
    for count in (1, 2):
        script, *flags = words(*stage1(tmp_path / str(count), "--model resnet20 --device cuda"))
        command = [sys.executable, *words(launch, count), f"{script}.py", *flags]
        subprocess.run(command, cwd=ROOT, check=True)
    one, two = (weights(tmp_path / count / "seed0/epoch_0003.pt") for count in "12")
    assert distance(one, two) < 1e-3


@pytest.mark.skipif(REAL, reason="up to torch 2.12 a failed capture is the last of a process")
def test_a_step_that_asks_the_device_for_a_value_is_launched_one_by_one(
    captures, capfd, monkeypatch
):
    """That of the next network too, with one line in all; what it draws goes on."""
    monkeypatch.setattr(GraphedStep, "broken", False, raising=False)
    total, data, generator = torch.zeros((), device="cuda"), data_of(), Generator()

    def asking(x, y):
        generator.draw()
        total.add_(float(x.sum()))

    with graph.side_stream(data.device):
        for _ in range(2):
            step = GraphedStep(asking, data, 4, generator)
            for epoch in range(2):
                for _ in step.start(0, epoch):
                    step()
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "slower" in told and captures == ["_step"]
    batches = [x for epoch in range(2) for x, _ in data.train_batches(4, 0, epoch)]
    assert float(total) == pytest.approx(2 * sum(float(x.sum()) for x in batches), rel=1e-4)
