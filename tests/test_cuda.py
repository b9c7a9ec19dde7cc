"""What only a GPU can show: a captured graph computes what single launches do, alone and beside
others.
"""

import subprocess
import sys

import pytest
import torch

from common import checkpoint, masking, training
from common.models import build_model
from common.runtime import graph, parallel
from common.runtime.graph import GraphedStep
from common.training import train
from tests.conftest import ROOT, TINY, distance
from tests.test_data import resident
from tests.test_training import SETTINGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RATES = [0.05, 0.02]


def data():
    return resident(count=64, pad=1, flip=True, mean=0.3, std=0.2, device="cuda")


def trained(folder, seed=0, **settings):
    torch.backends.cudnn.deterministic = True
    model = build_model("resnet20", 0.5, 2, (3, 8, 8), seed)
    mask = masking.dense_mask(model.state_dict(), masking.prunable(model))
    mask = masking.prune_by_magnitude(model.state_dict(), mask, masking.size(mask) // 5)
    settings = SETTINGS | {"batch_size": 16, "seed": seed, "progress": False} | settings
    rows = train(model, data(), RATES, folder=folder, mask=mask, **settings)
    checkpoint.save(training.cpu_state(model), folder / "end.pt")
    return rows


def apart(one, other):
    """How far the networks of two folders are apart."""
    return distance(*(checkpoint.load(folder / "end.pt") for folder in (one, other)))


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 3e-2)])
def test_a_graph_computes_what_single_launches_do(
    tmp_path, monkeypatch, capfd, precision, tolerance
):
    rows = trained(tmp_path / "graph", precision=precision)
    assert "slower" not in capfd.readouterr().err
    monkeypatch.setattr(GraphedStep, "_capture", lambda step: step._step)
    plain = trained(tmp_path / "plain", precision=precision)
    assert apart(tmp_path / "plain", tmp_path / "graph") < tolerance
    assert rows[-1]["train_loss"] == pytest.approx(plain[-1]["train_loss"], rel=10 * tolerance)
    trained(tmp_path / "other", seed=1, precision=precision)
    assert (
        apart(tmp_path / "plain", tmp_path / "other") > 2 * tolerance
    )  # what the tolerance can tell apart


def test_the_host_never_waits_within_an_epoch():
    total, images = torch.zeros((), device="cuda"), data()

    def work(x, y):
        total.add_(x.sum() + y.sum())

    step = GraphedStep(work, images, 8)
    with graph.side_stream(images.device):
        for call, _ in enumerate(step.start(0, 0)):
            if call == graph.EAGER_STEPS + 1:
                assert isinstance(step.replay.__self__, torch.cuda.CUDAGraph)
                torch.cuda.set_sync_debug_mode("error")
            step()
        torch.cuda.set_sync_debug_mode("default")
    expected = sum(float(x.sum() + y.sum()) for x, y in images.train_batches(8, 0, 0))
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_networks_side_by_side_are_those_of_the_run_alone(tmp_path):
    """More runs than CUDA has streams to hand out."""
    for seed in range(8):
        trained(tmp_path / f"alone{seed}", seed=seed)
    runs = {f"run{n}": (lambda n=n: trained(tmp_path / f"run{n}", seed=n % 8)) for n in range(48)}
    parallel.side_by_side(runs, 8, torch.device("cuda"))
    for n in range(48):
        assert apart(tmp_path / f"alone{n % 8}", tmp_path / f"run{n}") < 1e-4
    assert apart(tmp_path / "alone0", tmp_path / "alone1") > 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_does(tmp_path):
    """A network with BatchNorm, whose statistics are taken over both."""
    dense = [
        *TINY,
        "--model",
        "resnet20",
        "--width",
        "0.5",
        "--device",
        "cuda",
        "--epochs",
        "2",
        "--save-epochs",
        "0",
    ]
    for name, count in (("one", 1), ("two", 2)):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(count),
        ]
        subprocess.run(
            [*launch, "train_dense.py", *dense, "--out", str(tmp_path / name)], cwd=ROOT, check=True
        )
    one, two = (
        checkpoint.load_dense(tmp_path / name / "seed0")["state_dict"] for name in ("one", "two")
    )
    assert distance(one, two) < 1e-3


def test_a_set_of_few_batches_is_captured_in_a_later_epoch(tmp_path):
    assert data().steps(48) < graph.EAGER_STEPS
    assert len(trained(tmp_path, batch_size=48)) == len(RATES)


def test_a_step_that_asks_the_device_for_a_value_is_launched_one_by_one(capfd):
    """The last one here: torch 2.11 and 2.12 give no memory back after a capture that failed."""
    total, images = torch.zeros((), device="cuda"), data()
    step = GraphedStep(lambda x, y: total.add_(float(x.sum())), images, 8)
    with graph.side_stream(images.device):
        for _ in step.start(0, 0):
            step()
    assert "slower" in capfd.readouterr().err
    batches = images.train_batches(8, 0, 0)
    assert float(total) == pytest.approx(sum(float(x.sum()) for x, _ in batches), rel=1e-4)
