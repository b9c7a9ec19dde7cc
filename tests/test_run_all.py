import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from analyze import status
from tests.conftest import ROOT, call

STAGES = ("train_dense.py", "prune_imp.py", "align_mask.py", "train_sparse.py")


def run_all(*arguments, **environment):
    """The script without GPUs, unless CUDA_VISIBLE_DEVICES is None: then nvidia-smi's."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    usual = {"PATH": path, "HOME": os.environ.get("HOME", ""), "CUDA_VISIBLE_DEVICES": ""}
    settings = {key: value for key, value in (usual | environment).items() if value is not None}
    command = ["bash", str(ROOT / "run_all.sh"), *arguments]
    return subprocess.run(command, env=settings, capture_output=True, text=True)


def dry(preset, script="", **settings):
    """The words of the commands that a preset would run, of one script or of all."""
    done = run_all(preset, DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if script in line]


def values(words, flag):
    """The words that follow a flag, up to the next one."""
    after = words[words.index(flag) + 1 :] if flag in words else []
    end = next((place for place, word in enumerate(after) if word.startswith("--")), len(after))
    return after[:end]


def brief(commands, *flags, below=""):
    """The text of so many lines: a script each, and the words that follow the flags."""
    found = (
        [*words[1:2], *(v for flag in flags for v in values(words, flag))] for words in commands
    )
    text = "\n".join(" ".join(word.removeprefix(below) for word in words) for words in found)
    return text.replace(".py", "")


def command(folder, name, script):
    """A command that stands in for another; returns the PATH on which it is found first."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


WIDE = """\
train_dense 4 some where/w8/dense
train_dense 5 some where/w8/dense
prune_imp some where/w8/imp/seed4 0.8 0.9 0.95 0.97
align_mask some where/w8/align/activation/seed4-seed5
align_mask some where/w8/align/masked/seed4-seed5
train_sparse some where/w8/sparse/lth/seed4-seed4 0.8 0.9 0.95 0.97 0 10 25 50 100
train_sparse some where/w8/sparse/naive/seed4-seed5 0.8 0.9 0.95 0.97 0 10 25 50 100
train_sparse some where/w8/sparse/permuted/activation/seed4-seed5 0.8 0.9 0.95 0.97 0 10 25 50 100
train_sparse some where/w8/sparse/permuted/masked/seed4-seed5 0.8 0.9 0.95 0.97 0 10 25 50 100
-m
-m"""


def test_dry_run_prints_the_whole_experiment_in_order():
    settings = {"PAIRS": "0 2", "OUT": "some where", "PARALLEL": "1"}
    both, wide = (dry("cifar10", WIDTHS=widths, **settings) for widths in ("1 8", "8"))
    counts = (8, 4, 8, 16, 2)
    expected = [script for script, count in zip((*STAGES, "-m"), counts) for _ in range(count)]
    assert [words[1] for words in both] == expected
    assert [words for words in both if "some where/w1" not in str(words)] == wide
    second = [words for words in wide if "-m" in words or "seed4" in str(words)]
    second[:0] = [words for words in wide if words[1] == STAGES[0]][2:]
    assert brief(second, "--seed", "--out", "--sparsity", "--rewind") == WIDE
    paper = [values(words, "--rewind") for words in both if "w1/sparse/lth" in " ".join(words)]
    assert paper == 2 * ["0 5 10 15 20 25 50 75 100".split()]
    rewind = [values(words, "--rewind") for words in dry("cifar10", "sparse", REWIND="7")]
    assert rewind == len(rewind) * [["7"]]  # also of a wide network
    *_, report = dry("quick", "analyze.")
    assert values(report, "--only") == "results accuracy interpolation masks methods".split()


@pytest.mark.parametrize(
    "preset, dataset, model",
    [
        ("quick", "glyphs", "mlp"),
        ("cifar100", "cifar100", "resnet20"),
        ("vgg11", "cifar10", "vgg11"),
        ("svhn", "svhn", "resnet20"),
        ("imagenet", "imagenet", "resnet50"),
    ],
)
def test_the_stages_accept_the_commands_of_a_preset(tmp_path, preset, dataset, model):
    commands = dry(preset, OUT=str(tmp_path), TAG="mine", WIDTHS="1", PAIRS="0")
    assert any(values(w, "--dataset") + values(w, "--model") == [dataset, model] for w in commands)
    for words in commands:
        if words[1] in STAGES:  # every flag is known: the stages get as far as the missing files
            outcome = call(words[1][:-3], *words[2:], "--device", "nowhere")
            assert outcome.code == 2, outcome.err
            assert "nowhere" in outcome.err or "no dense run" in outcome.err


