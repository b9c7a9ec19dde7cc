"""Everything that runs on a GPU, on one that is not there (tests/pretend_gpu.py): the same results as on a CPU."""

import dataclasses
import shutil
import threading
import time
from functools import partial

import pandas as pd
import pytest
import torch

from analyze import benchmark, rates
from common import checkpoint, masking, parallel, training
from common.models import build_model
from common.training import GraphedStep, train
from tests.conftest import TINY, same, succeed
from tests.pretend_gpu import Graph, pretend_gpu
from tests.test_data import resident
from tests.test_training import SETTINGS

RATES = [0.125, 0.5, 0.25]  # that float32 holds exactly, as the rate is a float on a CPU and a tensor on a GPU
ON_GPU = [*TINY[:-1], "cuda"]


@pytest.fixture
def gpu():
    with pretend_gpu() as thread:
        yield thread


def network(seed=0):
    return build_model("resnet20", 0.25, 2, (3, 8, 8), seed)


def data_on(device, count=32):
    found = resident(count=count, pad=1, flip=True)
    tensors = (part.to(device) for part in (found.train, found.train_labels, found.test, found.test_labels))
    return type(found)(*tensors, found.pad, found.flip, found.description)


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# ---------------------------------------------------------------- the pretence


def test_tensors_of_two_devices_do_not_mix(gpu):
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert (
        there.device == torch.device("cuda:0")
        and (there + 1).is_cuda
        and (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    )
    for wrong in (lambda: here + there, lambda: torch.stack([here, there]), lambda: here.add_(there[0])):
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
    for asks in (
        lambda: float(total[0]),
        lambda: total.cpu(),
        lambda: torch.ones(2).to("cuda"),
        lambda: total[total > 0],
    ):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            asks()


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
    told = capfd.readouterr().out
    assert told.count("\n") == 1 and "one by one" in told and "stream is capturing" in told and float(total) == 0
    for _ in step.start(0, 0):
        step()
    assert float(total) == pytest.approx(sum(float(x.sum()) for x, _ in data.train_batches(16, 0, 0)))


def test_networks_side_by_side_are_those_of_the_run_alone(tmp_path, gpu):
    data = data_on("cuda")

    def run(seed, folder):
        model = network(seed)
        train(model, data, RATES[: 1 + seed % 3], folder=folder, **SETTINGS | {"seed": seed, "precision": "bf16"})
        checkpoint.save(training.cpu_state(model), folder / "end.pt")

    for seed in range(4):
        run(seed, tmp_path / f"alone{seed}")
    parallel.side_by_side(
        {f"{seed}": (lambda seed=seed: run(seed, tmp_path / f"run{seed}")) for seed in range(4)}, 2, data.device
    )
    for seed in range(4):
        assert same(*(checkpoint.load(tmp_path / f"{kind}{seed}/end.pt") for kind in ("alone", "run")))


# ---------------------------------------------------------------- stages and analyses


def distance(one, other):
    a, b = (torch.cat([value.double().flatten() for value in weights.values()]) for weights in (one, other))
    return float((a - b).norm() / a.norm())


def test_every_stage_on_a_gpu_does_what_it_does_on_a_cpu(runs, tmp_path, gpu):
    out = succeed(
        "train_dense",
        *ON_GPU,
        "--epochs",
        3,
        "--save-epochs",
        1,
        "--seed",
        0,
        1,
        "--parallel",
        2,
        "--out",
        tmp_path / "dense",
    )
    tiny = ("--batch-size", 64, "--precision", "fp32")  # on the GPU, as one is there
    dense = [tmp_path / f"dense/seed{seed}" for seed in (0, 1)]
    out += succeed(
        "prune_imp", "--dense", dense[0], "--sparsity", 0.5, 0.7, "--epochs", 1, *tiny, "--out", tmp_path / "imp/seed0"
    )
    aligned = tmp_path / "align/activation/seed0-seed1"
    succeed(
        "align_mask", "--source", dense[0], "--target", dense[1], "--masks", tmp_path / "imp/seed0", "--out", aligned
    )
    grid = ("--sparsity", 0.5, 0.7, "--rewind", 0, 1, "--parallel", "auto", *tiny)
    sparse = tmp_path / "sparse/permuted/seed0-seed1"
    out += succeed(
        "train_sparse", "--arm", "permuted", "--weights", dense[1], "--masks", aligned, "--out", sparse, *grid
    )
    assert "one by one" not in out
    for path in (
        "dense/seed1/epoch_0003.pt",
        "imp/seed0/sparse_0.70.pt",
        "sparse/permuted/seed0-seed1/s0.70_k001/final.pt",
    ):
        mine, theirs = (checkpoint.load(root / path) for root in (tmp_path, runs))
        assert distance(theirs["state_dict"], mine["state_dict"]) < 1e-3
        result = checkpoint.load_json((tmp_path / path).parent / "result.json")
        assert result["device"].startswith("cuda")
    other = checkpoint.load(runs / "dense/seed0/epoch_0003.pt")["state_dict"]
    assert distance(other, checkpoint.load(dense[1] / "epoch_0003.pt")["state_dict"]) > 0.1  # what can be told apart
    for path in ("imp/seed0/mask_0.50.pt", "align/activation/seed0-seed1/mask_0.50.pt"):
        mine, theirs = (checkpoint.load(root / path)["mask"] for root in (tmp_path, runs))
        assert same(mine, theirs)


@pytest.mark.parametrize("method", ["weight", "masked"])
def test_methods_without_images_on_a_gpu(runs, tmp_path, method):
    ends = (
        "--source",
        runs / "dense/seed0",
        "--target",
        runs / "dense/seed1",
        "--masks",
        runs / "imp/seed0",
        "--method",
        method,
    )
    for device in ("cpu", "cuda"):
        with pretend_gpu():
            succeed("align_mask", *ends, "--device", device, "--out", tmp_path / device)
    assert same(*(checkpoint.load(tmp_path / device / "mask_0.70.pt")["mask"] for device in ("cpu", "cuda")))


@pytest.mark.parametrize("name, flags", [
    ("interpolation", ("--points", 3, "--images", 100)),
    ("imp_barrier", ("--points", 3, "--images", 64)),
    ("landscape", ("--grid", 3, "--images", 100)),
    ("diversity", ()),
    ("planted", ("--images", 250)),
])  # fmt: skip
def test_analyses_on_a_gpu(runs, tmp_path, name, flags):
    tables = []
    for device in ("cpu", "cuda"):
        root = tmp_path / device
        shutil.copytree(runs, root)
        with pretend_gpu():
            succeed(f"analyze.{name}", root, *flags, "--device", device)
        (path, *_) = sorted([*root.glob(f"{name}*.csv"), *root.glob(f"figures/{name}*.csv")])
        tables.append(pd.read_csv(path))
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- the benchmark


def test_networks_side_by_side_are_measured_while_all_of_them_train(monkeypatch, gpu):
    """One that is set up early waits for the others, or it would be measured with the device to itself."""
    training_now, most, lock = [], [], threading.Lock()

    def pretend_to_train(model, data, rates, *, at_epoch, folder, **settings):
        time.sleep(0.1 * int(folder.name))
        at_epoch(1)
        with lock:
            training_now.append(folder)
            most.append(len(training_now))
        time.sleep(0.05)
        with lock:
            training_now.remove(folder)
        at_epoch(2)

    monkeypatch.setattr(rates, "train", pretend_to_train)
    data = rates.random_images(4, 8, torch.device("cuda"))
    rate = rates.training_rate([network(seed) for seed in range(3)], data, batch=2, parallel="3")
    assert max(most) == 3 and 0 < rate < 3 * 4 / 0.05


def test_the_benchmark_on_a_gpu(monkeypatch, tmp_path, gpu, capfd):
    monkeypatch.setattr(rates, "build_model", lambda name, width, *rest: build_model("resnet20", 0.25, *rest))
    device = torch.device("cuda")
    rows = [
        *benchmark.training_rows(1, 8, 1, 1, device),
        *benchmark.parallel_rows([2], 8, 1, 1, device),
        benchmark.stacked_row(2, 8, 1, 1, device),
        benchmark.line_row(8, 64, 1, device),
        benchmark.matching_row("resnet20", 8, 64, 32, 1, device),
        benchmark.weight_matching_row(1, 1, device),
    ]
    assert len(rows) == 3 + 3 + 4 and all(row["ours"] > 0 and row["other"] > 0 for row in rows)
    assert "one by one" not in capfd.readouterr().out
    out = succeed(
        "analyze.benchmark",
        "--only",
        "data",
        "--size",
        8,
        "--steps",
        1,
        "--repeats",
        1,
        "--device",
        "cuda",
        "--out",
        tmp_path / "table.csv",
    )
    assert "cuda: none" in out and "GB" in pd.read_csv(tmp_path / "table.csv")
