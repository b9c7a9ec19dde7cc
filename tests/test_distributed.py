"""Data-parallel training by several ranks gives the same network as a single process."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

import train_dense
from common import checkpoint
from common.data import Streamed
from common.errors import UserError
from common.runtime import distributed, parallel
from common.runtime.resume import Resume
from tests.conftest import (
    ROOT,
    distance,
    imagenet1,
    refuse,
    result,
    same_files,
    save_images,
    stage1,
    stage2,
    stage3,
    stage4,
    state,
    succeed,
    weights,
    words,
)
from tests.test_data import resident

CPU = torch.device("cpu")
SMALL = "--model mlp --width 0.015625"  # on ImageNet


def on_each_rank(monkeypatch, world_size, function):
    """What `function` returns on each rank, as lists."""
    results = []
    for rank in range(world_size):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "WORLD_SIZE", world_size)
            patch.setattr(distributed, "RANK", rank)
            results.append(list(function()))
    return results


def test_evaluation_sees_every_image_once(monkeypatch, tmp_path):
    """Also with a short last batch, and when the batches are not divisible among the ranks."""
    save_images(tmp_path, train=6, val=1)
    for data, count in ((resident(count=14, pad=1), 14), (Streamed(tmp_path, CPU, 0), 12)):
        ranks = on_each_rank(monkeypatch, 3, partial(data.eval_batches, "train", 4))
        batches = [images for rank in ranks for images, _ in rank]
        assert max(map(len, batches)) <= 4
        images = torch.cat(batches)
        assert len(images) == len(images.unique(dim=0)) == count


def test_torchrun_is_refused_where_it_is_not_supported(monkeypatch, ends, tmp_path):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 3)
    refuse(stage3(*ends, tmp_path / "x"), "torchrun")
    with pytest.raises(UserError, match="--parallel"):
        parallel.run_all({}, "2", 1, resident())
    with pytest.raises(UserError, match="--batch-size 4 .* 3 processes"):
        resident().steps(4)


def test_a_signal_to_any_rank_stops_all(monkeypatch):
    model = torch.nn.Linear(1, 1)
    run = Resume(None, "test", "fp32", model, torch.optim.SGD(model.parameters(), 0.1), None, 10)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_gather", lambda *_: torch.tensor([[0.0, 0], [0, 1]]))
    with pytest.raises(KeyboardInterrupt):
        run.save_or_stop(3)


def test_a_run_resumes_with_another_world_size(monkeypatch, tmp_path):
    """Two ranks share the running sums of three."""
    model, sums = torch.nn.Linear(1, 1), torch.tensor([[1.0], [2], [4]])
    settings = tmp_path, "test", "fp32", model, torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(distributed, "all_gather", lambda *_: sums)
    Resume(*settings, torch.zeros(1), minutes=0).save_or_stop(step=3)

    def resumed_sums():
        sums = torch.zeros(1)
        assert Resume(*settings, sums, minutes=0).step == 3
        return sums.tolist()

    assert on_each_rank(monkeypatch, 2, resumed_sums) == [[5], [2]]


def test_every_rank_has_its_own_gpu(monkeypatch):
    gpu, environment = torch.device("cuda"), {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "environ", environment)
    assert distributed.local_device(gpu) == torch.device("cuda:1")
    assert distributed.local_device(CPU) == CPU
    with pytest.raises(UserError, match="without a number"):
        distributed.local_device(torch.device("cuda:1"))
    environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}  # refused on every rank
    with pytest.raises(UserError, match="3 processes.* 2 GPUs"):
        distributed.local_device(gpu)


def test_rank_zero_prints_an_error_before_the_others(monkeypatch, tmp_path):
    delays = []
    monkeypatch.setattr(distributed.time, "sleep", delays.append)
    for flags in ("--limit-train 1000000", "--epochs 0"):
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "RANK", rank)
            refuse(stage1(tmp_path, flags))
    assert delays == [distributed.ERROR_DELAY] * 2


def test_a_rank_whose_peer_failed_refers_to_its_message(monkeypatch, tmp_path):
    """For example, only the peer has read a corrupt image, and has named it."""
    lost_connection = RuntimeError(
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:7"
    )
    monkeypatch.setattr(train_dense, "main", mock.Mock(side_effect=lost_connection))
    refuse(stage1(tmp_path), "another process of this run ended")


def test_only_rank_zero_writes_and_deletes(monkeypatch, tmp_path):
    old = tmp_path / "old.pt"
    old.touch()
    monkeypatch.setattr(checkpoint, "RANK", 1)
    checkpoint.save({}, tmp_path / "folder/new.pt")
    checkpoint.remove([old])
    assert list(tmp_path.iterdir()) == [old]


RUN_COMMANDS = """
import json, os, runpy, signal, sys
from common.runtime import distributed
from tests.conftest import ending_at

