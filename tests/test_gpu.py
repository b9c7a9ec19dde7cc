"""Stages, analyses and benchmark on a GPU, or a pretended one: the same results as on a CPU."""

import shutil
from unittest import mock

import pandas as pd
import pytest
import torch

from analyze import benchmark
from common import masking
from tests.conftest import (
    call,
    distance,
    pipeline,
    result,
    small_cnn,
    stage1,
    stage3,
    state,
    succeed,
    weights,
)
from tests.pretend_gpu import pretend_gpu

REAL = torch.cuda.is_available()
# A channel or an image that rounding turns is a few percent of these small runs.
TOLERANCE = 0.1 if REAL else 1e-3


@pytest.fixture(autouse=True)
def gpu():
    with pretend_gpu():
        yield


def alike(path, *roots):
    """Whether two masks agree but for rounding; of unlike ones at these sparsities half agree."""
    one, other = (state(root / path)["mask"] for root in roots)
    same = sum(int((one[name] == other[name]).sum()) for name in one)
    return same >= (1 - TOLERANCE) * masking.numel(one)


def test_every_stage_on_a_gpu_does_what_it_does_on_a_cpu(runs, tmp_path):
    for command in (stage1(tmp_path / "dense", "--seed 0 1"), *pipeline(tmp_path, 0, 1)):
        beside = "--parallel 2" * ("align_mask" not in command[0])
        outcome = call(*command, beside, "--device cuda")
        assert outcome.code == 0 and "slower" not in outcome.err, outcome.err

    for name in (
        "dense/seed1/epoch_0003.pt",
        "imp/seed0/sparse_0.70.pt",
        "sparse/permuted/seed0-seed1/s0.70_k001/final.pt",
    ):
        assert distance(*(weights(root / name) for root in (runs, tmp_path))) < 1e-3
        assert result((tmp_path / name).parent)["device"].startswith("cuda")
    # What the tolerance can tell apart.
    assert distance(*(weights(runs / f"dense/seed{n}/epoch_0003.pt") for n in (0, 1))) > 0.1
    for folder in ("imp/seed0", "align/activation/seed0-seed1"):
        assert alike(f"{folder}/mask_0.50.pt", runs, tmp_path)


@pytest.mark.parametrize("method", ["weight", "masked"])
def test_methods_without_images_on_a_gpu(ends, aligned, tmp_path, method):
    succeed(*stage3(*ends, tmp_path, "--method", method, "--device cuda"))
    assert alike("mask_0.70.pt", aligned / method, tmp_path)


ANALYSES = {
    "interpolation": "--points 3 --images 100",
    "imp_barrier": "--points 3 --images 64",
    "landscape": "--grid 3 --images 100",
    "diversity": "",
}


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_on_a_gpu(runs, tmp_path, name):
    """Of one pair, and one of its rounds; of two pairs where one is none."""
    few = shutil.ignore_patterns("round_0[2-5].pt", *["seed[23]*"] * (name != "diversity"))
    tables = []
    for device in ("cpu", "cuda"):
        root = tmp_path / device
        shutil.copytree(runs, root, ignore=few)
        succeed(f"analyze.{name}", root, ANALYSES[name], "--device", device)
        (path, *_) = sorted([*root.glob(f"{name}*.csv"), *root.glob(f"figures/{name}*.csv")])
        tables.append(pd.read_csv(path))
    pd.testing.assert_frame_equal(*tables, rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------- the benchmark


def test_every_row_on_a_gpu(tmp_path, capfd):
    """Of small networks on few images, --compile only asked for."""
    training_rate, asked, out = benchmark.training_rate, [], tmp_path / "table.csv"

    def eager(*arguments, compiled=False, **settings):
        asked.append(compiled)
        return training_rate(*arguments, **settings)

    small = {"build_model": lambda *about: small_cnn(about[-1]), "training_rate": eager}
    small |= {"COUNTS": [2, 3], "IMAGES": 64, "SIZE": 8, "STEPS": {"cuda": 1}}
    with mock.patch.multiple(benchmark, **small):
        text = succeed("analyze.benchmark --repeats 1 --device cuda --out", out)
    table = pd.read_csv(out)
    assert "cuda: " in text and len(table) == 3 * 4 + 2 + 2 + 3 and asked.count(True) == 3
    assert table[["ours /s", "baseline /s", "ratio"]].min(axis=None) > 0
    assert "slower" not in capfd.readouterr().err
