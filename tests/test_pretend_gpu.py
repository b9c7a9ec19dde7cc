"""The pretended GPU itself, and the training step on it: tests/test_cuda.py asks a real one."""

import dataclasses
from functools import partial

import pytest
import torch

from common import masking
from common.models import build_model
from common.runtime import graph, parallel
from common.runtime.device import pick_device
from common.training import cpu_state, train
from tests.conftest import distance, same, small_resnet
from tests.pretend_gpu import Graph, pretend_gpu
from tests.test_data import resident
from tests.test_parallel import jobs, trained
from tests.test_training import SETTINGS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
# That float32 holds exactly, as the rate is a float on a CPU and a tensor on a GPU.
RATES = [0.125, 0.5, 0.25]


@pytest.fixture
def gpu():
    with pretend_gpu() as thread:
        yield thread


def data_on(device, count=32):
    return resident(count=count, pad=1, flip=True, device=device)


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# ---------------------------------------------------------------- the pretence


def test_tensors_of_two_devices_do_not_mix(gpu):
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert there.device == torch.device("cuda:0") and (there + 1).is_cuda
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    for wrong in (
        lambda: here + there,
        lambda: torch.stack([here, there]),
        lambda: here[0].add_(there[0]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    with pytest.raises(RuntimeError, match="ordinal"):
        here.to("cuda:1")
    assert torch.equal(there.cpu(), here) and there[torch.tensor([2])].tolist() == [2]


def test_what_is_captured_is_computed_when_replayed(gpu):
    total, ones, factor = (
        torch.zeros(2, device="cuda"),
        torch.ones(2, device="cuda"),
        torch.tensor(2.0),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        double = ones * factor
        total.add_(double)
    assert total.tolist() == [0, 0] and double.isnan().all()
    ones.fill_(3)
    factor.fill_(5)  # a number of the host is captured as it was
    for count in (1, 2):
        graph.replay()
        assert total.tolist() == [6 * count] * 2 and double.tolist() == [6, 6]
    for asks in (
        lambda: float(total[0]),
        total.cpu,
        lambda: torch.ones(2).to("cuda"),
        lambda: total[total > 0],
    ):
        capture = torch.cuda.graph(torch.cuda.CUDAGraph())
        with pytest.raises(RuntimeError, match="capturing"), capture:
            asks()


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
    assert pick_device("cuda:0") == torch.device("cuda:0") and current == [torch.device("cuda:0")]
    assert pick_device(None).type == "cuda" and len(current) == 1


# ---------------------------------------------------------------- the training step


@pytest.mark.parametrize("masked", [False, True])
def test_a_graph_trains_as_the_plain_loop(tmp_path, monkeypatch, masked):
    """Also where it is cut off and goes on: place in the epoch, learning rate, momenta."""
    settings = SETTINGS | {"mask": None, "first_epoch": 2}
    if masked:
        values, names = small_resnet().state_dict(), masking.prunable(small_resnet())
        everything = masking.dense_mask(values, names)
        settings["mask"] = masking.prune_by_magnitude(values, everything, 300)
    plain, graphed = small_resnet(), small_resnet()
    expected = train(plain, data_on("cpu"), RATES, folder=tmp_path / "a", **settings)
    replays, real = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: (replays.append(graph), real(graph)))

    def kill(epoch):
        if epoch == 4:
            raise InterruptedError

    with pretend_gpu():
        data, settings["folder"] = data_on("cuda"), tmp_path / "b"
        with pytest.raises(InterruptedError):
            train(small_resnet(), data, RATES, at_epoch=kill, **settings)
        rows = train(graphed, data, RATES, **settings)
        found = cpu_state(graphed)
    # Two epochs before it was cut off, of which one counts; each call begins without a graph.
    assert len(replays) == (2 + 2) * data.steps(4) - 2 * graph.EAGER_STEPS
    assert without_time(rows) == without_time(expected) and same(plain.state_dict(), found)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimiser_trains_in_a_graph_or_says_that_it_cannot(gpu, make):
    """The step count of AdamW is in the graph; Adagrad cannot be captured, and trains without."""
    ends, settings = [], SETTINGS | {"make_optimiser": partial(make, lr=0.1)}
    for device in ("cpu", "cuda"):
        model = build_model("mlp", 1 / 64, 2, (3, 8, 8))
        train(model, data_on(device), [2**-7] * 2, folder=None, **settings)
        ends.append(cpu_state(model))
    assert distance(*ends) < 1e-3


def test_a_set_of_few_batches_is_captured_in_a_later_epoch(gpu):
    ends = []
    for device in ("cpu", "cuda"):
        model, data = small_resnet(), data_on(device, count=6)
        train(model, data, [0.25] * 5, folder=None, **SETTINGS)
        ends.append(cpu_state(model))
    assert data.steps(4) < graph.EAGER_STEPS and same(*ends)


def test_the_host_never_waits_within_an_epoch(tmp_path, gpu):
    """However many steps an epoch has, it waits as often."""
    waits = {}
    for count in (8, 32):
        counts, data = [], data_on("cuda", count)
        data = dataclasses.replace(data, test=data.test[:8], test_labels=data.test_labels[:8])
        count_waits = partial(lambda counts, epoch: counts.append(gpu.waits), counts)
        train(small_resnet(), data, RATES, folder=None, at_epoch=count_waits, **SETTINGS)
        waits[data.steps(4)] = counts[2] - counts[1]
    assert set(waits) == {2, 8} and waits[2] == waits[8] > 0


def test_a_step_that_asks_the_device_for_a_value_is_launched_one_by_one(gpu, capfd):
    total, data = torch.zeros((), device="cuda"), data_on("cuda")
    step = graph.GraphedStep(lambda x, y: total.add_(float(x.sum())), data, 4)
    with graph.side_stream(data.device):
        for _ in step.start(0, 0):
            step()
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "slower" in told and "stream is capturing" in told
    batches = data.train_batches(4, 0, 0)
    assert float(total) == pytest.approx(sum(float(x.sum()) for x, _ in batches))


def test_networks_side_by_side_are_those_of_the_run_alone(tmp_path, gpu):
    data = data_on("cuda")
    for run in jobs(tmp_path / "alone", data, precision="bf16").values():
        run()
    data = data_on("cuda")
    # By a kernel, for which the other streams have to wait.
    data = dataclasses.replace(data, train=data.train.clone())
    parallel.side_by_side(jobs(tmp_path / "beside", data, precision="bf16"), 2, data.device)
    assert all(map(same, trained(tmp_path / "alone"), trained(tmp_path / "beside")))
