"""User errors end in one line, exit code 2, and no half-written files."""

import json
import shutil

import numpy
import pytest
import torch

from common import masking
from tests.conftest import TINY, call, refuse, stage1, stage2, state, succeed

STAGE_1 = """\
--model resnet20 --width 0.3 | 4.8
--model mlp --width 0.001 | 0.512
--model vgg11 --width 1 | 32 px
--model lenet | lenet
--dataset folder --data-dir /nowhere | /nowhere
--device cuda:99 | cuda:99
--device abacus | --device cpu
--device meta | meta
--epochs 0 | --epochs
--lr 1e6 | diverged
--width 1e307 | --width
--limit-train 10000000 | --limit-train
--batch-size 300 | --batch-size 300
--save-epochs 5 | --save-epochs
--momentum 1 | --momentum
--parallel 0 | --parallel"""


@pytest.mark.parametrize("line", STAGE_1.splitlines())
def test_stage_1_refuses(tmp_path, line):
    flags, message = line.split(" | ")
    refuse(stage1(tmp_path, flags), message)
    assert message == "diverged" or not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_run_folder_is_named(tmp_path):
    (tmp_path / "seed0").touch()
    refuse(stage1(tmp_path), "no run of this project")


# Stage, flags that are added to DEFAULTS, and parts of the message. The commands run in a folder
# with the runs of two pairs and what `prepared` adds.
LATER_STAGES = """\
prune_imp --dense nowhere | nowhere | not a dense run
prune_imp --dense dense | not a dense run | seed0, seed1
prune_imp --dense imp/seed0 | prune_imp
prune_imp --dense changed | epoch_0003.pt was changed after the run
prune_imp --dense unfinished | not finished
prune_imp --sparsity 1.5 | 1.5
prune_imp --sparsity 0 | above 0
prune_imp --sparsity 1e-7 | all or none
prune_imp --sparsity 0.9999999 | all or none
prune_imp --rewind 2 | no weights after epoch 2 | 0, 1, 3
prune_imp --rewind 1 --lr 1 | --rewind
prune_imp --dense dense/seed0 dense/seed2 | --out
prune_imp --dense dense/seed0 dense/seed2 --out new new | --out
align_mask --target wide/seed0 | source and target differ
align_mask --source wide/seed0 --target wide/seed1 | mask_0.50.pt | 0.0625
align_mask --target dense/seed0 | the same network
align_mask --source dense/seed2 | of seed 0 | --source is seed 2
align_mask --masks wide | no mask_*.pt
align_mask --source other/seed0 --target other/seed1 | another network of seed 0
align_mask --masks one-shot --out align/activation/seed0-seed1 | a permutation of another mask
align_mask --target-epoch 2 | no weights after epoch 2
align_mask --method weight --match-on pre | --match-on
align_mask --method masked --restarts 9 | --restarts
align_mask --dataset glyphs | --model-fn
train_sparse --arm lth | lth contradicts | seed 0
train_sparse --weights dense/seed0 | naive contradicts
train_sparse --arm permuted | permuted contradicts | unpermuted
train_sparse --arm permuted --weights dense/seed3 --masks align/activation/seed0-seed1 | onto seed 1
train_sparse --masks align/activation/seed0-seed1 | naive contradicts
train_sparse --arm random-permutation --masks align/weight | by weight
train_sparse --arm permuted --masks align/random | by random
train_sparse --arm permuted --weights other/seed1 --masks align/weight | onto another network
train_sparse --arm imp-target | imp-target contradicts
train_sparse --arm shuffled --weights dense/seed0 | shuffled contradicts
train_sparse --arm lth --weights other/seed0 | another network
train_sparse --weights wide/seed1 | mask_0.50.pt | mlp
train_sparse --sparsity 0.6 | mask_0.60.pt | mask_0.50.pt, mask_0.70.pt
train_sparse --rewind 2 | no weights after epoch 2 | 0, 1, 3
train_sparse --rewind 3 | no epoch to train
train_sparse --masks masks --sparsity 0.5 | prunes 70
train_sparse --masks masks --sparsity 0.7 | mask_0.70.pt does not fit | 1.weight"""
DEFAULTS = {
    "prune_imp": "--dense dense/seed0 --sparsity 0.5 --out new",
    "align_mask": "--source dense/seed0 --target dense/seed1 --masks imp/seed0 --out new",
    "train_sparse": "--arm naive --weights dense/seed1 --masks imp/seed0 --sparsity 0.5 --rewind 0 "
    "--out new",
}


