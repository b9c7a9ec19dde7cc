"""Stages, analyses and benchmark give the same on a GPU, or an emulated one, as on a CPU."""

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
# On a real GPU, rounding may move a channel or an image: a few percent of these small runs.
TOLERANCE = 0.1 if REAL else 1e-3


@pytest.fixture(autouse=True)
def gpu():
    with pretend_gpu():
        yield


def masks_agree(path, *roots):
    """Whether two masks agree up to rounding; at these sparsities, half of unrelated ones agree."""
    left, right = (state(root / path)["mask"] for root in roots)
    agreeing = sum(int((left[name] == right[name]).sum()) for name in left)
    return agreeing >= (1 - TOLERANCE) * masking.numel(left)


def test_every_stage_gives_the_same_on_a_gpu_as_on_a_cpu(runs, tmp_path):
    for command in (stage1(tmp_path / "dense", "--seed 0 1"), *pipeline(tmp_path, 0, 1)):
        parallel = "--parallel 2" * ("align_mask" not in command[0])
        outcome = call(*command, parallel, "--device cuda")
        assert outcome.code == 0 and "slower" not in outcome.err, outcome.err

    for name in (
        "dense/seed1/epoch_0003.pt",
        "imp/seed0/sparse_0.70.pt",
        "sparse/permuted/seed0-seed1/s0.70_k001/final.pt",
    ):
        assert distance(*(weights(root / name) for root in (runs, tmp_path))) < 1e-3
        assert result((tmp_path / name).parent)["device"].startswith("cuda")
    # The tolerance can distinguish networks.
    assert distance(*(weights(runs / f"dense/seed{n}/epoch_0003.pt") for n in (0, 1))) > 0.1
    for folder in ("imp/seed0", "align/activation/seed0-seed1"):
        assert masks_agree(f"{folder}/mask_0.50.pt", runs, tmp_path)


@pytest.mark.parametrize("method", ["weight", "masked"])
def test_methods_without_images_on_a_gpu(ends, aligned, tmp_path, method):
    succeed(*stage3(*ends, tmp_path, "--method", method, "--device cuda"))
    assert masks_agree("mask_0.70.pt", aligned / method, tmp_path)


ANALYSES = {
    "interpolation": "--points 3 --images 100",
    "imp_barrier": "--points 3 --images 64",
    "landscape": "--grid 3 --images 100",
    "diversity": "",
}


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_on_a_gpu(runs, tmp_path, name):
    """On one pair and one IMP round; diversity needs two pairs."""
    ignore = shutil.ignore_patterns("round_0[2-5].pt", *["seed[23]*"] * (name != "diversity"))
    tables = []
    for device in ("cpu", "cuda"):
        root = tmp_path / device
        shutil.copytree(runs, root, ignore=ignore)
        succeed(f"analyze.{name}", root, ANALYSES[name], "--device", device)
        (path, *_) = sorted([*root.glob(f"{name}*.csv"), *root.glob(f"figures/{name}*.csv")])
        tables.append(pd.read_csv(path))
    pd.testing.assert_frame_equal(*tables, rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------- the benchmark


def test_every_benchmark_row_on_a_gpu(tmp_path, capfd):
    """With small networks and few images, without really compiling."""
    training_rate, compile_flags, out = benchmark.training_rate, [], tmp_path / "table.csv"

    def eager_rate(*arguments, compiled=False, **settings):
        compile_flags.append(compiled)
        return training_rate(*arguments, **settings)

    small = {"build_model": lambda *args: small_cnn(args[-1]), "training_rate": eager_rate}
    small |= {"COUNTS": [2, 3], "IMAGES": 64, "SIZE": 8, "STEPS": {"cuda": 1}}
    with mock.patch.multiple(benchmark, **small):
        text = succeed("analyze.benchmark --repeats 1 --device cuda --out", out)
    table = pd.read_csv(out)
    assert "cuda: " in text and len(table) == 3 * 4 + 2 + 2 + 3 and compile_flags.count(True) == 3
    assert table[["ours /s", "baseline /s", "ratio"]].min(axis=None) > 0
    assert "slower" not in capfd.readouterr().err
