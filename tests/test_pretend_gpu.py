"""The pretended GPU itself, and the training step on it: tests/test_cuda.py asks a real one."""

import dataclasses
from functools import partial

import pytest
import torch

from common import checkpoint, masking, parallel, training
from common.models import build_model
from common.training import GraphedStep, train
from tests.conftest import same
from tests.pretend_gpu import Graph, pretend_gpu
from tests.test_data import resident
from tests.test_training import SETTINGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
RATES = [0.125, 0.5, 0.25]  # that float32 holds exactly, as the rate is a float on a CPU and a tensor on a GPU


@pytest.fixture
def gpu():
    with pretend_gpu() as thread:
        yield thread


def network(seed=0):
    return build_model("resnet20", 0.25, 2, (3, 8, 8), seed)


def data_on(device, count=32):
    return resident(count=count, pad=1, flip=True, device=device)


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# ---------------------------------------------------------------- the pretence


def test_tensors_of_two_devices_do_not_mix(gpu):
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert there.device == torch.device("cuda:0") and (there + 1).is_cuda
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    wrongs = (lambda: here + there, lambda: torch.stack([here, there]), lambda: here[0].add_(there[0]))
    for wrong in wrongs:
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    with pytest.raises(RuntimeError, match="ordinal"):
        here.to("cuda:1")
    assert torch.equal(there.cpu(), here) and there[torch.tensor([2])].tolist() == [2]


def test_what_is_captured_is_computed_when_replayed(gpu):
    total, ones = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        double = ones * 2
        total.add_(double)
    assert total.tolist() == [0, 0] and double.isnan().all()
    ones.fill_(3)
    for count in (1, 2):
        graph.replay()
        assert total.tolist() == [6 * count] * 2 and double.tolist() == [6, 6]
    asking = (lambda: float(total[0]), total.cpu, lambda: torch.ones(2).to("cuda"), lambda: total[total > 0])
    for asks in asking:
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            asks()


def test_a_number_of_the_host_is_captured_as_it_is(gpu):
    factor, total, graph = torch.tensor(2.0), torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total.add_(factor)
    factor.fill_(5)
    graph.replay()
    assert total.item() == 2


def test_a_stream_waits_for_what_another_writes(gpu):
    ones, other = torch.ones(2, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(other), pytest.raises(RuntimeError, match="does not wait"):
        ones + 1
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        twos = ones + 1
    with pytest.raises(RuntimeError, match="does not wait"):
        twos.add_(1)
    torch.cuda.synchronize()
    assert (twos + 1).tolist() == [3, 3]


def test_the_gpu_that_is_named_is_the_current_one(gpu, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert training.pick_device("cuda:0") == torch.device("cuda:0") and current == [torch.device("cuda:0")]
    assert training.pick_device(None).type == "cuda" and len(current) == 1


# ---------------------------------------------------------------- the training step


@pytest.mark.parametrize("masked", [False, True])
def test_a_graph_trains_as_the_plain_loop(tmp_path, monkeypatch, masked):
    """Also where it is cut off and goes on: tables, place in the epoch, learning rate, tensors put back after the trial."""
    mask = None
    if masked:
        whole = masking.dense_mask(network().state_dict(), masking.prunable(network()))
        mask = masking.prune_by_magnitude(network().state_dict(), whole, 300)
    plain, graphed = network(), network()
    expected = train(plain, data_on("cpu"), RATES, folder=tmp_path / "a", mask=mask, first_epoch=2, **SETTINGS)
    replays, real = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: (replays.append(graph), real(graph)))

    class Killed(Exception):
        pass

    def kill(epoch):
        if epoch == 4:
            raise Killed

    with pretend_gpu():
        data = data_on("cuda")
        with pytest.raises(Killed):
            train(network(), data, RATES, folder=tmp_path / "b", mask=mask, first_epoch=2, at_epoch=kill, **SETTINGS)
        rows = train(graphed, data, RATES, folder=tmp_path / "b", mask=mask, first_epoch=2, **SETTINGS)  # resumed
        found = training.cpu_state(graphed)
    assert len(replays) == (2 + 2) * data.steps(4)  # two epochs before it was cut off, of which one counts
    assert without_time(rows) == without_time(expected) and same(plain.state_dict(), found)


def test_a_set_of_fewer_batches_than_trials_is_tried_and_put_back(tmp_path, gpu):
    for device in ("cpu", "cuda"):
        model, data = network(), data_on(device, count=6)
        train(model, data, [0.25], folder=tmp_path / device, **SETTINGS)
        checkpoint.save(training.cpu_state(model), tmp_path / device / "end.pt")
    assert data.steps(4) < training.TRIALS
    assert same(*(checkpoint.load(tmp_path / device / "end.pt") for device in ("cpu", "cuda")))


def test_the_host_never_waits_within_an_epoch(tmp_path, gpu):
    """However many steps an epoch has, it waits as often."""
    waits = {}
    for count in (8, 32):
        counts: list[int] = []
        data = data_on("cuda", count)
        data = dataclasses.replace(data, test=data.test[:8], test_labels=data.test_labels[:8])
        count_waits = partial(lambda counts, epoch: counts.append(gpu.waits), counts)
        train(network(), data, RATES, folder=tmp_path / str(count), at_epoch=count_waits, **SETTINGS)
        waits[data.steps(4)] = counts[2] - counts[1]
    assert set(waits) == {2, 8} and waits[2] == waits[8] > 0


def test_a_step_that_asks_the_device_for_a_value_is_launched_one_by_one(gpu, capfd):
    total, data = torch.zeros((), device="cuda"), data_on("cuda")
    step = GraphedStep(lambda x, y: total.add_(float(x.sum())), data, 16, [total])
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "one by one" in told and "stream is capturing" in told and float(total) == 0
    for _ in step.start(0, 0):
        step()
    assert float(total) == pytest.approx(sum(float(x.sum()) for x, _ in data.train_batches(16, 0, 0)))


def test_networks_side_by_side_are_those_of_the_run_alone(tmp_path, gpu):
    def run(data, seed, folder):
        model = network(seed)
        train(model, data, RATES[: 1 + seed % 3], folder=folder, **SETTINGS | {"seed": seed, "precision": "bf16"})
        checkpoint.save(training.cpu_state(model), folder / "end.pt")

    for seed in range(4):
        run(data_on("cuda"), seed, tmp_path / f"alone{seed}")
    data = data_on("cuda")
    data = dataclasses.replace(data, train=data.train.clone())  # by a kernel, for which the other streams have to wait
    runs = {f"run{seed}": partial(run, data, seed, tmp_path / f"run{seed}") for seed in range(4)}
    parallel.side_by_side(runs, 2, data.device)
    for seed in range(4):
        assert same(*(checkpoint.load(tmp_path / f"{kind}{seed}/end.pt") for kind in ("alone", "run")))
