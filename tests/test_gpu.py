"""Stages, analyses and benchmark on a GPU, a pretended one where there is none: the same results as on a CPU."""

import contextlib
import itertools
import shutil
import threading
import time

import pandas as pd
import pytest
import torch

from analyze import benchmark, hours, rates
from common import checkpoint, masking
from common.models import build_model
from tests.conftest import TINY, call, distance, succeed
from tests.pretend_gpu import pretend_gpu

REAL = torch.cuda.is_available()
TOLERANCE = 0.1 if REAL else 1e-3  # a channel or an image that rounding turns is a few percent of these small runs


@pytest.fixture(autouse=True)
def gpu():
    with contextlib.nullcontext() if REAL else pretend_gpu():
        yield


def alike(one, other):
    """Whether two masks agree in all but what rounding decides; of two unlike ones at these sparsities half agree."""
    return sum(int((one[name] == other[name]).sum()) for name in one) >= (1 - TOLERANCE) * masking.size(one)


def test_every_stage_on_a_gpu_does_what_it_does_on_a_cpu(runs, tmp_path):
    dense = [tmp_path / f"dense/seed{seed}" for seed in (0, 1)]
    imp, aligned, sparse = (tmp_path / name for name in ("imp/seed0", "align/activation/seed0-seed1", "sparse/permuted/seed0-seed1"))  # fmt: skip
    ends, tiny = ("--source", dense[0], "--target", dense[1]), ("--batch-size", 64, "--precision", "fp32")
    grid = ("--sparsity", 0.5, 0.7, "--rewind", 0, 1, "--parallel", "auto", *tiny)
    epochs = ("--epochs", 3, "--save-epochs", 1, "--seed", 0, 1, "--parallel", 2)
    succeed("train_dense", *TINY[:-1], "cuda", *epochs, "--out", tmp_path / "dense")
    succeed("prune_imp", "--dense", dense[0], "--sparsity", 0.5, 0.7, "--epochs", 1, *tiny, "--out", imp)
    succeed("align_mask", *ends, "--masks", imp, "--out", aligned)  # on the GPU, because it is there
    last = call("train_sparse", "--arm", "permuted", "--weights", dense[1], "--masks", aligned, "--out", sparse, *grid)  # fmt: skip
    assert last.code == 0 and "one by one" not in last.err, last.err
    for path in (dense[1] / "epoch_0003.pt", imp / "sparse_0.70.pt", sparse / "s0.70_k001/final.pt"):
        mine, theirs = (checkpoint.load(root / path.relative_to(tmp_path))["state_dict"] for root in (tmp_path, runs))
        assert distance(theirs, mine) < 1e-3
        assert checkpoint.load_json(path.with_name("result.json"))["device"].startswith("cuda")
    one, other = (checkpoint.load(folder / "epoch_0003.pt")["state_dict"] for folder in dense)
    assert distance(one, other) > 0.1  # what the tolerance can tell apart
    for path in (imp / "mask_0.50.pt", aligned / "mask_0.50.pt"):
        assert alike(*(checkpoint.load(root / path.relative_to(tmp_path))["mask"] for root in (tmp_path, runs)))


