import fcntl
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from analyze import status
from tests.conftest import ROOT, Outcome, call, refuse, refused

STAGES = ("train_dense.py", "prune_imp.py", "align_mask.py", "train_sparse.py")


def run_all(*arguments, **environment):
    """The script without GPUs, unless CUDA_VISIBLE_DEVICES is None: then nvidia-smi's."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    usual = {"PATH": path, "HOME": os.environ.get("HOME", ""), "CUDA_VISIBLE_DEVICES": ""}
    settings = {key: value for key, value in (usual | environment).items() if value is not None}
    command = ["bash", str(ROOT / "run_all.sh"), *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def dry(preset, **settings):
    """The words of the commands that a preset would run."""
    done = run_all(preset, DRY_RUN="1", **settings)
    assert done.code == 0, done.err
    return [shlex.split(line) for line in done.out.splitlines()]


def assigned(text):
    """Settings as a shell has them: NAME=value ..."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def by_flag(words):
    """What stands after each flag of a command; of a flag alone, itself; "": what stands before."""
    first, *flags = " ".join(words[1:]).split(" --")
    found = {"": first}
    for flag, _, values in (text.partition(" ") for text in flags):
        found[f"--{flag}"] = values or f"--{flag}"
    return found


def command(folder, name, script):
    """A command that stands in for another; returns the PATH on which it is found first."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


_, *CASES = (ROOT / "tests/commands.txt").read_text().strip().split("\n\n")


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_prints_the_commands_in_order(case):
    _, asked, flags, *expected = case.splitlines()
    preset, _, settings = asked.partition(" ")
    found = []
    for words in map(by_flag, dry(preset, **{"OUT": "R"} | assigned(settings))):
        shown = " ".join(words[flag] for flag in ("", *flags.split()) if flag in words).split(" ")
        found.append(" ".join(word.removeprefix("R/w1/").removesuffix(".py") for word in shown))
    assert found == expected


PRESETS = (
    "quick glyphs mlp",
    "cifar100 cifar100 resnet20",
    "vgg11 cifar10 vgg11",
    "svhn svhn resnet20",
    "imagenet imagenet resnet50",
)


@pytest.mark.parametrize("preset, dataset, model", [row.split() for row in PRESETS])
def test_the_stages_accept_the_commands_of_a_preset(tmp_path, preset, dataset, model):
    commands = dry(preset, OUT=str(tmp_path), TAG="mine", WIDTHS="1", PAIRS="0")
    assert any(f"--dataset {dataset} --model {model} " in " ".join(words) for words in commands)
    for words in commands:
        if words[1] in STAGES:  # every flag is known: the stages get as far as the missing files
            outcome = call(words[1][:-3], *words[2:], "--device", "nowhere")
            assert outcome.code == 2, outcome.err
            assert "nowhere" in outcome.err or "not a dense run" in outcome.err


def test_a_dry_run_names_the_interpreter_that_has_the_packages(tmp_path):
    assert dry("quick")[0][0] == "python3"
    path = command(tmp_path, "python3", "exit 1")
    assert dry("quick", PATH=path)[0][0] == ".venv/bin/python"


def test_the_tests_run_in_two_halves_and_fail_with_either(tmp_path):
    halves = dry("test")
    assert {tuple(words[:5]) for words in halves} == {("python3", "-m", "pytest", "-q", "tests")}
    for file in (ROOT / "tests").glob("test_*.py"):
        ignored = [fnmatch(file, words[5].removeprefix("--ignore-glob=")) for words in halves]
        assert sorted(ignored) == [False, True]
    for failing in ("nothing", "*!a-o*", "*[[]a-o*"):
        script = f'echo "ran $*"; case "$*" in {failing}) exit 1; esac'
        done = run_all("test", PATH=command(tmp_path, "python3", script))
        assert done.out.count("ran -m") == 2 and bool(done.code) == (failing != "nothing")


def test_networks_go_side_by_side_by_themselves_on_a_cpu_alone(tmp_path):
    def parallel(preset="quick", **settings):
        settings = {"CUDA_VISIBLE_DEVICES": None, "PATH": path, "PAIRS": "0"} | settings
        return any("--parallel" in words for words in dry(preset, **settings))

    path = command(tmp_path, "nvidia-smi", "printf 'No devices were found\\n\\n'; exit 6")
    assert parallel() and parallel("cifar10") and not parallel("imagenet")
    command(tmp_path, "nvidia-smi", "echo 'GPU 0: H100'")
    assert not parallel() and parallel(PARALLEL="auto")
    assert parallel(CUDA_VISIBLE_DEVICES="") and parallel(CUDA_VISIBLE_DEVICES="-1")


def launched(folder, script, preset, fails=False, **settings):
    """The words that a shell script in the place of python3 prints, a list a command."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    path = command(folder, "python3", f'[ "$1" = -c ] || {{ {script}; }} >> {log}')
    usual = {"PATH": path, "WIDTHS": "1", "PAIRS": "0", "OUT": str(folder / "runs")}
    done = run_all(preset, **usual | settings)
    assert bool(done.code) == fails, done.err
    return [line.split() for line in log.read_text().splitlines()]


