"""The benchmark: what it counts by hand, and every row at a tiny size."""

import pandas as pd
import pytest
import torch
from torch import nn

from analyze import benchmark
from common.models import build_model
from tests.conftest import call, refused, succeed

TINY = ("--size", 8, "--steps", 1, "--repeats", 1)


def small(name, width, *rest):
    return build_model("resnet20", 0.25, *rest)


def test_arithmetic_by_hand():
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 2))
    first = 2 * 64 * 3 * 4 * 9  # images need no gradient: it goes backward once, not twice
    assert benchmark.flops(layer, 8) == 2 * first + 3 * 2 * 256 * 2


def test_a_row_by_hand():
    rates = iter([6.0, 2.0, 1.0, 1.0, 8.0, 2.0])  # ours and the baseline's in turn
    measure = ("name", lambda: next(rates), lambda: next(rates), 1e12)
    row = benchmark.compare(measure, 3, torch.device("meta"))
    values = {"ours /s": 6, "baseline /s": 2, "ratio": 3, "min": 1, "max": 4, "TFLOP/s": 6}
    assert row == {"measure": "name"} | values


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants the GPU hidden")
def test_every_row_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "build_model", small)
    parts = ("training", "parallel", "line", "matching", "weights")
    out = tmp_path / "table.csv"
    succeed("analyze.benchmark", "--only", *parts, *TINY, "--device", "cpu", "--out", out)
    table = pd.read_csv(out)
    assert table["measure"].nunique() == 9 and (table["ratio"] == table["min"]).all()
    assert table[["ours /s", "baseline /s"]].min().min() > 0
    refused(call("analyze.benchmark", "--only", "large", "--device", "cpu"), "--only large")
