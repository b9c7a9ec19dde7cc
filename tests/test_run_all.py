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
from common import paths
from tests.conftest import ROOT, Outcome, call, refuse, refused

STAGES = ("train_dense.py", "prune_imp.py", "align_mask.py", "train_sparse.py")


def run_all(*arguments, **environment):
    """Run the script without GPUs; with CUDA_VISIBLE_DEVICES=None, with those of nvidia-smi."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    defaults = {"PATH": path, "HOME": os.environ.get("HOME", ""), "CUDA_VISIBLE_DEVICES": ""}
    environment = defaults | environment
    environment = {key: value for key, value in environment.items() if value is not None}
    command = ["bash", str(ROOT / "run_all.sh"), *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    return Outcome(process.returncode, process.stdout, process.stderr)


def dry_run(preset, **settings):
    """The words of each command that a preset would run."""
    outcome = run_all(preset, DRY_RUN="1", **settings)
    assert outcome.code == 0, outcome.err
    return [shlex.split(line) for line in outcome.out.splitlines()]


def parse_settings(text):
    """A dict of shell assignments "NAME=value ..."."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def parse_flags(words):
    """The values of each flag of a command, or the flag itself; "": the words before all flags."""
    script, *flags = " ".join(words[1:]).split(" --")
    values_by_flag = {"": script}
    for flag, _, values in (text.partition(" ") for text in flags):
        values_by_flag[f"--{flag}"] = values or f"--{flag}"
    return values_by_flag


def fake_command(folder, name, script):
    """Write a shell script that replaces a command; return the PATH that finds it first."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


_, *CASES = (ROOT / "tests/commands.txt").read_text().strip().split("\n\n")


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_prints_the_commands_in_order(case):
    _, call, flags, *expected = case.splitlines()
    preset, _, settings = call.partition(" ")
    lines = []
    for values in map(parse_flags, dry_run(preset, **{"OUT": "R"} | parse_settings(settings))):
        words = " ".join(values[flag] for flag in ("", *flags.split()) if flag in values).split(" ")
        lines.append(" ".join(word.removeprefix("R/w1/").removesuffix(".py") for word in words))
    assert lines == expected


def test_the_first_order_of_an_ensemble_stays_where_it_is(tmp_path):
    """Earlier versions trained it in a folder of its own."""
    folder = tmp_path / "w1/sparse/lth/seed0-seed0"
    for name in ("", "/order0"):
        commands = dry_run("quick", ENSEMBLE="2", OUT=str(tmp_path))
        outs = [parse_flags(words)["--out"] for words in commands if "--arm lth" in " ".join(words)]
        assert outs == [f"{folder}{name}", f"{folder}/order1"]
        (folder / "order0").mkdir(parents=True, exist_ok=True)


PRESETS = (
    "quick glyphs mlp",
    "cifar100 cifar100 resnet20",
    "vgg11 cifar10 vgg11",
    "svhn svhn resnet20",
    "imagenet imagenet resnet50",
)


@pytest.mark.parametrize("preset, dataset, model", [row.split() for row in PRESETS])
def test_the_stages_accept_all_flags_of_a_preset(tmp_path, preset, dataset, model):
    commands = dry_run(preset, OUT=str(tmp_path), TAG="mine", WIDTHS="1", PAIRS="0")
    assert any(f"--dataset {dataset} --model {model} " in " ".join(words) for words in commands)
    for words in commands:
        if words[1] in STAGES:  # after parsing the flags, the stages fail for lack of files
            outcome = call(words[1][:-3], *words[2:], "--device", "nowhere")
            assert outcome.code == 2, outcome.err
            assert "nowhere" in outcome.err or "not a dense run" in outcome.err


def test_a_dry_run_names_the_interpreter_that_has_the_packages(tmp_path):
    assert dry_run("quick")[0][0] == "python3"
    path = fake_command(tmp_path, "python3", "exit 1")
    assert dry_run("quick", PATH=path)[0][0] == ".venv/bin/python"


def test_the_tests_run_in_two_halves_and_fail_if_either_fails(tmp_path):
    halves = dry_run("test")
    assert {tuple(words[:5]) for words in halves} == {("python3", "-m", "pytest", "-q", "tests")}
    for file in (ROOT / "tests").glob("test_*.py"):
        ignored = [fnmatch(file, words[5].removeprefix("--ignore-glob=")) for words in halves]
        assert sorted(ignored) == [False, True]
    for failing in ("nothing", "*!a-o*", "*[[]a-o*"):
        script = f'echo "ran $*"; case "$*" in {failing}) exit 1; esac'
        outcome = run_all("test", PATH=fake_command(tmp_path, "python3", script))
        assert outcome.out.count("ran -m") == 2 and bool(outcome.code) == (failing != "nothing")


def test_networks_train_in_parallel_by_default_only_on_a_cpu(tmp_path):
    def parallel(preset="quick", **settings):
        settings = {"CUDA_VISIBLE_DEVICES": None, "PATH": path, "PAIRS": "0"} | settings
        return any("--parallel" in words for words in dry_run(preset, **settings))

    path = fake_command(tmp_path, "nvidia-smi", "printf 'No devices were found\\n\\n'; exit 6")
    assert parallel() and parallel("cifar10") and not parallel("imagenet")
    fake_command(tmp_path, "nvidia-smi", "echo 'GPU 0: H100'")
    assert not parallel() and parallel(PARALLEL="auto")
    assert parallel(CUDA_VISIBLE_DEVICES="") and parallel(CUDA_VISIBLE_DEVICES="-1")


def launched(folder, script, preset, fails=False, **settings):
    """Run a preset with a shell script as python3; the words of each line that this prints."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    path = fake_command(folder, "python3", f'[ "$1" = -c ] || {{ {script}; }} >> {log}')
    defaults = {"PATH": path, "WIDTHS": "1", "PAIRS": "0", "OUT": str(folder / "runs")}
    outcome = run_all(preset, **defaults | settings)
    assert bool(outcome.code) == fails, outcome.err
    return [line.split() for line in log.read_text().splitlines()]


