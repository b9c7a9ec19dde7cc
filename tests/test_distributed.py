"""One network trained by several processes is the network that one process trains."""

import os
import subprocess
import sys

import pytest
import torch

from common import checkpoint, distributed, parallel
from common.data import Streamed
from common.errors import UserError
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="at most 2"):
        distributed.join(torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="leave cuda:1 out"):
        distributed.join(torch.device("cuda:1"))


def test_one_process_speaks_for_all(monkeypatch, tmp_path):
    wrong = "train_dense", *TINY, "--limit-train", 10**6, "--out", tmp_path
    assert call(*wrong).err.count("\n") == 1
    monkeypatch.setattr(distributed, "RANK", 1)
    assert call(*wrong) == (2, "", "")


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
    """What a script prints as two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{script}.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def close(one, other):
    """Whether two files hold the same weights, up to the order in which sums were taken."""
    a, b = (torch.cat([v.flatten() for v in checkpoint.load(path)["state_dict"].values()]) for path in (one, other))
    return float((a - b).norm() / a.norm()) < 1e-4


def test_two_processes_train_what_one_does(tmp_path):
    """All three stages that train, on networks without BatchNorm, whose statistics on CPUs are each process's own."""
    one, two = tmp_path / "one", tmp_path / "two"
    dense = *TINY, "--epochs", 3, "--save-epochs", 1, "--seed", 0, 1, "--out"
    printed = [succeed("train_dense", *dense, one / "dense"), torchrun("train_dense", *dense, two / "dense")]
    assert printed[0].count("\n") == printed[1].count("\n") == 6
    for seed in (0, 1):
        for epoch in (0, 1, 3):
            assert close(*(checkpoint.epoch_file(root / f"dense/seed{seed}", epoch) for root in (one, two)))
    assert not close(*(checkpoint.epoch_file(two / f"dense/seed{seed}", 3) for seed in (0, 1)))
    results = [checkpoint.load_json(root / "dense/seed0/result.json") for root in (one, two)]
    assert [result["processes"] for result in results] == [1, 2]
    for key in ("train_loss", "test_loss", "train_acc", "test_acc"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-3, abs=0.2 if "acc" in key else 0)
    assert torchrun("train_dense", *dense, two / "dense").count("nothing to do") == 2

    tiny = "--batch-size", 64, "--device", "cpu", "--precision", "fp32"
    imp = "--sparsity", 0.3, "--epochs", 1, *tiny, "--out"
    succeed("prune_imp", "--dense", two / "dense/seed0", *imp, one / "imp")
    torchrun("prune_imp", "--dense", two / "dense/seed0", *imp, two / "imp")
    assert close(*(root / "imp/sparse_0.30.pt" for root in (one, two)))
    left = sorted(path.name for path in (two / "imp").iterdir())
    assert left == ["arguments.json", "log.csv", "mask_0.30.pt", "result.json", "sparse_0.30.pt"]
    sparse = "--arm", "lth", "--weights", two / "dense/seed0", "--masks", two / "imp", "--sparsity", 0.3, "--rewind", 1, *tiny, "--out"  # fmt: skip
    succeed("train_sparse", *sparse, one / "sparse")
    torchrun("train_sparse", *sparse, two / "sparse")
    assert close(*(root / "sparse/s0.30_k001/final.pt" for root in (one, two)))