CONTROLS = """\
prune_imp imp/seed3
align_mask align/masked/seed2-seed3 masked imp/seed2
align_mask align/random/seed2-seed3 random imp/seed2
train_sparse sparse/permuted/masked/seed2-seed3 align/masked/seed2-seed3
train_sparse sparse/naive-signs/seed2-seed3 imp/seed2
train_sparse sparse/permuted-signs/activation/seed2-seed3 align/activation/seed2-seed3
train_sparse sparse/permuted-signs/masked/seed2-seed3 align/masked/seed2-seed3
train_sparse sparse/shuffled/seed2-seed3 imp/seed2
train_sparse sparse/random-permutation/seed2-seed3 align/random/seed2-seed3
train_sparse sparse/imp-target/seed3-seed3 imp/seed3"""
EARLY = """\
train_dense dense 25 5
align_mask align/activation@5/seed0-seed1 activation imp/seed0 5
train_sparse sparse/permuted/activation@5/seed0-seed1 align/activation@5/seed0-seed1"""


def test_methods_and_controls_add_their_runs():
    controls = {"CONTROLS": "shuffled random-permutation imp-target signs"}
    usual, more = (
        dry("quick", PAIRS="1", PARALLEL="1", **settings)
        for settings in ({}, controls | {"METHODS": "activation masked"})
    )
    assert [words for words in more if words in usual] == usual  # nothing else changes
    added, flags = [words for words in more if words not in usual], ("--out", "--method", "--masks")
    assert brief(added, *flags, below="runs/quick/w1/") == CONTROLS
    signed = [words for words in more if "--signs" in words]
    assert signed == [words for words in more if "-signs/" in " ".join(words)] != []


def test_a_method_may_match_against_an_early_target():
    settings = {"PAIRS": "0", "WIDTHS": "1", "REWIND": "25"}
    usual = dry("cifar10", METHODS="activation", **settings)
    early = dry("cifar10", METHODS="activation activation@5", **settings)
    added = [words for words in early if words not in usual]
    flags = ("--out", "--save-epochs", "--method", "--masks", "--target-epoch")
    assert brief(added, *flags, below="runs/cifar10/w1/") == EARLY
    assert "--target-epoch" not in str(usual)


def test_a_tag_makes_all_but_the_dense_networks_anew():
    usual, tagged = dry("cifar10", WIDTHS="1 4"), dry("cifar10", WIDTHS="1 4", TAG="adamw")
    for before, now in zip(usual, tagged, strict=True):
        text, folders = " ".join(now), values(now, "--out")
        if now[1] not in ("train_dense.py", "-m"):
            assert folders[0].startswith(("runs/cifar10/w1/adamw/", "runs/cifar10/w4/adamw/"))
            assert text.count(" --tag adamw") == 1
        assert text.replace(" --tag adamw", "").replace("/adamw/", "/") == " ".join(before)


def test_a_dry_run_names_the_interpreter_that_has_the_packages(tmp_path):
    assert dry("quick")[0][0] == "python3"
    for lacks_some in ("exit 1", "echo pytest"):
        path = command(tmp_path, "python3", lacks_some)
        assert dry("quick", PATH=path)[0][0] == ".venv/bin/python"
    assert run_all("test", DRY_RUN="1").stdout == "python3 -m pytest -q tests\n"


ENSEMBLE = """\
train_dense 0 dense
train_dense 1 dense
train_dense 2 dense
prune_imp imp/seed0
prune_imp imp/seed1
align_mask align/activation/seed0-seed1
align_mask align/activation/seed0-seed2
train_sparse 0 sparse/lth/seed0-seed0/order0 0.9 25
train_sparse sparse/naive/seed0-seed1 0.9 25
train_sparse sparse/permuted/activation/seed0-seed1 0.9 25
train_sparse 1 sparse/lth/seed0-seed0/order1 0.9 25
train_sparse sparse/naive/seed0-seed2 0.9 25
train_sparse sparse/permuted/activation/seed0-seed2 0.9 25"""