@pytest.mark.parametrize("cores, share", [(2, 1), (3, 1), (4, 2), (7, 3)])
def test_the_commands_of_stage_4_share_the_cores(tmp_path, cores, share):
    def threads(**settings):
        lines = launched(tmp_path, 'echo "$*" threads=$OMP_NUM_THREADS', "quick", **settings)
        return [line[-3:] for line in lines if line[0].startswith("train_")]

    fake_command(tmp_path, "getconf", f"echo {cores}")
    dense, *sparse = threads()
    assert dense == ["--parallel", "auto", "threads="]
    assert sparse == 3 * [["--parallel", f"{share}", f"threads={share}"]]
    assert threads(PARALLEL="5")[1:] == 3 * [["--parallel", "5", "threads="]]


def test_each_gpu_runs_its_own_commands(tmp_path):
    fake_command(tmp_path, "nvidia-smi", "printf 'GPU %s: H100\\n' 0 1 2")

    def gpus_of_commands(**settings):
        settings = {"CUDA_VISIBLE_DEVICES": None, "METHODS": "", "PAIRS": "0 1 2"} | settings
        script = '[ $1 != train_dense.py ] || { echo "$CUDA_VISIBLE_DEVICES"; sleep 0.3; }'
        return sum(launched(tmp_path, script, "cifar10", **settings), [])

    assert sorted(gpus_of_commands()) == list("001122")
    assert set(gpus_of_commands(CUDA_VISIBLE_DEVICES="GPU-5, 7,")) == {"GPU-5", "7"}
    assert set(gpus_of_commands(CUDA_VISIBLE_DEVICES="7", PAIRS="0")) == {"7"}
    assert sorted(gpus_of_commands(PARALLEL="auto")) == list("012")