@pytest.mark.parametrize("cores, share", [(2, 1), (3, 1), (4, 2), (7, 3)])
def test_the_commands_of_the_grid_share_the_cores(tmp_path, cores, share):
    def shares(**settings):
        lines = launched(tmp_path, 'echo "$*" threads=$OMP_NUM_THREADS', "quick", **settings)
        return [line[-3:] for line in lines if line[0].startswith("train_")]

    command(tmp_path, "getconf", f"echo {cores}")
    dense, *grid = shares()
    assert dense == ["--parallel", "auto", "threads="]
    assert grid == 3 * [["--parallel", f"{share}", f"threads={share}"]]  # of two runs each
    assert shares(PARALLEL="5")[1:] == 3 * [["--parallel", "5", "threads="]]


def test_each_of_several_gpus_has_a_command_of_its_own(tmp_path):
    command(tmp_path, "nvidia-smi", "printf 'GPU %s: H100\\n' 0 1 2")

    def used(**settings):
        settings = {"CUDA_VISIBLE_DEVICES": None, "METHODS": "", "PAIRS": "0 1 2"} | settings
        script = '[ $1 != train_dense.py ] || { echo "$CUDA_VISIBLE_DEVICES"; sleep 0.3; }'
        return sum(launched(tmp_path, script, "cifar10", **settings), [])

    assert sorted(used()) == list("001122")
    assert set(used(CUDA_VISIBLE_DEVICES="GPU-5, 7,")) == {"GPU-5", "7"}
    assert set(used(CUDA_VISIBLE_DEVICES="7", PAIRS="0")) == {"7"}
    assert sorted(used(PARALLEL="auto")) == list("012")


WRONG = """
    PAIRS=0,1 PAIRS=a PAIRS=08 PAIRS=* PAIRS=' ' WIDTHS= 'WIDTHS=1 0' 'SPARSITY=0.8 1.5' SPARSITY=
    'WIDTHS=1 1.0' WIDTHS=.5 'SPARSITY=0.9 0.90'
    REWIND=-1 'METHODS=weight activaton' METHODS=activation@ METHODS=activation@2x METHODS=random
    METHODS="it's" METHODS=identity@5 'CONTROLS=signs shuffle' ENSEMBLE=1 ENSEMBLE=five TAG=a/b
    TAG=imp DATASET= OUT="it's" PARALLEL=x PARALLEL=0 SPREAD=two SPREAD=0
"""


@pytest.mark.parametrize("setting", shlex.split(WRONG))
def test_a_setting_that_makes_no_sense_is_refused_in_one_line(setting):
    name, value = setting.split("=")
    refused(run_all("quick", DRY_RUN="1", **{name: value}), f"error: {name}='{value.strip()}'")


def test_unknown_presets_and_words_are_refused():
    for words in ("cifar11", "q.*", "quick DRY_RUN=1", "status cifar10 x"):
        refused(run_all(*words.split(), DRY_RUN="1"), f"'{words.split()[-1]}'")
    settings = assigned("DRY_RUN=1 SPREAD=2 PARALLEL=auto")
    refused(run_all("quick", **settings), "SPREAD='2' excludes PARALLEL='auto'")
    refused(run_all("quick", PAIR="0", DRY_RUN="1"), "PAIR='0': the setting is called PAIRS")
    refused(run_all("status", "test"), "the tests have no status")


def test_help_and_the_line_before_a_run_show_every_setting():
    settings = assigned("TAG=mine PAIRS='3  1 3' DENSE_FLAGS='--lr  1'")
    shown = run_all("--help", "vgg11", **settings).out
    line = run_all("vgg11", DRY_RUN="1", **settings).err
    assert line.count("\n") == 1 and "bash run_all.sh status" in shown
    used = "TAG=mine PAIRS='3 1' DENSE_FLAGS='--lr 1' MODEL=vgg11 OUT=runs/vgg11"
    for name, value in assigned(used).items():
        assert f"{name}='{value}'" in line and f"  {name:<20}'{value}'" in shown
    assert "IMP_FLAGS" in shown and "IMP_FLAGS" not in line  # nothing is set there


