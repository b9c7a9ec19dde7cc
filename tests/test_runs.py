"""Run folders and the command line: which calls belong to one experiment."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import train_dense
from common import checkpoint, cli, paths, provenance, runs
from common.errors import UserError
from common.runs import claim
from common.runtime.device import pick_device
from common.training import evaluate, train
from tests.conftest import (
    ROOT,
    call,
    ending_at,
    interrupt,
    refuse,
    result,
    same_files,
    snapshot,
    stage1,
    stage2,
    stage3,
    state,
    succeed,
)
from tests.test_data import resident
from tests.test_training import tiny


def test_another_experiment_in_a_folder_is_refused(ends):
    before = snapshot(ends[0])
    refuse(stage1(ends[0].parent, "--lr 0.5"), "another experiment (lr is 0.08 there and 0.5 here)")
    assert snapshot(ends[0]) == before


def test_a_new_flag_that_is_not_set_is_no_other_experiment(tmp_path):
    (tmp_path / "arguments.json").write_text(json.dumps({"lr": 0.1, "code": ["a"]}))
    for smoothing in (None, False, 0.0):
        assert not runs.is_finished(tmp_path, {"lr": 0.1, "smoothing": smoothing})
    with pytest.raises(UserError, match="smoothing is None there and 0.1 here"):
        runs.is_finished(tmp_path, {"lr": 0.1, "smoothing": 0.1})
    with pytest.raises(UserError, match="lr is 0.1 there and None here"):
        runs.is_finished(tmp_path, {"lr": None})


def test_tags_of_all_inputs_are_joined_without_duplicates():
    assert cli.joined_tag(None, None) is cli.joined_tag() is None
    assert cli.joined_tag("b", None, "a") == "b+a"
    assert cli.joined_tag("layerwise+wide", "wide", "adamw") == "layerwise+wide+adamw"


def test_a_broken_pipe_has_no_traceback():
    code = "from common import cli; cli.run(lambda: print('x\\n' * 100_000))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"x\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_matrix_products_are_fp32_whatever_the_environment_says():
    code = "import torch; from common.runtime.device import pick_device; pick_device('cpu')"
    code += "; print(torch.get_float32_matmul_precision())"
    container = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    options = {"cwd": ROOT, "env": container, "check": True, "capture_output": True, "text": True}
    assert subprocess.run([sys.executable, "-c", code], **options).stdout == "highest\n"


def test_cudnn_is_deterministic_and_computes_fp32_without_tf32(monkeypatch):
    """They are set once for all threads, as another thread may be in the middle of a step."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    pick_device("cpu")
    network, flags = tiny(), []

    def record(*_):
        flags.append((cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32))

    network.register_forward_pre_hook(record)
    evaluate(network, resident().eval_batches())
    assert set(flags) == {(True, True, False)}


def test_the_code_is_identified_before_a_run_during_which_somebody_may_edit_it(monkeypatch):
    scripts = []
    monkeypatch.setattr(provenance, "stamp", scripts.append)
    cli.run(lambda: scripts.append("main"), torchrun=True)
    assert scripts == [__file__, "main"]


def test_save_epochs_add_up(tmp_path):
    succeed(*stage1(tmp_path, "--seed 0 --save-epochs 2"))  # after --save-epochs 1
    assert result(tmp_path / "seed0")["arguments"]["save_epochs"] == [0, 1, 2, 3]


def test_a_run_that_another_command_has_finished_meanwhile_stays(runs, tmp_path, monkeypatch):
    def train_beside_another_command(*args, **flags):
        shutil.copytree(runs / "dense/seed1", tmp_path / "seed1")
        return train(*args, **flags)

    monkeypatch.setattr(train_dense, "train", train_beside_another_command)
    assert "seed1 is finished: nothing to do" in succeed(*stage1(tmp_path, "--seed 0 1"))
    before, other = snapshot(tmp_path / "seed1"), {"seed": 1, "lr": 0.5}
    with pytest.raises(UserError, match="another experiment"):
        claim(tmp_path / "seed1", other, "train_dense.py")
    assert snapshot(tmp_path / "seed1") == before


def test_a_dense_run_resumes_on_the_data_with_which_it_began(tmp_path):
    command = stage1(tmp_path, "--seed 0 --checkpoint-minutes 0")
    with pytest.raises(InterruptedError), ending_at(1, 1, interrupt):
        call(*command)
    file = tmp_path / "seed0/epoch_0000.pt"
    began = state(file)
    for key, value in (("checksum", "other"), ("images", {"train": 1, "test": 1})):
        checkpoint.save(began | {"dataset": began["dataset"] | {key: value}}, file)
        refuse(command, "seed0 began with other data")
    checkpoint.save(began, file)
    succeed(*command)


def test_flags_that_a_method_does_not_use_are_not_recorded(ends, tmp_path):
    succeed(*stage3(*ends, tmp_path))
    assert "restarts" not in json.loads((tmp_path / "arguments.json").read_text())


def test_a_smaller_sparsity_does_not_change_the_chain(tmp_path):
    succeed(*stage1(tmp_path / "dense", "--epochs 1 --seed 0"))
    dense, together, separate = tmp_path / "dense/seed0", tmp_path / "one", tmp_path / "three"
    succeed(*stage2(dense, together, "--sparsity 0.3 0.6 0.7"))
    for sparsity in (0.6, 0.3):
        succeed(*stage2(dense, separate, f"--sparsity {sparsity}"))
    assert [*paths.round_files(separate)] == [4]  # 0.8 ** 4 = 0.41, then 0.6
    succeed(*stage2(dense, separate, "--sparsity 0.7"))
    same_files(together, separate)