INVALID = """
    PAIRS=0,1 PAIRS=a PAIRS=08 PAIRS=* PAIRS=' ' WIDTHS= 'WIDTHS=1 0' 'SPARSITY=0.8 1.5' SPARSITY=
    'WIDTHS=1 1.0' WIDTHS=.5 'SPARSITY=0.9 0.90'
    REWIND=-1 'METHODS=weight activaton' METHODS=activation@ METHODS=activation@2x METHODS=random
    METHODS="it's" METHODS=identity@5 'CONTROLS=signs shuffle' ENSEMBLE=1 ENSEMBLE=five TAG=a/b
    TAG=imp DATASET= OUT="it's" PARALLEL=x PARALLEL=0 SPREAD=two SPREAD=0
"""


@pytest.mark.parametrize("setting", shlex.split(INVALID))
def test_an_invalid_setting_is_refused(setting):
    name, value = setting.split("=")
    refused(run_all("quick", DRY_RUN="1", **{name: value}), f"error: {name}='{value.strip()}'")


def test_unknown_presets_and_arguments_are_refused():
    for arguments in ("cifar11", "q.*", "quick DRY_RUN=1", "status cifar10 x"):
        refused(run_all(*arguments.split(), DRY_RUN="1"), f"'{arguments.split()[-1]}'")
    settings = parse_settings("DRY_RUN=1 SPREAD=2 PARALLEL=auto")
    refused(run_all("quick", **settings), "SPREAD='2' excludes PARALLEL='auto'")
    for name, setting in (("PAIR", "PAIRS"), ("REWINDS", "REWIND"), ("SPARSITIES", "SPARSITY")):
        refused(run_all("quick", **{name: "0"}), f"{name}='0': the setting is called {setting}")
    refused(run_all("quick", ENSEMBLE="2", PAIRS="0"), "ENSEMBLE='2' has its own seeds")
    refused(run_all("status", "test"), "the tests have no status")


def test_help_and_the_first_line_show_every_setting():
    settings = parse_settings("TAG=mine PAIRS='3  1 3' DENSE_FLAGS='--lr  1'")
    help_text = run_all("--help", "vgg11", **settings).out
    line = run_all("vgg11", DRY_RUN="1", **settings).err
    assert line.count("\n") == 1 and "bash run_all.sh status" in help_text
    expected = "TAG=mine PAIRS='3 1' DENSE_FLAGS='--lr 1' MODEL=vgg11 OUT=runs/vgg11"
    for name, value in parse_settings(expected).items():
        assert f"{name}='{value}'" in line and f"  {name:<20}'{value}'" in help_text
    assert "IMP_FLAGS" in help_text and "IMP_FLAGS" not in line  # empty


def test_a_stage_that_fails_stops_the_experiment(tmp_path):
    script = 'echo "$1"; [ $1 != train_dense.py ]'
    assert launched(tmp_path, script, "quick", fails=True) == [[STAGES[0]]]


