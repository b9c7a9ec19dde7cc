"""What a user can get wrong ends in one line, exit code 2, and nothing half-written."""

import math
import shutil

import numpy
import pytest
import torch

from common import masking
from tests.conftest import IMP, TINY, call, refused, sparse, state, succeed


def test_controls_refuse_files_that_contradict_them(runs, aligned, tmp_path):
    refused(
        sparse("random-permutation", runs / "dense/seed1", aligned / "weight", tmp_path), "contradicts", "by weight"
    )
    refused(sparse("permuted", runs / "dense/seed1", aligned / "random", tmp_path), "contradicts", "by random")
    refused(sparse("imp-target", runs / "dense/seed1", runs / "imp/seed0", tmp_path), "contradicts")
    refused(sparse("shuffled", runs / "dense/seed0", runs / "imp/seed0", tmp_path), "contradicts")


def files(folder):
    return sorted(folder.rglob("*")) if folder.exists() else []


def dense(out, *more):
    return call("train_dense", *TINY, "--epochs", 1, "--out", out, *more)


@pytest.mark.parametrize("more, words", [
    (("--model", "resnet20", "--width", 0.3), "4.8"),
    (("--model", "vgg11", "--width", 1), "32 px"),
    (("--dataset", "folder", "--data-dir", "/nowhere"), "/nowhere"),
    (("--device", "cuda:99"), "cuda:99"),
    (("--epochs", 0), "--epochs"),
    (("--lr", -1), "--lr"),
    (("--width", "x"), "--width"),
    (("--limit-train", 10**7), "--limit-train"),
    (("--batch-size", 300), "--batch-size 300"),
    (("--save-epochs", 5), "--save-epochs"),
    (("--model", "lenet"), "lenet"),
    (("--dataset", "mnist"), "mnist"),
    (("--momentum", 1), "--momentum"),
    (("--width", "1e307"), "--width"),
    (("--epochs", "9" * 400), "--epochs"),
    (("--device", "meta"), "meta"),
])  # fmt: skip
def test_dense_refuses(tmp_path, more, words):
    refused(dense(tmp_path / "out", *more), words)
    assert not files(tmp_path / "out")  # nothing half-written


def test_dense_refuses_a_folder_of_another_experiment(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "dense")
    refused(
        dense(tmp_path / "dense", "--epochs", 3, "--save-epochs", 1, "--lr", 0.5),
        "lr is 0.08 there and 0.5 here",
        "--out",
    )
    refused(dense(tmp_path / "dense", "--epochs", 3, "--save-epochs", 1, "--width", 0.0625), "width is 0.03125 there")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/seed0").write_text("a file")
    refused(dense(tmp_path / "mine"), "no run of this project")


def test_later_stages_refuse_bad_checkpoints(runs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(runs, root)
    refused(
        call("prune_imp", "--dense", root / "nowhere", "--sparsity", 0.5, "--out", tmp_path / "o"),
        "nowhere",
        "no dense run",
    )
    refused(call("prune_imp", "--dense", root / "imp/seed0", "--sparsity", 0.5, "--out", tmp_path / "o"), "prune_imp")
    refused(call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 1.5, "--out", tmp_path / "o"), "1.5")
    refused(call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0, "--out", tmp_path / "o"), "above 0")
    refused(
        call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0.5, "--rewind", 2, "--out", tmp_path / "o"),
        "no weights after epoch 2",
        "0, 1, 3",
    )
    last = root / "dense/seed0/epoch_0003.pt"
    last.write_bytes(last.read_bytes()[:500])
    refused(
        call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0.5, "--out", tmp_path / "o"),
        "epoch_0003.pt",
        "cut off",
    )
    torch.save({"weights": 1}, last)
    refused(
        call("prune_imp", "--dense", root / "dense/seed0", "--sparsity", 0.5, "--out", tmp_path / "o"), "state_dict"
    )
    (root / "dense/seed2/result.json").unlink()
    refused(
        call("prune_imp", "--dense", root / "dense/seed2", "--sparsity", 0.5, "--out", tmp_path / "o"), "not finished"
    )
    assert not files(tmp_path / "o")


