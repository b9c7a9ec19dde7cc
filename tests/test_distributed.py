"""One network trained by several processes is the network that one process trains."""

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
    save_pictures,
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
SMALL = "--model mlp --width 0.015625"  # of ImageNet


def parts(monkeypatch, count, batches):
    """What `batches` makes in each of so many processes."""
    found = []
    for rank in range(count):
        with monkeypatch.context() as patched:
            patched.setattr(distributed, "WORLD_SIZE", count)
            patched.setattr(distributed, "RANK", rank)
            found.append(list(batches()))
    return found


def test_evaluation_sees_every_image_once(monkeypatch, tmp_path):
    """Those of the last, short batch too, however many processes share them."""
    save_pictures(tmp_path, train=6, val=1)
    for data, count in ((resident(count=14, pad=1), 14), (Streamed(tmp_path, CPU, 0), 12)):
        some = parts(monkeypatch, 3, partial(data.eval_batches, "train", 4))
        batches = [batch for part in some for batch, _ in part]
        assert max(map(len, batches)) <= 4
        seen = torch.cat(batches)
        assert len(seen) == len(seen.unique(dim=0)) == count


def test_what_is_not_for_several_processes_is_refused(monkeypatch, ends, tmp_path):
    monkeypatch.setattr(distributed, "WORLD_SIZE", 3)
    refuse(stage3(*ends, tmp_path / "x"), "torchrun")
    with pytest.raises(UserError, match="--parallel"):
        parallel.run_all({}, "2", 1, resident())
    with pytest.raises(UserError, match="--batch-size 4 .* 3 processes"):
        resident().steps(4)


def test_a_signal_to_any_process_stops_all(monkeypatch):
    model = torch.nn.Linear(1, 1)
    run = Resume(None, "test", "fp32", model, torch.optim.SGD(model.parameters(), 0.1), None, 10)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_gather", lambda *_: torch.tensor([[0.0, 0], [0, 1]]))
    with pytest.raises(KeyboardInterrupt):
        run.save_or_stop(3)


def test_a_run_goes_on_with_another_number_of_processes(monkeypatch, tmp_path):
    """What three had summed up within an epoch is shared by two."""
    model, sums = torch.nn.Linear(1, 1), torch.tensor([[1.0], [2], [4]])
    settings = tmp_path, "test", "fp32", model, torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(distributed, "all_gather", lambda *_: sums)
    Resume(*settings, torch.zeros(1), minutes=0).save_or_stop(step=3)

    def goes_on():
        mine = torch.zeros(1)
        assert Resume(*settings, mine, minutes=0).step == 3
        return mine.tolist()

    assert parts(monkeypatch, 2, goes_on) == [[5], [2]]


def test_every_process_has_its_own_gpu(monkeypatch):
    gpu, here = torch.device("cuda"), {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "environ", here)
    assert distributed.local_device(gpu) == torch.device("cuda:1")
    assert distributed.local_device(CPU) == CPU
    with pytest.raises(UserError, match="without a number"):
        distributed.local_device(torch.device("cuda:1"))
    here |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}  # also where there is a GPU for this one
    with pytest.raises(UserError, match="3 processes.* 2 GPUs"):
        distributed.local_device(gpu)


def test_the_first_process_tells_an_error_before_the_others(monkeypatch, tmp_path):
    naps = []
    monkeypatch.setattr(distributed.time, "sleep", naps.append)
    for wrong in ("--limit-train 1000000", "--epochs 0"):
        for rank in (0, 1):
            monkeypatch.setattr(distributed, "RANK", rank)
            refuse(stage1(tmp_path, wrong))
    assert naps == [distributed.ERROR_DELAY] * 2


def test_a_process_whose_peer_ended_says_no_more(monkeypatch, tmp_path):
    """As where the peer alone read a broken picture, and told its name."""
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:7")
    monkeypatch.setattr(train_dense, "main", mock.Mock(side_effect=gone))
    refuse(stage1(tmp_path), "another process of this run ended")


