"""One network trained by several processes is the network that one process trains."""

import os
import subprocess
import sys

import pytest
import torch

from common import checkpoint, distributed, parallel
from common.data import Streamed
from common.errors import UserError
from common.models import build_model
from tests.conftest import ROOT, TINY, call, succeed
from tests.test_data import pictures, resident  # noqa: F401


def shares(monkeypatch, batches, processes=2):
    """What each process gets of the batches that `batches` makes."""
    found = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "PROCESSES", processes)
        monkeypatch.setattr(distributed, "RANK", rank)
        found.append(list(batches()))
    monkeypatch.undo()
    return found


def test_every_process_has_its_part_of_every_batch(monkeypatch, pictures):  # noqa: F811
    for data in (resident(count=14, pad=1, flip=True), Streamed(pictures, torch.device("cpu"), 0)):
        whole = list(data.train_batches(4, 0, 1))
        first, second = shares(monkeypatch, lambda data=data: data.train_batches(4, 0, 1))
        assert len(whole) == len(first) == len(second) == 3
        for (images, labels), (x, y), (u, v) in zip(whole, first, second):
            assert torch.equal(images, torch.cat([x, u])) and torch.equal(labels, torch.cat([y, v]))
        tests = [
            list(data.eval_batches("test", 2)),
            *shares(monkeypatch, lambda data=data: data.eval_batches("test", 2)),
        ]
        seen, one, other = (sorted(float(x.sum()) for batch, _ in batches for x in batch) for batches in tests)
        assert sorted(one + other) == seen and one and other


def test_a_batch_without_equal_parts_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "PROCESSES", 3)
    assert distributed.share(6) == slice(0, 2)
    with pytest.raises(UserError, match="--batch-size 4 .* 3 processes"):
        resident().steps(4)


def test_what_is_not_for_several_processes_is_refused(monkeypatch, runs, tmp_path):
    monkeypatch.setattr(distributed, "PROCESSES", 2)
    seeds = "--source", runs / "dense/seed0", "--target", runs / "dense/seed1", "--masks", runs / "imp/seed0"
    done = call("align_mask", *seeds, "--device", "cpu", "--out", tmp_path / "x")
    assert done.code == 2 and done.err.count("\n") == 1 and "torchrun" in done.err
    with pytest.raises(UserError, match="--parallel"):
        parallel.run_all({}, "2", 1, resident())
    with pytest.raises(UserError, match="BatchNorm"):
        distributed.spread(build_model("resnet20", 0.25), torch.device("cpu"))


def test_every_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "PROCESSES", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.own(torch.device("cuda")) == torch.device("cuda:1")
    assert distributed.own(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(UserError, match="without a number"):
        distributed.own(torch.device("cuda:1"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")  # also where there is a GPU for this one
    with pytest.raises(UserError, match="3 processes.* 2 GPUs"):
        distributed.own(torch.device("cuda"))


def test_the_first_process_tells_an_error_before_the_others(monkeypatch, tmp_path):
    naps = []
    monkeypatch.setattr(distributed.time, "sleep", naps.append)
    for wrong in (("--limit-train", 10**6, "--out", tmp_path), ("--epochs", 0, "--out", tmp_path)):
        assert call("train_dense", *TINY, *wrong).err.count("\n") == 1 and not naps
        with monkeypatch.context() as other:
            other.setattr(distributed, "RANK", 1)
            assert call("train_dense", *TINY, *wrong).err.count("\n") == 1
        assert naps.pop() == distributed.PATIENCE


def test_the_first_process_alone_writes_and_deletes(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "RANK", 1)
    checkpoint.save({"a": 1}, tmp_path / "new/a.pt")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    checkpoint.save({"a": 1}, tmp_path / "new/a.pt")
    monkeypatch.setattr(distributed, "RANK", 1)
    checkpoint.remove([tmp_path / "new/a.pt"])
    assert checkpoint.load(tmp_path / "new/a.pt") == {"a": 1}


def torchrun(script, *arguments):
    """Run a script as two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launch, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def spread(script, *arguments):
    """What a script prints as two processes."""
    done = torchrun(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def close(one, other):
    """Whether two files hold the same weights, up to the order in which sums were taken."""
    a, b = (torch.cat([v.flatten() for v in checkpoint.load(path)["state_dict"].values()]) for path in (one, other))
    return float((a - b).norm() / a.norm()) < 1e-4


def test_two_processes_train_what_one_does(tmp_path):
    """All three stages that train."""
    one, two = tmp_path / "one", tmp_path / "two"
    dense = *TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, 1, "--out"
    printed = [succeed("train_dense", *dense, one / "dense"), spread("train_dense", *dense, two / "dense")]
    assert printed[0].count("\n") == printed[1].count("\n") == 6
    for seed in (0, 1):
        for epoch in (0, 1, 3):
            assert close(*(checkpoint.epoch_file(root / f"dense/seed{seed}", epoch) for root in (one, two)))
    assert not close(*(checkpoint.epoch_file(two / f"dense/seed{seed}", 3) for seed in (0, 1)))
    results = [checkpoint.load_json(root / "dense/seed0/result.json") for root in (one, two)]
    assert [result["processes"] for result in results] == [1, 2]
    for key in ("train_loss", "test_loss", "train_acc", "test_acc"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-3, abs=0.2 if "acc" in key else 0)
    assert spread("train_dense", *dense, two / "dense").count("nothing to do") == 2

    tiny = "--batch-size", 64, "--device", "cpu", "--precision", "fp32"
    imp = "--sparsity", 0.3, "--epochs", 1, *tiny, "--out"
    succeed("prune_imp", "--dense", two / "dense/seed0", *imp, one / "imp")
    spread("prune_imp", "--dense", two / "dense/seed0", *imp, two / "imp")
    assert close(*(root / "imp/sparse_0.30.pt" for root in (one, two)))
    left = sorted(path.name for path in (two / "imp").iterdir())
    assert left == ["arguments.json", "log.csv", "mask_0.30.pt", "result.json", "sparse_0.30.pt"]
    sparse = "--arm", "lth", "--weights", two / "dense/seed0", "--masks", two / "imp", "--sparsity", 0.3, "--rewind", 1, *tiny, "--out"  # fmt: skip
    succeed("train_sparse", *sparse, one / "sparse")
    spread("train_sparse", *sparse, two / "sparse")
    assert close(*(root / "sparse/s0.30_k001/final.pt" for root in (one, two)))


def test_an_error_of_several_processes_is_told_once(tmp_path):
    (tmp_path / "file").touch()
    for more, words in (
        (("--out", tmp_path, "--limit-train", 10**6), "--limit-train 1000000 is more"),  # of all processes
        (("--out", tmp_path / "file/dense"), f"cannot write {tmp_path}"),  # of the first
    ):
        done = torchrun("train_dense", *TINY, "--epochs", 1, *more)
        told = [line for line in done.stderr.splitlines() if line.startswith("train_dense.py: error: ")]
        assert done.returncode != 0 and len(told) == 1 and words in told[0], done.stderr
        assert "gloo" not in done.stderr and list(tmp_path.iterdir()) == [tmp_path / "file"]
