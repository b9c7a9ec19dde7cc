import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, call


def run_all(*arguments, **environment):
    """The script as on a machine without GPUs, unless CUDA_VISIBLE_DEVICES is None: then they are nvidia-smi's."""
    keep = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "")}
    settings = {
        key: value for key, value in (keep | {"CUDA_VISIBLE_DEVICES": ""} | environment).items() if value is not None
    }
    return subprocess.run(["bash", str(ROOT / "run_all.sh"), *arguments], env=settings, capture_output=True, text=True)


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


def test_every_preset_prints_commands_that_the_stages_accept(tmp_path):
    for preset, dataset, model in (("quick", "glyphs", "resnet20"), ("cifar100", "cifar100", "resnet20"), ("vgg11", "cifar10", "vgg11"),
                                   ("svhn", "svhn", "resnet20"), ("imagenet", "imagenet", "resnet50")):  # fmt: skip
        done = run_all(preset, DRY_RUN="1")
        assert done.returncode == 0, done.stderr
        assert (
            f"--dataset {dataset} " in done.stdout
            and f"--model {model} " in done.stdout
            and f"runs/{preset}" in done.stdout
        )
        for line in run_all(preset, DRY_RUN="1", OUT=str(tmp_path)).stdout.splitlines():
            words = shlex.split(line)
            if words[1].endswith(".py"):  # every flag is known: the stages get as far as the missing files
                outcome = call(words[1].removesuffix(".py"), *words[2:], "--device", "nowhere")
                assert outcome.code == 2 and ("nowhere" in outcome.err or "no dense run" in outcome.err), outcome.err


