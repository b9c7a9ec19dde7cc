import os
import shlex
import subprocess

from tests.conftest import ROOT, call


def run_all(*arguments, **environment):
    keep = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), *arguments], env=keep | environment, capture_output=True, text=True
    )


def test_dry_run_prints_the_whole_experiment_in_order():
    done = run_all("cifar10", DRY_RUN="1", PAIRS="0 2", WIDTHS="1 8", OUT="some where")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    scripts = [line.split()[1].removesuffix(".py") for line in lines]
    expected = ["train_dense"] * 8 + ["prune_imp"] * 4 + ["align_mask"] * 8 + ["train_sparse"] * 16
    assert scripts[:36] == expected and [line.split()[2] for line in lines[36:]] == [
        "analyze.results",
        "analyze.report",
    ]
    last = [line.split()[2] for line in run_all("quick", DRY_RUN="1").stdout.splitlines()[-5:]]
    assert last == [f"analyze.{name}" for name in ("results", "accuracy", "interpolation", "masks", "methods")]
    words = shlex.split(lines[3])
    assert words[words.index("--seed") + 1] == "5" and words[words.index("--out") + 1] == "some where/w1/dense"
    assert lines[27].rstrip().endswith("--sparsity 0.8 0.9 0.95 0.97 --rewind 0 5 10 15 20 25 50 75 100")
    assert lines[35].rstrip().endswith("--sparsity 0.8 0.9 0.95 0.97 --rewind 0 10 25 50 100")
    assert "--rewind 7 " in run_all("cifar10", DRY_RUN="1", REWIND="7", SPARSE_FLAGS="--lr 1").stdout
    assert (
        "'some where/w8/align/activation/seed4-seed5' --out 'some where/w8/sparse/permuted/activation/seed4-seed5'"
        in lines[34]
    )


def test_every_preset_prints_commands_that_the_stages_accept():
    for preset, dataset, model in (("quick", "glyphs", "resnet20"), ("cifar100", "cifar100", "resnet20"), ("vgg11", "cifar10", "vgg11"),
                                   ("svhn", "svhn", "resnet20"), ("imagenet", "imagenet", "resnet50")):  # fmt: skip
        done = run_all(preset, DRY_RUN="1")
        assert done.returncode == 0, done.stderr
        assert (
            f"--dataset {dataset} " in done.stdout
            and f"--model {model} " in done.stdout
            and f"runs/{preset}" in done.stdout
        )
        for line in done.stdout.splitlines():
            words = shlex.split(line)
            if words[1].endswith(".py"):  # every flag is known: the stages get as far as the missing files
                outcome = call(words[1].removesuffix(".py"), *words[2:], "--device", "nowhere")
                assert outcome.code == 2 and ("nowhere" in outcome.err or "no dense run" in outcome.err), outcome.err


def test_methods_and_controls_add_their_runs():
    usual = run_all("quick", DRY_RUN="1", PAIRS="1").stdout.splitlines()
    more = run_all(
        "quick", DRY_RUN="1", PAIRS="1", METHODS="activation masked",
        CONTROLS="shuffled random-permutation imp-target signs",
    ).stdout.splitlines()  # fmt: skip
    assert [line for line in more if line in usual] == usual  # nothing else changes
    added = [shlex.split(line) for line in more if line not in usual]
    assert [words[words.index("--out") + 1].removeprefix("runs/quick/") for words in added] == [
        "imp/seed3", "align/masked/seed2-seed3", "align/random/seed2-seed3", "sparse/permuted/masked/seed2-seed3",
        "sparse/shuffled/seed2-seed3", "sparse/random-permutation/seed2-seed3", "sparse/imp-target/seed3-seed3",
        "sparse/naive-signs/seed2-seed3", "sparse/permuted-signs/activation/seed2-seed3", "sparse/permuted-signs/masked/seed2-seed3",
    ]  # fmt: skip
    assert [words[-1] for words in added[-3:]] == ["--signs"] * 3


def test_unknown_presets_and_controls_are_refused():
    done = run_all("cifar11")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cifar11" in done.stderr
    done = run_all("quick", CONTROLS="signs shuffle")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'shuffle'" in done.stderr


def test_a_stage_that_fails_stops_the_experiment(tmp_path):
    done = run_all("quick", PAIRS="0", OUT=str(tmp_path), DENSE_FLAGS="--epochs 0", PATH=os.environ["PATH"])
    assert (
        done.returncode != 0
        and "--epochs" in done.stderr
        and "prune_imp" not in done.stderr
        and "done in" not in done.stdout
    )