@pytest.mark.parametrize("method", ["weight", "masked"])
def test_methods_without_images_on_a_gpu(runs, tmp_path, method):
    ends = ("--source", runs / "dense/seed0", "--target", runs / "dense/seed1", "--masks", runs / "imp/seed0")
    for device in ("cpu", "cuda"):
        succeed("align_mask", *ends, "--method", method, "--device", device, "--out", tmp_path / device)
    assert alike(*(checkpoint.load(tmp_path / device / "mask_0.70.pt")["mask"] for device in ("cpu", "cuda")))


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
        succeed(f"analyze.{name}", root, *flags, "--device", device)
        (path, *_) = sorted([*root.glob(f"{name}*.csv"), *root.glob(f"figures/{name}*.csv")])
        tables.append(pd.read_csv(path))
    pd.testing.assert_frame_equal(*tables, rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------- the benchmark


def small(name, width, *rest):
    return build_model("mlp", 1 / 32, *rest) if name == "mlp" else build_model("resnet20", 0.25, *rest)


def test_networks_side_by_side_are_measured_while_all_of_them_train(monkeypatch):
    """One that is set up early waits for the others, or it would be measured with the device to itself."""
    numbers, training_now, most, lock = itertools.count(), [], [], threading.Lock()

    def pretend_to_train(model, data, rates, *, at_epoch, folder, **settings):
        with lock:
            number = next(numbers)
        time.sleep(0.1 * number)
        at_epoch(1)
        with lock:
            training_now.append(number)
            most.append(len(training_now))
        time.sleep(0.05)
        with lock:
            training_now.remove(number)
        at_epoch(2)
        return [{"seconds": 0.0}, {"seconds": 0.05}]

    monkeypatch.setattr(rates, "train", pretend_to_train)
    data = rates.random_images(4, 8, torch.device("cuda"))
    rate = rates.training_rate([rates.network("mlp", 1 / 32, 8)] * 3, data, batch=2, parallel="3")
    assert max(most) == 3 and 0 < rate < 3 * 4 / 0.05


def test_a_rate_is_of_the_second_epoch_without_its_files(monkeypatch):
    def pretend_to_train(model, data, rates, *, at_epoch, **settings):
        at_epoch(1)
        at_epoch(2)
        return [{"seconds": 100.0}, {"seconds": 2.0}]

    monkeypatch.setattr(rates, "train", pretend_to_train)
    data, model = rates.random_images(5, 8, torch.device("cuda")), rates.network("mlp", 1 / 32, 8)
    for models in (1, 3):  # one after the other
        assert rates.training_rate([model] * models, data, batch=2) == pytest.approx(4 / 2.0)
    assert rates.training_rate([model] * 3, data, batch=2, parallel="3") == pytest.approx(3 * 4 / 2.0, rel=0.2)


def test_large_networks_and_hours_on_a_gpu(monkeypatch):
    def eager(*arguments, compiled=False, **settings):
        asked.append(compiled)
        return rates.training_rate(*arguments, **settings)

    asked, device = [], torch.device("cuda")
    monkeypatch.setattr(rates, "build_model", small)
    monkeypatch.setattr(benchmark, "training_rate", eager)
    monkeypatch.setattr(benchmark, "random_images", lambda count, size, device: rates.random_images(256, 8, device))
    assert [row["ratio"] > 0 for row in benchmark.large_rows(1, device)] == [True] * 4 and asked == [False, True] * 4
    (row,) = hours.hours(("quick",), 1, device).to_dict("records")
    assert row["hours"] == pytest.approx(row["epochs"] * 10_000 / row["images/s"] / 3600, rel=0.02)


def test_the_benchmark_on_a_gpu(monkeypatch, tmp_path, capfd):
    device = torch.device("cuda")
    monkeypatch.setattr(rates, "build_model", small)
    rows = [
        *benchmark.training_rows(1, 8, 1, 1, device),
        *benchmark.parallel_rows([2], 8, 1, 1, device),
        benchmark.stacked_row(2, 8, 1, 1, device),
        benchmark.line_row(8, 64, 1, device),
        benchmark.matching_row("mlp", 8, 64, 32, 1, device),
        benchmark.weight_matching_row(1, 1, device),
    ]
    assert len(rows) == 3 + 3 + 4 and all(row["ours"] > 0 and row["other"] > 0 for row in rows)
    assert "one by one" not in capfd.readouterr().err
    tiny = ("--size", 8, "--steps", 1, "--repeats", 1, "--device", "cuda", "--out", tmp_path / "table.csv")
    out = succeed("analyze.benchmark", "--only", "data", *tiny)
    assert "cuda: " in out and "GB" in pd.read_csv(tmp_path / "table.csv")