def test_an_ensemble_has_one_source_and_many_targets():
    settings = {"ENSEMBLE": "2", "PARALLEL": "1"}
    lines = dry("cifar10", ".py", METHODS="activation", **settings)
    flags = ("--seed", "--out", "--rewind")
    cells = [words for words in lines if words[1] == STAGES[3]]
    assert all(values(words, "--sparsity") == ["0.9"] for words in cells)
    found = brief(lines, *flags, below="runs/cifar10-ensemble/w1/")
    assert found == ENSEMBLE.replace(" 0.9", "")
    # The source of SVHN's ensemble saw CIFAR-10, and is no member.
    members = dry("svhn", "prune_imp", **settings)
    assert [values(words, "--out")[0][-5:] for words in members] == ["seed0", "seed1", "seed2"]


def test_svhn_reuses_the_masks_of_cifar10():
    lines = dry("svhn", PAIRS="0 1", METHODS="activation")
    dense = [words for words in lines if words[1] == "train_dense.py"]
    seeds = {values(words, "--dataset")[0]: values(words, "--seed") for words in dense}
    assert seeds == {"cifar10": ["0", "2"], "svhn": ["1", "3"]}
    arms = [values(words, "--arm")[0] for words in lines if "--arm" in words]
    assert arms == 2 * ["naive", "permuted"]
    same = run_all("svhn", DRY_RUN="1", SOURCE_DATASET="svhn").stdout
    assert "--arm lth" in same and "cifar10" not in same


def test_side_by_side_one_command_trains_all_networks_of_a_stage():
    settings = {"PAIRS": "0 1", "WIDTHS": "1", "CONTROLS": "imp-target"}
    one, many = (dry("cifar10", PARALLEL=number, **settings) for number in "14")
    dense, chains, *rest = many
    assert values(dense, "--seed") == list("0123")
    for flag in ("--dense", "--out"):
        assert values(chains, flag) == [folder for w in one[4:8] for folder in values(w, flag)]
    for words in many:
        trains = words[1] in STAGES and words[1] != "align_mask.py"
        assert values(words, "--parallel") == ["4"] * trains
    alone = [[word for word in words if word not in ("--parallel", "4")] for words in rest]
    assert alone == one[8:]


def test_networks_go_side_by_side_by_themselves_on_a_cpu_alone(tmp_path):
    def parallel(preset="quick", **settings):
        settings = {"CUDA_VISIBLE_DEVICES": None, "PATH": path, "PAIRS": "0"} | settings
        return any("--parallel" in words for words in dry(preset, **settings))

    path = command(tmp_path, "nvidia-smi", "printf 'No devices were found\\n\\n'; exit 6")
    assert parallel() and parallel("cifar10") and not parallel("imagenet")
    command(tmp_path, "nvidia-smi", "echo 0")
    assert not parallel() and parallel(PARALLEL="auto")
    assert parallel(CUDA_VISIBLE_DEVICES="") and parallel(CUDA_VISIBLE_DEVICES="-1")