def test_the_first_process_alone_writes_and_deletes(monkeypatch, tmp_path):
    old = tmp_path / "old.pt"
    old.touch()
    monkeypatch.setattr(checkpoint, "RANK", 1)
    checkpoint.save({}, tmp_path / "folder/new.pt")
    checkpoint.remove([old])
    assert list(tmp_path.iterdir()) == [old]


SEVERAL = """
import json, os, runpy, signal, sys
from common.runtime import distributed
from tests.conftest import ending_at

distributed.shut_down = lambda: None  # not between the commands
with ending_at(1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
    for script, *arguments in json.loads(sys.argv[1]):
        sys.argv = [script, *arguments]
        runpy.run_path(f"{script}.py", run_name="__main__")
"""


def torchrun(root, launches, *commands):
    """Run commands one after the other, by so many torchruns; their exit codes and outputs.

    A run that writes its state two steps into its second epoch ends there by SIGTERM.
    """
    (root / "several.py").write_text(SEVERAL)
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    how = {"cwd": ROOT, "env": os.environ | here, "text": True}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    work = json.dumps([words(*command) for command in commands])
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    started = [
        subprocess.Popen([*launcher, *launch.split(), root / "several.py", work], **how)
        for launch in launches
    ]
    outs, errs = zip(*[process.communicate(timeout=600) for process in started])
    return [process.returncode for process in started], "".join(outs), "".join(errs)


def commands(root, images):
    """Of all stages that train; with BatchNorm; and of images that are streamed."""
    dense, masks = root / "dense/seed0", root / "imp"
    normed = "--model resnet20 --width 0.25 --epochs 1 --lr 0.02"
    lth = stage4("lth", dense, masks, root / "sparse", "--sparsity 0.3 --rewind 1")
    return (
        stage1(root / "dense", "--seed 0 1"),
        stage2(dense, masks, "--sparsity 0.3"),
        lth,
        stage1(root / "normed", normed),
        imagenet1(images, root / "streamed", SMALL),
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes make: of two torchruns, as on two nodes, and then of one.

    The first ends by SIGTERM within an epoch of a run, which the second goes on with, and in turn
    ends with an error.
    """
    root, file = tmp_path_factory.mktemp("two"), "file"
    save_pictures(root / "data", train=9, val=7)
    (root / file).touch()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"--rdzv-backend c10d --rdzv-endpoint localhost:{free.getsockname()[1]}"
    nodes, here = [f"--nnodes 2 --nproc-per-node 1 {meet}"] * 2, ["--standalone --nproc-per-node 2"]
    dense, *others = commands(root, root)
    cut = imagenet1(root, root / "cut", SMALL)
    codes, out, err = torchrun(root, nodes, dense, *others, (*cut, "--checkpoint-minutes 0"))
    assert 0 not in codes and err.count("stopped; the same command goes on") == 2, err
    assert len(re.findall(r"mlpx0.03125 seed \d  epoch", out)) == 6  # a line an epoch
    assert state(root / "cut/seed0/resume.pt")["step"] == 3
    (code,), out, err = torchrun(root, here, cut, dense, stage1(root / file / "dense"))
    told = [line for line in err.splitlines() if "error: " in line and "torch" not in line]
    assert code != 0 and len(told) == 1 and "gloo" not in err, err
    assert f"cannot write {root / file}" in told[0]
    assert out.count("nothing to do") == 2 and "resumes after epoch 1 and 3 steps" in out
    return root


def test_two_processes_train_what_one_does(two, tmp_path):
    """Up to the order in which sums are taken; BatchNorm over both."""
    for command in commands(tmp_path, two):
        succeed(*command)
    found = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.pt")}
    assert found
    for path in found - {Path("imp/mask_0.30.pt")}:
        assert distance(weights(tmp_path / path), weights(two / path)) < 1e-4, path
    assert distance(*(weights(two / f"dense/seed{n}/epoch_0003.pt") for n in (0, 1))) > 1e-2
    results = [result(folder / "streamed/seed0") for folder in (tmp_path, two)]
    assert [result["processes"] for result in results] == [1, 2]
    for key in ("train_loss", "test_loss", "train_acc", "test_acc", "test_top5"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-3), key


def test_two_processes_that_were_cut_off_within_an_epoch_go_on_there(two):
    same_files(two / "cut", two / "streamed")