def test_stages_refuse_what_does_not_fit_together(runs, tmp_path):
    wide, out = tmp_path / "wide", tmp_path / "o"
    assert dense(wide, "--width", 0.0625, "--epochs", 1, "--seed", 0, 1).code == 0
    align = ("align_mask", "--masks", runs / "imp/seed0", "--out", out, "--source")
    refused(call(*align, runs / "dense/seed0", "--target", wide / "seed0"), "different networks")
    refused(call(*align, wide / "seed0", "--target", wide / "seed1"), "mask_0.50.pt", "0.0625")
    refused(call(*align, runs / "dense/seed0", "--target", runs / "dense/seed0"), "the same network")
    refused(call(*align, runs / "dense/seed2", "--target", runs / "dense/seed1"), "no mask of the source")
    refused(
        call(
            "align_mask",
            "--masks",
            tmp_path,
            "--out",
            out,
            "--source",
            runs / "dense/seed0",
            "--target",
            runs / "dense/seed1",
        ),
        "no mask_*.pt",
    )
    refused(
        call(*align, runs / "dense/seed0", "--target", runs / "dense/seed1", "--target-epoch", 2),
        "no weights after epoch 2",
    )
    refused(sparse("naive", wide / "seed0", runs / "imp/seed0", out), "mask_0.50.pt", "mlp")
    imp, aligned = runs / "imp/seed0", runs / "align/activation/seed0-seed1"
    refused(sparse("lth", runs / "dense/seed1", imp, out), "--arm lth contradicts", "seed 0")
    refused(sparse("naive", runs / "dense/seed0", imp, out), "--arm naive contradicts")
    refused(sparse("permuted", runs / "dense/seed1", imp, out), "--arm permuted contradicts", "unpermuted")
    refused(sparse("permuted", runs / "dense/seed3", aligned, out), "permuted onto seed 1")
    refused(sparse("naive", runs / "dense/seed1", aligned, out), "--arm naive contradicts")
    refused(
        sparse("naive", runs / "dense/seed1", imp, out, "--sparsity", 0.6, "--rewind", 0),
        "mask_0.60.pt",
        "mask_0.50.pt, mask_0.70.pt",
    )
    refused(
        sparse("naive", runs / "dense/seed1", imp, out, "--sparsity", 0.5, "--rewind", 2),
        "no weights after epoch 2",
        "0, 1, 3",
    )
    refused(sparse("naive", runs / "dense/seed1", imp, out, "--sparsity", 0.5, "--rewind", 3), "no epoch to train")
    assert not files(out)
    changed = tmp_path / "changed"
    changed.mkdir()
    entry = state(imp / "mask_0.70.pt")
    torch.save(entry, changed / "mask_0.50.pt")  # a mask under the name of another sparsity
    refused(sparse("naive", runs / "dense/seed1", changed, out, "--sparsity", 0.5, "--rewind", 0), "prunes 70")
    entry["mask"]["1.weight"] = entry["mask"]["1.weight"][:, :-1]
    torch.save(entry, changed / "mask_0.70.pt")
    refused(
        sparse("naive", runs / "dense/seed1", changed, out, "--sparsity", 0.7, "--rewind", 0),
        "mask_0.70.pt does not fit the network: 1.weight",
    )


def test_stages_refuse_files_of_another_experiment_under_the_same_seed(runs, tmp_path):
    other, out = tmp_path / "other", tmp_path / "o"
    for seed in (0, 1):
        assert dense(other, "--epochs", 2, "--lr", 0.03, "--seed", seed).code == 0
    imp = runs / "imp/seed0"
    ends = ("--source", other / "seed0", "--target", other / "seed1", "--masks", imp, "--out", out)
    refused(call("align_mask", *ends), "another network of seed 0")
    refused(sparse("lth", other / "seed0", imp, out, "--sparsity", 0.5, "--rewind", 0), "another network")
    assert not files(out)
    shutil.copytree(runs / "align/activation/seed0-seed1", out)
    succeed(
        "prune_imp", "--dense", runs / "dense/seed0", "--sparsity", 0.5, "--one-shot", *IMP, "--out", tmp_path / "imp"
    )
    ends = (
        "--source",
        runs / "dense/seed0",
        "--target",
        runs / "dense/seed1",
        "--masks",
        tmp_path / "imp",
        "--out",
        out,
    )
    refused(call("align_mask", *ends), "mask_0.50.pt is a permutation of another mask")


def test_extreme_sparsities_and_diverged_networks_are_refused(runs, tmp_path):
    imp = ("prune_imp", "--dense", runs / "dense/seed0", *IMP, "--out", tmp_path / "o", "--sparsity")
    refused(call(*imp, 0.0000001), "all or none")
    refused(call(*imp, 0.9999999), "all or none")
    refused(
        call(
            "prune_imp",
            "--dense",
            runs / "dense/seed0",
            "--keep-rounds",
            *IMP,
            "--out",
            runs / "imp/seed0",
            "--sparsity",
            0.6,
        ),
        "has passed 0.6",
    )
    refused(dense(tmp_path / "wild", "--lr", 1e6, "--epochs", 2), "diverged")
    shutil.copytree(runs / "dense/seed0", tmp_path / "wild/seed0", dirs_exist_ok=True)
    path = tmp_path / "wild/seed0/epoch_0003.pt"
    entry = state(path)
    next(iter(entry["state_dict"].values())).fill_(math.nan)
    torch.save(entry, path)
    refused(
        call("prune_imp", "--dense", tmp_path / "wild/seed0", "--sparsity", 0.5, "--out", tmp_path / "o"), "diverged"
    )
    for flag, value in (("--width", "inf"), ("--lr", "nan"), ("--seed", 10**30)):
        refused(dense(tmp_path / "o", flag, value), flag)
    assert not files(tmp_path / "o")
    ends = ("--dense", runs / "dense/seed0", "--sparsity", 0.999)
    succeed("prune_imp", *ends, *IMP, "--out", tmp_path / "few")  # 20% of the last few weights is still one
    mask = state(tmp_path / "few/mask_0.999.pt")["mask"]
    assert masking.kept(mask) == masking.keep_count(masking.size(mask), 0.999) < 5


def of_a_gpu():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7 GiB."
    )


@pytest.mark.parametrize("take, words", [
    (lambda: torch.empty(10**15), "(can't allocate memory: you tried to allocate 4000000000000000 bytes"), (lambda: numpy.empty(10**15), "7.11 PiB"),
    (of_a_gpu, "(CUDA out of memory. Tried to allocate 20.00 MiB)"),
])  # fmt: skip
def test_too_little_memory_is_one_line(monkeypatch, take, words):
    monkeypatch.setattr("train_dense.load_data", lambda *_, **__: take())
    refused(call("train_dense", *TINY, "--out", "nowhere"), "out of memory: use smaller", words)


def test_a_bug_of_ours_shows_its_traceback(monkeypatch):
    import train_dense

    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(train_dense, "main", broken)
    with pytest.raises(ZeroDivisionError):
        call("train_dense")