def launched(folder, script, preset, **settings):
    """The words that a shell script in the place of python3 prints, a list a command."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    path = command(folder, "python3", f'[ "$1" = -c ] || {{ {script}; }} >> {log}')
    usual = {"PATH": path, "WIDTHS": "1", "PAIRS": "0", "OUT": str(folder / "runs")}
    done = run_all(preset, **usual | settings)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in log.read_text().splitlines()]


@pytest.mark.parametrize("cores, share", [(2, 1), (3, 1), (4, 2), (7, 3)])
def test_the_commands_of_the_grid_share_the_cores(tmp_path, cores, share):
    command(tmp_path, "getconf", f"echo {cores}")
    run = partial(launched, tmp_path, 'echo "$*" threads=$OMP_NUM_THREADS', "quick")
    lines, asked = run(), run(PARALLEL="5")
    ends = [line[-3:] for line in lines if "train_" in line[0]]
    assert ends[0] == ["--parallel", "auto", "threads="]  # the dense networks
    assert ends[1:] == 3 * [["--parallel", f"{share}", f"threads={share}"]]  # of two runs each
    ends = [line[-3:] for line in asked if "_sparse" in line[0]]
    assert ends == 3 * [["--parallel", "5", "threads="]]


def test_each_of_several_gpus_has_a_command_of_its_own(tmp_path):
    command(tmp_path, "nvidia-smi", "printf '0\\n1\\n2\\n'")

    def used(**settings):
        settings = {"CUDA_VISIBLE_DEVICES": None, "METHODS": "", "PAIRS": "0 1 2"} | settings
        script = 'echo "$1 ${CUDA_VISIBLE_DEVICES-all}"; [ $1 != train_dense.py ] || sleep 0.3'
        lines = launched(tmp_path, script, "cifar10", **settings)
        return [line[1] for line in lines if line[0] == "train_dense.py"]

    assert sorted(used()) == list("001122")
    assert set(used(CUDA_VISIBLE_DEVICES="GPU-5, 7,")) == {"GPU-5", "7"}
    assert set(used(CUDA_VISIBLE_DEVICES="7", PAIRS="0")) == {"7"}
    assert sorted(used(PARALLEL="auto")) == list("012")
    settings = {"CUDA_VISIBLE_DEVICES": "0,1,2", "PARALLEL": "auto", "PAIRS": "0 1 2 3"}
    seeds = [values(words, "--seed") for words in dry("svhn", "train_dense", **settings)]
    assert sorted(seeds) == [["0", "6"], ["1", "7"], ["2"], ["3"], ["4"], ["5"]]
    chains = [values(words, "--dense") for words in dry("svhn", "prune_imp", **settings)]
    assert [len(folders) for folders in chains] == [2, 1, 1] and chains[0][1].endswith("seed6")


def test_gpus_that_share_a_network_are_started_by_torchrun():
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    usual, shared = dry("imagenet", **gpus), dry("imagenet", SPREAD="4", **gpus)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 4".split()
    for before, now in zip(usual, shared, strict=True):
        alone = before[1] in ("align_mask.py", "-m")
        assert now == (before if alone else [before[0], *launch, *before[1:]])
    assert "--parallel" not in str(dry("quick", SPREAD="2"))


WRONG = {
    "PAIRS": ["0,1", "a", "08", "*", " "],
    "WIDTHS": ["", "1 0"],
    "SPARSITY": ["0.8 1.5", ""],
    "REWIND": ["-1"],
    "METHODS": ["weight activaton", "activation@", "activation@2x", "random", "identity@5"],
    "CONTROLS": ["signs shuffle"],
    "ENSEMBLE": ["1", "five"],
    "TAG": ["a/b", "imp"],
    "DATASET": [""],
    "OUT": ["it's"],
    "PARALLEL": ["x", "0"],
    "SPREAD": ["two", "0"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_that_makes_no_sense_is_refused_in_one_line(name):
    for value in WRONG[name]:
        done = run_all("quick", DRY_RUN="1", **{name: value})
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert f"error: {name}='{value.strip()}'" in done.stderr


@pytest.mark.parametrize("words", ["cifar11", "q.*", "quick DRY_RUN=1", "status cifar10 x"])
def test_unknown_presets_and_words_are_refused(words):
    done = run_all(*words.split(), DRY_RUN="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"'{words.split()[-1]}'" in done.stderr
    done = run_all("quick", SPREAD="2", PARALLEL="auto")  # exclude each other
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "PARALLEL" in done.stderr


def test_help_and_the_line_before_a_run_show_every_setting():
    settings = {"TAG": "mine", "PAIRS": "3  1 3", "DENSE_FLAGS": "--lr  1"}
    shown = run_all("--help", "vgg11", **settings).stdout
    line = run_all("vgg11", DRY_RUN="1", **settings).stderr
    assert line.count("\n") == 1 and "bash run_all.sh status" in shown
    expected = {"TAG": "mine", "PAIRS": "3 1", "DENSE_FLAGS": "--lr 1", "MODEL": "vgg11"}
    for name, value in (expected | {"OUT": "runs/vgg11", "IMP_FLAGS": ""}).items():
        assert f"{name}='{value}'" in line and f"  {name:<20}'{value}'" in shown


def test_a_stage_that_fails_stops_the_experiment(tmp_path):
    done = run_all("quick", PAIRS="0", OUT=str(tmp_path), DENSE_FLAGS="--epochs 0")
    assert done.returncode != 0 and "--epochs" in done.stderr
    assert "prune_imp" not in done.stderr and "done in" not in done.stdout


def finish(folder, seconds, ended, **arguments):
    """A run of so many seconds that ended at that time."""
    folder.mkdir(parents=True)
    path = folder / "result.json"
    path.write_text(json.dumps({"seconds": seconds, "arguments": arguments}))
    os.utime(path, (ended, ended))


def told(root, **settings):
    grid = {"PAIRS": "0", "WIDTHS": "1", "REWIND": "0 4", "SPARSITY": "0.5 0.9", "METHODS": ""}
    done = run_all("status", "cifar10", OUT=str(root), **(grid | settings))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_status_tells_what_has_run_and_how_long_the_rest_will_take(tmp_path):
    nothing = [
        "dense   0 of 2",
        "imp     0 of 1",
        "align   0 of 0",
        "sparse  0 of 8",
        "runs done 0 of 11",
    ]
    assert told(tmp_path) == nothing
    w1 = tmp_path / "w1"
    finish(w1 / "dense/seed0", 1000, 1000, epochs=10)
    # 10 epochs, a chain of 10 + 2 rounds of 2.5, and two arms of 2 (10 + 6) epochs, 100 s each.
    assert told(tmp_path) == [
        "dense   1 of 2, 17 min left",
        "imp     0 of 1, 50 min left",
        "align   0 of 0",
        "sparse  0 of 8, 1 h 47 min left",
        "runs done 1 of 11, 2 h 53 min left",
    ]
    finish(w1 / "dense/seed1", 1000, 1000, epochs=10)  # at the same time as the other
    assert told(tmp_path)[3] == "sparse  0 of 8, 53 min left"
    finish(w1 / "imp/seed0", 600, 2000)
    assert told(tmp_path)[1] == "imp     0 of 1, 25 min left"  # a sparsity is missing
    for name in ("mask_0.50.pt", "mask_0.90.pt"):
        (w1 / "imp/seed0" / name).touch()
    assert told(tmp_path)[1] == "imp     1 of 1"
    finish(w1 / "sparse/lth/seed0-seed0/s0.50_k004", 60, 3000)  # 10 s an epoch, one by one
    assert told(tmp_path)[3:] == ["sparse  1 of 8, 10 min left", "runs done 4 of 11, 10 min left"]
    lines = told(tmp_path, WIDTHS="1 4")  # of which nothing tells the pace
    assert lines[-1] == "runs done 4 of 22, at least 10 min left"
    assert told(tmp_path, TAG="x")[-1] == "runs done 2 of 11, 1 h 18 min left"


def test_status_counts_alignments_by_their_masks_and_refuses_other_input(tmp_path):
    w1 = tmp_path / "w1"
    (w1 / "imp/seed0").mkdir(parents=True)
    (w1 / "imp/seed0/mask_0.50.pt").touch()
    finish(w1 / "align/weight/seed0-seed1", 5, 100)
    assert told(tmp_path, METHODS="weight")[2] == "align   0 of 1"
    (w1 / "align/weight/seed0-seed1/mask_0.50.pt").touch()
    assert told(tmp_path, METHODS="weight")[2] == "align   0 of 1"  # 0.9 is to be pruned yet
    (w1 / "align/weight/seed0-seed1/mask_0.90.pt").touch()
    assert told(tmp_path, METHODS="weight")[2] == "align   1 of 1"
    module = [sys.executable, "-m", "analyze.status"]
    for line in ("make all", "prune_imp.py --dense a --out b --sparsity 1", "train_dense.py 'x"):
        done = subprocess.run(module, cwd=ROOT, input=line, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_status_writes_durations_for_people():
    written = [status.duration(seconds) for seconds in (0.4, 59, 60, 3570, 7800)]
    assert written == ["0 s", "59 s", "1 min", "1 h 0 min", "2 h 10 min"]