def test_a_stage_that_fails_stops_the_experiment(tmp_path):
    script = 'echo "$1"; [ $1 != train_dense.py ]'
    assert launched(tmp_path, script, "quick", fails=True) == [[STAGES[0]]]


def test_the_script_may_be_edited_while_it_runs(tmp_path):
    """Bash reads a script on as it goes: what runs for days is read as a whole first."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    edit = 'text=$(cat run_all.sh); printf "#\\"%300s\\n%s\\n" "" "$text" > run_all.sh'
    path = command(tmp_path, "python3", f'case "$*" in *analyze.results*) {edit} ;; esac')
    settings = os.environ | {"PATH": path, "PAIRS": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", tmp_path / "run_all.sh"], env=settings, capture_output=True)
    assert b"done in" in done.stdout and done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_a_second_call_leaves_the_first_alone(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = run_all(OUT=str(tmp_path))
    assert outcome.code == 2 and "is in work by another call" in outcome.err.splitlines()[-1]


def finish(folder, seconds, ended, **arguments):
    """A run of so many seconds that ended at that time."""
    folder.mkdir(parents=True)
    path = folder / "result.json"
    path.write_text(json.dumps({"seconds": seconds, "arguments": arguments}))
    os.utime(path, (ended, ended))


def told(root, **settings):
    grid = assigned("PAIRS=0 WIDTHS=1 REWIND='0 4' SPARSITY='0.5 0.9' METHODS=")
    done = run_all("status", "cifar10", OUT=str(root), **(grid | settings))
    assert done.code == 0, done.err
    return done.out


NOTHING = """\
dense   0 of 2
imp     0 of 1
align   0 of 0
sparse  0 of 8
runs done 0 of 11
"""
# 10 epochs, a chain of 10 + 2 rounds of 50, and two arms of 2 (10 + 6) epochs, 100 s each.
ONE_NETWORK = """\
dense   1 of 2, 17 min left
imp     0 of 1, 16 h 40 min left
align   0 of 0
sparse  0 of 8, 1 h 47 min left
runs done 1 of 11, 18 h 43 min left
"""


def test_status_tells_what_has_run_and_how_long_the_rest_will_take(tmp_path):
    w1 = tmp_path / "w1"
    assert told(tmp_path) == NOTHING
    finish(w1 / "dense/seed0", 1000, 1000, epochs=10)
    assert told(tmp_path) == ONE_NETWORK
    finish(w1 / "dense/seed1", 1000, 1000, epochs=10)  # at the same time as the other
    assert "sparse  0 of 8, 53 min left\n" in told(tmp_path)
    finish(w1 / "imp/seed0", 600, 2000)
    assert "imp     0 of 1, 8 h 20 min left\n" in told(tmp_path)  # a sparsity is missing
    for name in ("mask_0.50.pt", "mask_0.90.pt"):
        (w1 / "imp/seed0" / name).touch()
    assert "imp     1 of 1\n" in told(tmp_path)
    finish(w1 / "sparse/lth/seed0-seed0/s0.50_k004", 60, 3000)  # 10 s an epoch, one by one
    sparse = "sparse  1 of 8, 10 min left\nruns done 4 of 11, 10 min left\n"
    assert told(tmp_path).endswith(sparse)
    wide = told(tmp_path, WIDTHS="1 4")  # of which nothing tells the pace
    assert "runs done 4 of 22, at least 10 min left" in wide
    assert "runs done 2 of 11, 9 h 13 min left" in told(tmp_path, TAG="x")


def test_status_counts_alignments_by_their_masks(tmp_path):
    aligned, masks = (tmp_path / "w1" / part for part in ("align/weight/seed0-seed1", "imp/seed0"))
    masks.mkdir(parents=True)
    (masks / "mask_0.50.pt").touch()
    finish(aligned, 5, 100)
    # While the mask of 0.9 is to be pruned yet, its alignment is no less missing.
    for name, done in (("result.json", 0), ("mask_0.50.pt", 0), ("mask_0.90.pt", 1)):
        (aligned / name).touch()
        assert f"align   {done} of 1\n" in told(tmp_path, METHODS="weight")


@pytest.mark.parametrize(
    "line", ("make all", "prune_imp.py --dense a --out b --sparsity 1", "train_dense.py 'x")
)
def test_status_refuses_other_input(monkeypatch, line):
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    refuse(["analyze.status"])


def test_status_writes_durations_for_people():
    written = [status.duration(seconds) for seconds in (0.4, 59, 60, 3570, 7800)]
    assert written == ["0 s", "59 s", "1 min", "1 h 0 min", "2 h 10 min"]
