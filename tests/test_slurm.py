"""LAUNCH=slurm of run_all.sh, with stand-ins for SLURM's commands, and with SLURM where it runs."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.test_run_all import assigned, by_flag, command, dry, run_all

SETTINGS = assigned("LAUNCH=slurm PAIRS=0 SPARSITY='0.5 0.8' SBATCH=--gres=gpu:1")
NAMES = ["train_dense", "prune_imp", "align_mask", "train_sparse", "analyze.results"]
NAMES += ["analyze.report"]


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins: sbatch does its tasks at once, python3 notes its arguments instead of training."""
    script = 'case "$*" in -c*) ;; *analyze.status*) exec {} "$@" ;; *) echo "$*" >> {} ;; esac'
    command(tmp_path, "python3", script.format(sys.executable, tmp_path / "log"))
    command(tmp_path, "squeue", f"cat {tmp_path}/queue 2> /dev/null || :")
    tasks = 'for i in $(seq "$count"); do SLURM_ARRAY_TASK_ID=$i bash "$0.script"; done'
    count = 'count=$(echo "$*" | sed "s/.*--array=1-\\([0-9]*\\).*/\\1/")'
    lines = f'cat > "$0.script"; echo "$*" >> {tmp_path}/jobs; {count}; {tasks}'
    path = command(tmp_path, "sbatch", f"{lines}; wc -l < {tmp_path}/jobs")
    return SETTINGS | {"PATH": path, "OUT": str(tmp_path / "runs")}


def test_slurm_gets_an_array_job_a_stage_each_after_the_one_before(tmp_path, cluster):
    done = run_all("quick", **cluster)
    assert done.code == 0, done.err
    jobs = [line.split() for line in (tmp_path / "jobs").read_text().splitlines()]
    assert [line.split(":")[0] for line in done.out.splitlines()] == NAMES
    for number, words in enumerate(jobs):
        assert {f"--job-name={NAMES[number]}", "--gres=gpu:1", "--requeue"} <= set(words)
        assert (f"--dependency=afterany:{number}" in words) == (number > 0)
    expected = dry("quick", **cluster)
    ran = (tmp_path / "log").read_text().splitlines()
    assert [line.split() for line in ran] == [words[1:] for words in expected]
    arms = [words for words in expected if words[1] == "train_sparse.py"]
    assert [by_flag(words)["--sparsity"] for words in arms] == ["0.5", "0.8"] * 3


def test_slurm_gets_what_is_missing_and_nothing_twice(tmp_path, cluster):
    finished = tmp_path / "runs/w1/dense/seed1/result.json"
    finished.parent.mkdir(parents=True)
    finished.write_text('{"seconds": 1, "arguments": {"epochs": 9}}')
    run_all("quick", **cluster)
    ran = (tmp_path / "log").read_text()
    assert "--seed 0 " in ran and "--seed 1 " not in ran
    (tmp_path / "queue").write_text(f"7 {tmp_path} elsewhere\n")
    assert run_all("quick", **cluster).code == 0
    (tmp_path / "queue").write_text(f"7 {ROOT} {cluster['OUT']}\n")
    busy = run_all("quick", **cluster)
    assert busy.code == 2 and "has jobs in the queue (7)" in busy.err


def test_what_was_run_by_other_flags_is_submitted_so_that_its_stage_can_refuse(tmp_path, cluster):
    finished = tmp_path / "runs/w1/dense/seed1/result.json"
    finished.parent.mkdir(parents=True)
    (words,) = (words for words in dry("quick", **cluster) if "--seed 1 " in " ".join(words))
    made = {"seconds": 1, "arguments": {"epochs": 9}, "command": " ".join(["python", *words[1:]])}
    finished.write_text(json.dumps(made))
    flags = by_flag(words)
    usual = f"--image-size {flags['--image-size']} --batch-size {flags['--batch-size']}"
    usual += f" --epochs {flags['--epochs']}"
    for more, again in ((f"--lr {flags['--lr']} --workers 2", False), ("--lr 9", True), ("", True)):
        (tmp_path / "log").unlink(missing_ok=True)
        run_all("quick", **cluster | {"DENSE_FLAGS": f"{usual} {more}"})
        assert ("--seed 1 " in (tmp_path / "log").read_text()) == again


def test_a_network_on_several_nodes_has_a_torchrun_on_each(tmp_path, cluster):
    """srun starts it there, and the first node of the task is where they meet."""
    command(tmp_path, "srun", 'echo "$*" >> "$0.log"')
    nodes = assigned("SPREAD=16 SLURM_NNODES=2 SLURM_JOB_ID=40007")
    assert run_all("quick", **cluster, **nodes).code == 0
    lines = (tmp_path / "srun.log").read_text().splitlines()
    assert len(lines) == 2 + 1 + 6 and len(set(lines)) == 9
    meet = f"--rdzv-id 40007 --rdzv-endpoint {platform.node()}:20007 train_dense.py"
    for words in ("--ntasks-per-node=1 ", "--nnodes 2 --nproc-per-node 8 ", meet):
        assert words in lines[0]
    (aligned,) = (line for line in (tmp_path / "log").read_text().splitlines() if "_mask" in line)
    assert aligned.startswith("align_mask.py")  # in a single process


SHORT = """
    LAUNCH=slurm SBATCH=--cpus-per-task=1 MODEL=mlp WIDTHS=0.25 PAIRS=0 REWIND=1
    DENSE_FLAGS='--image-size 8 --limit-train 256 --batch-size 64 --epochs 200'
    IMP_FLAGS='--batch-size 64 --epochs 1' SPARSE_FLAGS='--batch-size 64 --epochs 3'
"""


def has_slurm():
    asked = shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True)
    return bool(asked) and asked.returncode == 0


@pytest.mark.skipif(not has_slurm(), reason="needs a running SLURM")
def test_the_experiment_runs_on_slurm_and_the_same_call_goes_on(tmp_path):
    own = {key: value for key, value in os.environ.items() if key.startswith("SLURM_")}

    def submit():
        done = run_all("quick", **assigned(SHORT), **own, OUT=str(tmp_path))
        assert done.code == 0, done.err
        return done.out

    def wait(seconds=600):
        until = time.monotonic() + seconds
        while subprocess.run(["squeue", "--me", "-h"], capture_output=True, text=True).stdout:
            assert time.monotonic() < until
            time.sleep(2)

    first = submit().splitlines()[0].rpartition(" ")[2]
    while not (tmp_path / "w0.25/dense/seed1/resume.pt").is_file():
        time.sleep(0.5)
    subprocess.run(["scancel", f"{first}_2"], check=True)
    wait()
    finished = {path.parts[-4] for path in tmp_path.rglob("s0.*/result.json")}
    assert finished == {"lth"}  # what needs no more than the other network is done
    told = "".join(path.read_text() for path in (tmp_path / "slurm").glob("train_dense*"))
    assert "stopped" in told
    assert "train_dense: 1 tasks" in submit().splitlines()[0]
    wait()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 3
    assert submit().startswith("analyze.results")
    wait()