@pytest.fixture(scope="module")
def prepared(runs, aligned, tmp_path_factory):
    """Add to the runs: masks by other methods, networks of other settings, and damaged files."""
    root = shutil.copytree(runs, tmp_path_factory.mktemp("refusals") / "runs")
    shutil.copytree(aligned, root / "align", dirs_exist_ok=True)
    succeed(*stage1(root / "wide", "--width 0.0625 --epochs 1 --seed 0 1"))
    succeed(*stage1(root / "other", "--epochs 2 --lr 0.03 --seed 0 1"))
    succeed(*stage2(root / "dense/seed0", root / "one-shot", "--sparsity 0.5 --one-shot"))
    for name in ("changed", "unfinished"):
        shutil.copytree(root / "dense/seed0", root / name)
    (root / "unfinished/result.json").unlink()
    shutil.copy(root / "dense/seed2/epoch_0003.pt", root / "changed")
    mask_info = state(root / "imp/seed0/mask_0.70.pt")
    (root / "masks").mkdir()
    torch.save(mask_info, root / "masks/mask_0.50.pt")  # of another sparsity than its name says
    mask_info["mask"]["1.weight"] = mask_info["mask"]["1.weight"][:, :-1]
    torch.save(mask_info, root / "masks/mask_0.70.pt")
    return root


@pytest.mark.parametrize("line", LATER_STAGES.splitlines())
def test_later_stages_refuse(prepared, monkeypatch, line):
    monkeypatch.chdir(prepared)
    command, *messages = line.split(" | ")
    stage, flags = command.split(maxsplit=1)
    refuse((stage, DEFAULTS[stage], flags), *messages)
    assert not (prepared / "new").exists()


def test_a_round_under_the_name_of_another_is_named(runs, tmp_path):
    imp = shutil.copytree(runs / "imp/seed0", tmp_path / "imp")
    shutil.copy(imp / "round_04.pt", imp / "round_05.pt")
    command = stage2(runs / "dense/seed0", imp, "--keep-rounds --sparsity 0.8")
    refuse(command, "round_05.pt holds round 4")


def test_a_finished_chain_of_other_code_gets_no_more_masks(runs, tmp_path):
    imp = shutil.copytree(runs / "imp/seed0", tmp_path / "imp")
    arguments = json.loads((imp / "arguments.json").read_text()) | {"code": ["abc"]}
    (imp / "arguments.json").write_text(json.dumps(arguments))
    command = stage2(runs / "dense/seed0", imp, "--keep-rounds --sparsity 0.8")
    refuse(command, "made by other code (abc then")
    assert not (imp / "mask_0.80.pt").exists()


def test_a_sparsity_that_keeps_few_weights_is_met(runs, tmp_path):
    succeed(*stage2(runs / "dense/seed0", tmp_path, "--sparsity 0.999"))
    mask = state(tmp_path / "mask_0.999.pt")["mask"]  # a round prunes at least one weight
    assert masking.num_kept(mask) == masking.keep_count(masking.numel(mask), 0.999) < 5


def fill_gpu():
    error = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7 GiB."
    raise torch.OutOfMemoryError(error)


OUT_OF_MEMORY = [
    (lambda: torch.empty(10**15), "(can't allocate memory: you tried to allocate 40000000000000"),
    (lambda: numpy.empty(10**15), "7.11 PiB"),
    (fill_gpu, "(CUDA out of memory. Tried to allocate 20.00 MiB)"),
]


@pytest.mark.parametrize("allocate, message", OUT_OF_MEMORY)
def test_out_of_memory_is_one_line(monkeypatch, allocate, message):
    monkeypatch.setattr("train_dense.load_data", lambda *_, **__: allocate())
    refuse(("train_dense", TINY, "--out nowhere"), "out of memory: use smaller", message)


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("train_dense.main", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("train_dense")
