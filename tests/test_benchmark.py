"""analyze.benchmark: a row by hand, and every row at a tiny size."""

import pandas as pd
import pytest
import torch

from analyze import benchmark
from common.models import build_model
from tests.conftest import refuse, succeed


def test_a_row_by_hand():
    rates = iter([6.0, 2.0, 1.0, 1.0, 8.0, 2.0])  # ours and the baseline's alternate
    row = benchmark.compare(("name", lambda: next(rates), lambda: next(rates)), 3)
    expected = {"measure": "name", "ours /s": 6, "baseline /s": 2, "ratio": 3, "min": 1, "max": 4}
    assert row == expected


def test_a_rate_is_that_of_the_second_epoch(monkeypatch):
    clock = [0.0]

    def fake_train(model, data, rates, *, at_epoch, **settings):
        for epoch, seconds in enumerate((100.0, 2.0), 1):
            clock[0] += seconds
            at_epoch(epoch)

    monkeypatch.setattr(benchmark, "train", fake_train)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(benchmark, "BATCH", 2)
    data = benchmark.random_images(5, 8, torch.device("cpu"))
    assert benchmark.training_rate([torch.nn.Flatten()], data) == 4 / 2.0


def test_widths_without_training_are_refused():
    refuse("analyze.benchmark --only line --widths 4".split(), "add it to --only")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_every_row_on_a_cpu(tmp_path, monkeypatch):
    def build_small_model(name, width, *arguments):
        return build_model(name, 0.25, *arguments)

    small = {"build_model": build_small_model, "IMAGES": 64, "SIZE": 8, "STEPS": {"cpu": 1}}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    out = tmp_path / "table.csv"
    text = succeed("analyze.benchmark --repeats 1 --device cpu --out", out)
    table = pd.read_csv(out)
    assert table["measure"].nunique() == 9 and (table["ratio"] == table["min"]).all()
    assert table[["ours /s", "baseline /s"]].min(axis=None) > 0
    assert all(name in text for name in table["measure"])
