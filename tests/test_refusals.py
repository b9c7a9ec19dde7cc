"""What a user can get wrong ends in one line, exit code 2, and nothing half-written."""

import math
import shutil

import numpy
import pytest
import torch

from common import masking
from tests.conftest import TINY, call, refuse, stage1, stage2, stage3, stage4, state, succeed

WRONG = """\
--model resnet20 --width 0.3 | 4.8
--model mlp --width 0.001 | 0.512
--model vgg11 --width 1 | 32 px
--model lenet | lenet
--dataset folder --data-dir /nowhere | /nowhere
--device cuda:99 | cuda:99
--device abacus | --device cpu
--device meta | meta
--epochs 0 | --epochs
--lr nan | --lr
--lr 1e6 | diverged
--width x | --width
--width 1e307 | --width
--limit-train 10000000 | --limit-train
--batch-size 300 | --batch-size 300
--save-epochs 5 | --save-epochs
--momentum 1 | --momentum
--seed 1000000000000000000000000000000 | --seed
--parallel 0 | --parallel
--parallel many | --parallel"""


def files(folder):
    return sorted(folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_stage_1_refuses(tmp_path, line):
    flags, words = line.split(" | ")
    refuse(stage1(tmp_path, *flags.split()), words)
    assert words == "diverged" or not files(tmp_path)


def test_stage_1_refuses_a_folder_of_another_experiment(runs, tmp_path):
    refuse(stage1(runs / "dense", "--lr", 0.5), "lr is 0.08 there and 0.5 here", "--out")
    (tmp_path / "seed0").write_text("a file")
    refuse(stage1(tmp_path), "no run of this project")


def test_stage_2_refuses(runs, tmp_path):
    root, out = shutil.copytree(runs / "dense", tmp_path / "dense"), tmp_path / "o"
    seed0, last = stage2(root / "seed0", out), root / "seed0/epoch_0003.pt"
    rewind = ("prune_imp", "--dense", root / "seed0", "--sparsity", 0.5, "--out", out, "--rewind")
    two = (*seed0, "--dense", root / "seed0", root / "seed2", "--out", out)
    for command, *words in (
        (stage2(root / "nowhere", out), "nowhere", "no dense run"),
        (stage2(runs / "imp/seed0", out), "prune_imp"),
        ((*seed0, "--sparsity", 1.5), "1.5"),
        ((*seed0, "--sparsity", 0), "above 0"),
        ((*seed0, "--sparsity", 1e-7), "all or none"),
        ((*seed0, "--sparsity", 1 - 1e-7), "all or none"),
        ((*rewind, 2), "no weights after epoch 2", "0, 1, 3"),
        (two, "--out"),
        ((*two, out), "--out"),
    ):
        refuse(command, *words)
    diverged, whole = state(last), last.read_bytes()
    last.write_bytes(whole[:500])
    refuse(seed0, "epoch_0003.pt", "cut off")
    torch.save({"weights": 1}, last)
    refuse(seed0, "state_dict")
    next(iter(diverged["state_dict"].values())).fill_(math.nan)
    torch.save(diverged, last)
    refuse(seed0, "diverged")
    (root / "seed2/result.json").unlink()
    refuse(stage2(root / "seed2", out), "not finished")
    assert not files(out)


def test_a_sparsity_that_keeps_few_weights_is_met(runs, tmp_path):
    succeed(*stage2(runs / "dense/seed0", tmp_path, "--sparsity", 0.999))
    mask = state(tmp_path / "mask_0.999.pt")["mask"]  # 20% of the last few weights is still one
    assert masking.kept(mask) == masking.keep_count(masking.size(mask), 0.999) < 5


def test_stage_3_refuses(runs, ends, tmp_path):
    wide, out, (source, target, masks) = tmp_path / "wide", tmp_path / "o", ends
    succeed(*stage1(wide, "--width", 0.0625, "--epochs", 1, "--seed", 0, 1))
    usual = stage3(*ends, out)
    for command, *words in (
        (stage3(source, wide / "seed0", masks, out), "source and target differ"),
        (stage3(wide / "seed0", wide / "seed1", masks, out), "mask_0.50.pt", "0.0625"),
        (stage3(source, source, masks, out), "the same network"),
        (stage3(runs / "dense/seed2", target, masks, out), "no mask of the source"),
        (stage3(source, target, tmp_path, out), "no mask_*.pt"),
        ((*usual, "--target-epoch", 2), "no weights after epoch 2"),
        ((*usual, "--method", "weight", "--match-on", "pre"), "--match-on"),
        ((*usual, "--dataset", "glyphs"), "--model-fn"),
        (("align_mask", "--source", source, "--target", target, "--out", out), "--masks"),
        (stage4("naive", wide / "seed0", masks, out), "mask_0.50.pt", "mlp"),
    ):
        refuse(command, *words)
    assert not files(out)


def test_stage_4_refuses(runs, ends, aligned, tmp_path):
    (_, target, imp), out = ends, tmp_path / "o"
    permuted = runs / "align/activation/seed0-seed1"
    for arm, seed, masks, words in (
        ("lth", 1, imp, "seed 0"),
        ("naive", 0, imp, ""),
        ("permuted", 1, imp, "unpermuted"),
        ("permuted", 3, permuted, "permuted onto seed 1"),
        ("naive", 1, permuted, ""),
        ("random-permutation", 1, aligned / "weight", "by weight"),
        ("permuted", 1, aligned / "random", "by random"),
        ("imp-target", 1, imp, ""),
        ("shuffled", 0, imp, ""),
    ):
        command = stage4(arm, runs / f"dense/seed{seed}", masks, out)
        refuse(command, f"--arm {arm} contradicts", words)
    naive, changed, entry = stage4("naive", target, imp, out), tmp_path, state(imp / "mask_0.70.pt")
    torch.save(entry, changed / "mask_0.50.pt")  # a mask under the name of another sparsity
    entry["mask"]["1.weight"] = entry["mask"]["1.weight"][:, :-1]
    torch.save(entry, changed / "mask_0.70.pt")
    for more, *words in (
        (("--sparsity", 0.6), "mask_0.60.pt", "mask_0.50.pt, mask_0.70.pt"),
        (("--rewind", 2), "no weights after epoch 2", "0, 1, 3"),
        (("--rewind", 3), "no epoch to train"),
        (("--masks", changed, "--sparsity", 0.5), "prunes 70"),
        (("--masks", changed, "--sparsity", 0.7), "mask_0.70.pt does not fit", "1.weight"),
    ):
        refuse((*naive, *more), *words)
    assert not files(out)


def test_stages_refuse_files_of_another_experiment_under_the_same_seed(runs, ends, tmp_path):
    other, out, (source, target, imp) = tmp_path / "other", tmp_path / "o", ends
    succeed(*stage1(other, "--epochs", 2, "--lr", 0.03, "--seed", 0, 1))
    refuse(stage3(other / "seed0", other / "seed1", imp, out), "another network of seed 0")
    refuse(stage4("lth", other / "seed0", imp, out), "another network")
    assert not files(out)
    shutil.copytree(runs / "align/activation/seed0-seed1", out)
    succeed(*stage2(source, tmp_path / "imp", "--sparsity", 0.5, "--one-shot"))
    words = "mask_0.50.pt is a permutation of another mask"
    refuse(stage3(source, target, tmp_path / "imp", out), words)


def of_a_gpu():
    told = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7 GiB."
    raise torch.OutOfMemoryError(told)


OUT_OF_MEMORY = [
    (lambda: torch.empty(10**15), "(can't allocate memory: you tried to allocate 40000000000000"),
    (lambda: numpy.empty(10**15), "7.11 PiB"),
    (of_a_gpu, "(CUDA out of memory. Tried to allocate 20.00 MiB)"),
]


@pytest.mark.parametrize("take, words", OUT_OF_MEMORY)
def test_too_little_memory_is_one_line(monkeypatch, take, words):
    monkeypatch.setattr("train_dense.load_data", lambda *_, **__: take())
    refuse(("train_dense", *TINY, "--out", "nowhere"), "out of memory: use smaller", words)


def test_a_bug_of_ours_shows_its_traceback(monkeypatch):
    monkeypatch.setattr("train_dense.main", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("train_dense")
