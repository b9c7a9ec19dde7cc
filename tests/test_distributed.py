"""One network trained by several processes is the network that one process trains."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from common import checkpoint
from common.data import Streamed
from common.errors import UserError
from common.runtime import distributed, parallel
from tests.conftest import (
    ROOT,
    distance,
    refuse,
    result,
    save_pictures,
    small_resnet,
    stage1,
    stage2,
    stage3,
    stage4,
    succeed,
    weights,
)
from tests.test_data import resident

CPU = torch.device("cpu")


def split(monkeypatch, batches):
    """All that `batches` makes, and what each of two processes gets of it."""
    found = [list(batches())]
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "RANK", rank)
        found.append(list(batches()))
    monkeypatch.undo()
    return found


def test_every_process_has_its_part_of_every_batch(monkeypatch, tmp_path):
    save_pictures(tmp_path, train=6, val=3)
    for data in (resident(count=14, pad=1, flip=True), Streamed(tmp_path, CPU, 0)):
        parts = split(monkeypatch, partial(data.train_batches, 4, 0, 1))
        assert [len(part) for part in parts] == [3, 3, 3]
        for whole, *halves in zip(*parts):
            for values, *pair in zip(whole, *halves):  # images, then labels
                assert torch.equal(values, torch.cat(pair))
        parts = split(monkeypatch, partial(data.eval_batches, "test", 2))
        sums = [[float(image.sum()) for images, _ in part for image in images] for part in parts]
        assert sorted(sums[0]) == sorted(sums[1] + sums[2]) and all(sums)


def test_a_batch_without_equal_parts_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 3)
    assert distributed.local_slice(6) == slice(0, 2)
    with pytest.raises(UserError, match="--batch-size 4 .* 3 processes"):
        resident().steps(4)


def test_what_is_not_for_several_processes_is_refused(monkeypatch, ends, tmp_path):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    refuse(stage3(*ends, tmp_path / "x"), "torchrun")
    with pytest.raises(UserError, match="--parallel"):
        parallel.run_all({}, "2", 1, resident())
    with pytest.raises(UserError, match="BatchNorm"):
        distributed.data_parallel(small_resnet(), CPU)


def test_every_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda:1")
    assert distributed.local_device(CPU) == CPU
    with pytest.raises(UserError, match="without a number"):
        distributed.local_device(torch.device("cuda:1"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")  # also where there is a GPU for this one
    with pytest.raises(UserError, match="3 processes.* 2 GPUs"):
        distributed.local_device(torch.device("cuda"))


def test_the_first_process_tells_an_error_before_the_others(monkeypatch, tmp_path):
    naps = []
    monkeypatch.setattr(distributed.time, "sleep", naps.append)
    for wrong in (("--limit-train", 10**6), ("--epochs", 0)):
        for rank, expected in ((0, []), (1, [distributed.ERROR_DELAY])):
            monkeypatch.setattr(distributed, "RANK", rank)
            refuse(stage1(tmp_path, *wrong))
            assert naps == expected
        naps.clear()


def test_the_first_process_alone_writes_and_deletes(monkeypatch, tmp_path):
    path = tmp_path / "new/a.pt"
    with monkeypatch.context() as second:
        second.setattr(checkpoint, "is_writer", False)
        checkpoint.save({"a": 1}, path)
    assert not path.parent.exists()
    checkpoint.save({"a": 1}, path)
    monkeypatch.setattr(checkpoint, "is_writer", False)
    checkpoint.remove([path])
    assert checkpoint.load(path) == {"a": 1}


def torchrun(script, *arguments):
    """Run a script as two processes."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command = [sys.executable, *launch, script, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(ROOT)
    options = {"capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, cwd=ROOT, env=environment, **options)


SEVERAL = """
import json, sys
from common.runtime import distributed
from tests.conftest import start

distributed.shut_down = lambda: None  # not between the commands
for command in json.loads(sys.argv[1]):
    start(*command, torchrun=True)
"""


def test_two_processes_train_what_one_does(tmp_path):
    """All three stages that train, up to the order in which sums are taken; then an error."""
    one, two, file = tmp_path / "one", tmp_path / "two", tmp_path / "file"
    file.touch()
    dense, masks, cell = two / "dense/seed0", two / "imp", ("--sparsity", 0.3)

    def commands(root):
        lth = stage4("lth", dense, masks, root / "sparse", *cell, "--rewind", 1)
        return stage2(dense, root / "imp", *cell), lth

    (script, *more), again = (stage1(root / "dense", "--seed", 0, 1) for root in (two, one))
    done = torchrun(f"{script}.py", *more)
    assert done.returncode == 0, done.stderr
    printed = [done.stdout, succeed(*again)]
    assert [text.count("/3  lr") for text in printed] == [6, 6]  # a line an epoch
    (tmp_path / "several.py").write_text(SEVERAL)
    several = *commands(two), (script, *more), stage1(file / "dense")
    done = torchrun(tmp_path / "several.py", json.dumps(several, default=str))
    told = [line for line in done.stderr.splitlines() if ".py: error: " in line]
    assert done.returncode != 0 and len(told) == 1, done.stderr
    assert f"cannot write {file}" in told[0] and "gloo" not in done.stderr
    assert done.stdout.count("nothing to do") == 2
    for command in commands(one):
        succeed(*command)

    epochs = [f"dense/seed{seed}/epoch_000{epoch}.pt" for seed in (0, 1) for epoch in (0, 1, 3)]
    for name in (*epochs, "imp/sparse_0.30.pt", "sparse/s0.30_k001/final.pt"):
        assert distance(weights(one / name), weights(two / name)) < 1e-4
    assert distance(*(weights(two / f"dense/seed{n}/epoch_0003.pt") for n in (0, 1))) > 1e-2
    results = [result(root / "dense/seed0") for root in (one, two)]
    assert [result["processes"] for result in results] == [1, 2]
    for key in ("train_loss", "test_loss", "train_acc", "test_acc"):
        rounding = 0.2 if "acc" in key else 0
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-3, abs=rounding)
    names = [sorted(path.name for path in (root / "imp").iterdir()) for root in (one, two)]
    assert names[0] == names[1]