distributed.shut_down = lambda: None  # keep the process group for the next command
with ending_at(1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
    for script, *arguments in json.loads(sys.argv[1]):
        sys.argv = [script, *arguments]
        runpy.run_path(f"{script}.py", run_name="__main__")
"""


def torchrun(root, launches, *commands):
    """Start a torchrun for the flags of each of `launches`, which run the commands in sequence.

    A run that saves its state two steps into its second epoch gets SIGTERM there. Returns the exit
    codes, and all of stdout and of stderr.
    """
    (root / "run_commands.py").write_text(RUN_COMMANDS)
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "env": os.environ | environment, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    script = root / "run_commands.py", json.dumps([words(*command) for command in commands])
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    processes = [
        subprocess.Popen([*launcher, *launch.split(), *script], **options) for launch in launches
    ]
    outs, errs = zip(*[process.communicate(timeout=600) for process in processes])
    return [process.returncode for process in processes], "".join(outs), "".join(errs)


def commands(root, images):
    """All stages that train; a network with BatchNorm; ImageNet streamed."""
    dense, masks = root / "dense/seed0", root / "imp"
    with_batchnorm = "--model resnet20 --width 0.25 --epochs 1 --lr 0.02"
    lth = stage4("lth", dense, masks, root / "sparse", "--sparsity 0.3 --rewind 1")
    return (
        stage1(root / "dense", "--seed 0 1"),
        stage2(dense, masks, "--sparsity 0.3"),
        lth,
        stage1(root / "batchnorm", with_batchnorm),
        imagenet1(images, root / "streamed", SMALL),
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Files written by two ranks: on two emulated nodes with a torchrun each, then on one node.

    The first torchruns get SIGTERM within an epoch; the second resumes that run, and ends with an
    error.
    """
    root, file = tmp_path_factory.mktemp("two_ranks"), "file"
    save_images(root / "data", train=9, val=7)
    (root / file).touch()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        rendezvous = f"--rdzv-backend c10d --rdzv-endpoint localhost:{free.getsockname()[1]}"
    two_nodes = [f"--nnodes 2 --nproc-per-node 1 {rendezvous}"] * 2
    one_node = ["--standalone --nproc-per-node 2"]
    dense, *others = commands(root, root)
    interrupted = imagenet1(root, root / "interrupted", SMALL)
    first_run = (*interrupted, "--checkpoint-minutes 0")
    codes, out, err = torchrun(root, two_nodes, dense, *others, first_run)
    assert 0 not in codes and err.count("stopped; run the same command again") == 2, err
    assert len(re.findall(r"mlpx0.03125 seed \d  epoch", out)) == 6  # one line per epoch
    assert state(root / "interrupted/seed0/resume.pt")["step"] == 3
    failing = stage1(root / file / "dense")
    (code,), out, err = torchrun(root, one_node, interrupted, dense, failing)
    errors = [line for line in err.splitlines() if "error: " in line and "torch" not in line]
    assert code != 0 and len(errors) == 1 and "gloo" not in err, err
    assert f"cannot write {root / file}" in errors[0]
    assert out.count("nothing to do") == 2 and "resumes after epoch 1 and 3 steps" in out
    return root


def test_two_ranks_train_the_same_networks_as_one_process(two_ranks, tmp_path):
    """Up to the order of summation; BatchNorm uses the global batch."""
    for command in commands(tmp_path, two_ranks):
        succeed(*command)
    paths = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.pt")}
    assert paths
    for path in paths - {Path("imp/mask_0.30.pt")}:
        assert distance(weights(tmp_path / path), weights(two_ranks / path)) < 1e-4, path
    assert distance(*(weights(two_ranks / f"dense/seed{n}/epoch_0003.pt") for n in (0, 1))) > 1e-2
    results = [result(folder / "streamed/seed0") for folder in (tmp_path, two_ranks)]
    assert [result["processes"] for result in results] == [1, 2]
    for key in ("train_loss", "test_loss", "train_acc", "test_acc", "test_top5"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-3), key


def test_two_ranks_interrupted_within_an_epoch_resume_there(two_ranks):
    same_files(two_ranks / "interrupted", two_ranks / "streamed")