def test_the_script_may_be_edited_while_it_runs(tmp_path):
    """Bash reads a script while it runs, so the main loop must be read completely first."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    edit = 'text=$(cat run_all.sh); printf "#\\"%300s\\n%s\\n" "" "$text" > run_all.sh'
    path = fake_command(tmp_path, "python3", f'case "$*" in *analyze.results*) {edit} ;; esac')
    settings = os.environ | {"PATH": path, "PAIRS": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", tmp_path / "run_all.sh"]
    process = subprocess.run(command, env=settings, capture_output=True)
    assert b"done in" in process.stdout and process.returncode == 0, process.stderr


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_a_second_run_with_the_same_out_is_refused(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = run_all(OUT=str(tmp_path))
    assert outcome.code == 2 and "is in use by another run_all.sh" in outcome.err.splitlines()[-1]


def finish(folder, seconds, ended, **arguments):
    """Write the result.json of a run that took `seconds` and ended at the time `ended`."""
    folder.mkdir(parents=True)
    path = folder / "result.json"
    path.write_text(json.dumps({"seconds": seconds, "arguments": arguments}))
    os.utime(path, (ended, ended))


def save_epochs(folder, *epochs):
    for epoch in epochs:
        paths.epoch_file(folder, epoch).touch()


def status_of(root, **settings):
    defaults = parse_settings("PAIRS=0 WIDTHS=1 REWIND='0 4' SPARSITY='0.5 0.9' METHODS=")
    outcome = run_all("status", "cifar10", OUT=str(root), **(defaults | settings))
    assert outcome.code == 0, outcome.err
    return outcome.out


NOTHING = """\
dense   0 of 2
imp     0 of 1
align   0 of 0
sparse  0 of 8
runs done 0 of 11
"""
# At 100 s an epoch: 10 epochs, IMP of 10 + 2 rounds of 50, and two arms of 2 (10 + 6) epochs.
ONE_NETWORK = """\
dense   1 of 2, 17 min left
imp     0 of 1, 16 h 40 min left
align   0 of 0
sparse  0 of 8, 1 h 47 min left
runs done 1 of 11, 18 h 43 min left
"""


def test_status_shows_what_has_run_and_estimates_the_remaining_time(tmp_path):
    w1 = tmp_path / "w1"
    assert status_of(tmp_path) == NOTHING
    finish(w1 / "dense/seed0", 1000, 1000, epochs=10)
    assert status_of(tmp_path).startswith("dense   0 of 2")  # weights to rewind to are missing
    save_epochs(w1 / "dense/seed0", 0, 4)
    assert status_of(tmp_path) == ONE_NETWORK
    finish(w1 / "dense/seed1", 1000, 1000, epochs=10)  # at the same time as the other
    save_epochs(w1 / "dense/seed1", 0, 4)
    assert "sparse  0 of 8, 53 min left\n" in status_of(tmp_path)
    finish(w1 / "imp/seed0", 600, 2000)
    assert "imp     0 of 1, 8 h 20 min left\n" in status_of(tmp_path)  # a sparsity is missing
    for name in ("mask_0.50.pt", "mask_0.90.pt"):
        (w1 / "imp/seed0" / name).touch()
    assert "imp     1 of 1\n" in status_of(tmp_path)
    finish(w1 / "sparse/lth/seed0-seed0/s0.50_k004", 60, 3000)  # 10 s an epoch, sequentially
    sparse = "sparse  1 of 8, 10 min left\nruns done 4 of 11, 10 min left\n"
    assert status_of(tmp_path).endswith(sparse)
    wide = status_of(tmp_path, WIDTHS="1 4")  # no run has timed width 4
    assert "runs done 4 of 22, at least 10 min left" in wide
    assert "runs done 2 of 11, 9 h 13 min left" in status_of(tmp_path, TAG="x")


def test_status_counts_alignments_by_their_masks(tmp_path):
    aligned, masks = (tmp_path / "w1" / part for part in ("align/weight/seed0-seed1", "imp/seed0"))
    masks.mkdir(parents=True)
    (masks / "mask_0.50.pt").touch()
    finish(aligned, 5, 100)
    # The alignment at 0.9 counts as missing before its mask exists.
    for name, done in (("result.json", 0), ("mask_0.50.pt", 0), ("mask_0.90.pt", 1)):
        (aligned / name).touch()
        assert f"align   {done} of 1\n" in status_of(tmp_path, METHODS="weight")


@pytest.mark.parametrize(
    "line", ("make all", "prune_imp.py --dense a --out b --sparsity 1", "train_dense.py 'x")
)
def test_status_refuses_other_input(monkeypatch, line):
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    refuse(["analyze.status"])


def test_status_formats_durations():
    texts = [status.duration(seconds) for seconds in (0.4, 59, 60, 3570, 7800)]
    assert texts == ["0 s", "59 s", "1 min", "1 h 0 min", "2 h 10 min"]