def test_methods_and_controls_add_their_runs():
    usual = run_all("quick", DRY_RUN="1", PAIRS="1", PARALLEL="").stdout.splitlines()
    more = run_all(
        "quick", DRY_RUN="1", PAIRS="1", PARALLEL="", METHODS="activation masked",
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


def test_a_method_may_match_against_an_early_target():
    usual = run_all("cifar10", DRY_RUN="1", PAIRS="0", WIDTHS="1", REWIND="25", METHODS="activation")
    early = run_all("cifar10", DRY_RUN="1", PAIRS="0", WIDTHS="1", REWIND="25", METHODS="activation activation@5")
    added = [line for line in early.stdout.splitlines() if line not in usual.stdout.splitlines()]
    assert [line.split()[1] for line in added] == ["train_dense.py"] * 2 + ["align_mask.py", "train_sparse.py"]
    assert all("--save-epochs 25 5 " in line for line in added[:2])
    assert "--method activation --target-epoch 5 --out 'runs/cifar10/align/activation@5/seed0-seed1'" in added[2]
    assert "--masks 'runs/cifar10/align/activation@5/seed0-seed1'" in added[3] and "--target-epoch" not in usual.stdout


def test_a_dry_run_names_the_interpreter_that_has_the_packages(tmp_path):
    assert run_all("quick", DRY_RUN="1").stdout.startswith("python3 train_dense.py")
    path = command(tmp_path, "python3", "exit 1")
    assert run_all("quick", DRY_RUN="1", PATH=path).stdout.startswith(".venv/bin/python train_dense.py")
    assert run_all("test", DRY_RUN="1").stdout == "python3 -m pytest -q tests\n"


def test_an_ensemble_has_one_source_and_five_of_the_rest():
    done = run_all("cifar10", DRY_RUN="1", ENSEMBLE="5", METHODS="activation")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    folder = "runs/cifar10-ensemble/"

    def outs(script):
        return [
            words[words.index("--out") + 1].removeprefix(folder) for words in lines if words[1] == script
        ]  # fmt: skip

    assert [words[words.index("--seed") + 1] for words in lines if words[1] == "train_dense.py"] == list("012345")
    assert outs("prune_imp.py") == [f"imp/seed{n}" for n in range(5)]
    assert outs("align_mask.py") == [f"align/activation/seed0-seed{n}" for n in range(1, 6)]
    orders = [f"sparse/lth/seed0-seed0/order{n}" for n in range(5)]
    pairs = [[f"sparse/naive/seed0-seed{n}", f"sparse/permuted/activation/seed0-seed{n}"] for n in range(1, 6)]
    assert outs("train_sparse.py") == orders + sum(pairs, [])
    trained = [words for words in lines if words[1] == "train_sparse.py"]
    assert [words[-2:] for words in trained[:5]] == [["--seed", str(n)] for n in range(5)]
    assert all("--sparsity 0.9 --rewind 25" in " ".join(words) for words in trained)
    alone = run_all("quick", DRY_RUN="1", ENSEMBLE="2", PARALLEL="auto", JOBS="1").stdout.splitlines()
    assert not any("--parallel" in line for line in alone if "train_sparse" in line)  # one run a command
    assert all("--parallel auto" in line for line in alone if "train_dense" in line or "prune_imp" in line)
    members = [
        shlex.split(line)
        for line in run_all("svhn", DRY_RUN="1", ENSEMBLE="2").stdout.splitlines()
        if "prune_imp" in line
    ]
    assert [words[words.index("--out") + 1][-5:] for words in members] == [
        "seed0",
        "seed1",
        "seed2",
    ]  # seed 0 saw CIFAR-10
    same = run_all("svhn", DRY_RUN="1", SOURCE_DATASET="svhn").stdout
    assert "--arm lth" in same and "cifar10" not in same
    for wrong in ("1", "five"):
        done = run_all("quick", ENSEMBLE=wrong)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and wrong in done.stderr


def test_side_by_side_one_command_trains_all_networks_of_a_stage():
    usual = run_all("svhn", DRY_RUN="1", PAIRS="0 1", METHODS="activation", CONTROLS="imp-target").stdout.splitlines()
    lines = run_all("svhn", DRY_RUN="1", PAIRS="0 1", METHODS="activation", CONTROLS="imp-target", PARALLEL="auto").stdout.splitlines()  # fmt: skip
    trained = sorted(shlex.split(line) for line in lines if "train_dense.py" in line)
    seeds = [words[words.index("--seed") + 1 : words.index("--out")] for words in trained]
    assert seeds == [["0", "2"], ["1", "3"]] and trained[0][3] == "cifar10" and trained[1][3] == "svhn"
    (chains,) = (shlex.split(line) for line in lines if "prune_imp.py" in line)
    folders = [f"runs/svhn/{{}}/seed{seed}" for seed in range(4)]
    place = chains.index("--dense") + 1
    assert chains[place : place + 4] == [folder.format("dense") for folder in folders]
    place = chains.index("--out") + 1
    assert chains[place : place + 4] == [folder.format("imp") for folder in folders]
    sparse = [line for line in lines if "train_sparse.py" in line]
    assert all("--parallel auto" in line for line in lines if "train_" in line or "prune_" in line)
    assert [line.split() for line in usual if "train_sparse" in line] == [
        [word for word in line.split() if word not in ("--parallel", "auto")] for line in sparse
    ]


def command(folder, name, script):
    """A command that stands in for another; returns the PATH on which it is found first."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_quick_fills_a_few_cores_and_leaves_a_gpu_to_processes(tmp_path):
    def stages(preset="quick", **environment):
        printed = run_all(preset, DRY_RUN="1", **{"CUDA_VISIBLE_DEVICES": None} | environment).stdout.splitlines()
        return [[line for line in printed if stage in line] for stage in ("train_dense", "prune_imp", "train_sparse")]

    path = command(tmp_path, "nvidia-smi", "printf 'No devices were found\\n\\n'; exit 6")
    command(tmp_path, "getconf", "echo 2")
    dense, chains, sparse = stages(PATH=path)
    assert [len(lines) for lines in (dense, chains, sparse)] == [1, 1, 9] and "--parallel" not in str(sparse)
    assert "--parallel auto" in dense[0] and "--parallel auto" in chains[0]
    command(tmp_path, "getconf", "echo 16")  # each process gets several of so many
    assert [len(lines) for lines in stages(PATH=path)] == [6, 3, 9]
    command(tmp_path, "getconf", "echo 2")
    command(tmp_path, "nvidia-smi", "echo 0")
    assert [len(lines) for lines in stages(PATH=path)] == [6, 3, 9] and "--parallel" not in str(stages(PATH=path))
    for none in ("", "-1"):
        assert [len(lines) for lines in stages(PATH=path, CUDA_VISIBLE_DEVICES=none)] == [1, 1, 9]
    for environment in ({}, {"JOBS": "2"}):
        for lines in stages("svhn", PARALLEL="auto", PAIRS="0", **environment):
            assert lines and all("--parallel auto" in line for line in lines)


def test_each_of_several_gpus_has_a_command_of_its_own(tmp_path):
    path = command(tmp_path, "nvidia-smi", "printf '0\\n1\\n2\\n'")
    command(
        tmp_path, "python3", f'echo "$1 ${{CUDA_VISIBLE_DEVICES-all}}" >> {tmp_path}/log; [ "$1" = -c ] || sleep 0.3'
    )

    def used(**environment):
        (tmp_path / "log").unlink(missing_ok=True)
        environment = {"CUDA_VISIBLE_DEVICES": None} | environment
        settings = {"WIDTHS": "1", "METHODS": "", "OUT": str(tmp_path / "runs")} | environment
        done = run_all("cifar10", PATH=path, **settings)
        assert done.returncode == 0, done.stderr
        lines = [line.split(maxsplit=1) for line in (tmp_path / "log").read_text().splitlines()]
        return [device for script, device in lines if script == "train_dense.py"]

    assert sorted(used()) == list("001122")
    assert set(used(JOBS="2")) == {"0", "1"}
    assert set(used(JOBS="4")) == {"0", "1", "2"}  # the fourth shares the first GPU
    assert set(used(CUDA_VISIBLE_DEVICES="GPU-5, 7,")) == {"GPU-5", "7"}
    assert set(used(CUDA_VISIBLE_DEVICES="7")) == {"7"}
    assert sorted(used(PARALLEL="auto")) == list("012")
    assert len(used(PARALLEL="auto", JOBS="2")) == 2 and used(PARALLEL="auto", JOBS="1") == ["all"]
    lines = run_all(
        "svhn", CUDA_VISIBLE_DEVICES="0,1,2", DRY_RUN="1", PARALLEL="auto", PAIRS="0 1 2 3"
    ).stdout.splitlines()
    trained = [shlex.split(line) for line in lines if "train_dense" in line]
    seeds = [words[words.index("--seed") + 1 : words.index("--out")] for words in trained]
    assert sorted(seeds) == [["0", "6"], ["1", "7"], ["2"], ["3"], ["4"], ["5"]]
    chains = [shlex.split(line) for line in lines if "prune_imp" in line]
    networks = [words[words.index("--dense") + 1 : words.index("--data-dir")] for words in chains]
    assert [[name[-5:] for name in line] for line in networks] == [["seed0", "seed6"], ["seed2"], ["seed4"]]


def test_gpus_that_share_a_network_are_started_by_torchrun():
    usual, shared = (
        run_all("imagenet", DRY_RUN="1", CUDA_VISIBLE_DEVICES="0,1,2,3", **more).stdout.splitlines()
        for more in ({}, {"SPREAD": "4"})
    )
    launch = "python3 -m torch.distributed.run --standalone --nproc-per-node 4 "
    assert [line.replace(launch, "python3 ") for line in shared] == usual
    assert all(line.startswith(launch) == (" train_" in line or " prune_" in line) for line in shared)
    assert "--parallel" not in run_all("quick", DRY_RUN="1", SPREAD="2").stdout
    for wrong in (
        {"SPREAD": "two"},
        {"SPREAD": "0"},
        {"SPREAD": "2", "PARALLEL": "auto"},
        {"SPREAD": "2", "JOBS": "2"},
    ):
        done = run_all("imagenet", DRY_RUN="1", **wrong)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "SPREAD" in done.stderr


def test_svhn_reuses_the_masks_of_cifar10():
    lines = run_all("svhn", DRY_RUN="1", PAIRS="0 1", METHODS="activation").stdout.splitlines()
    trained = [shlex.split(line) for line in lines if "train_dense.py" in line]
    assert [(words[3], words[words.index("--seed") + 1]) for words in trained] == [
        ("cifar10", "0"), ("svhn", "1"), ("cifar10", "2"), ("svhn", "3"),
    ]  # fmt: skip
    assert not any("--arm lth" in line for line in lines) and sum("--arm naive" in line for line in lines) == 2


def test_unknown_presets_and_controls_are_refused():
    done = run_all("quick", "DRY_RUN=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'DRY_RUN=1'" in done.stderr
    done = run_all("cifar11")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cifar11" in done.stderr
    done = run_all("quick", CONTROLS="signs shuffle")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'shuffle'" in done.stderr
    for wrong in ("activaton", "activation@", "activation@2x", "random", "identity@5"):
        done = run_all("quick", METHODS=f"weight {wrong}", DRY_RUN="1")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"'{wrong}'" in done.stderr
        assert ("epoch of the target" in done.stderr) == ("@" in wrong)


def test_a_stage_that_fails_stops_the_experiment(tmp_path):
    done = run_all("quick", PAIRS="0", OUT=str(tmp_path), DENSE_FLAGS="--epochs 0")
    assert (
        done.returncode != 0
        and "--epochs" in done.stderr
        and "prune_imp" not in done.stderr
        and "done in" not in done.stdout
    )
