"""LAUNCH=slurm of run_all.sh, with fake SLURM commands, and with SLURM where it is available."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.test_run_all import (
    dry_run,
    fake_command,
    parse_flags,
    parse_settings,
    run_all,
    save_epochs,
)

SETTINGS = parse_settings("LAUNCH=slurm PAIRS=0 SPARSITY='0.5 0.8' SBATCH=--gres=gpu:1")
NAMES = ["train_dense", "prune_imp", "align_mask", "train_sparse", "analyze.results"]
NAMES += ["analyze.report"]


@pytest.fixture
def cluster(tmp_path):
    """Fake commands: sbatch runs its tasks at once, python3 logs its arguments without training."""
    script = 'case "$*" in -c*) ;; *analyze.status*) exec {} "$@" ;; *) echo "$*" >> {} ;; esac'
    fake_command(tmp_path, "python3", script.format(sys.executable, tmp_path / "log"))
    fake_command(tmp_path, "squeue", f"cat {tmp_path}/queue 2> /dev/null || :")
    tasks = 'for i in $(seq "$count"); do SLURM_ARRAY_TASK_ID=$i bash "$0.script"; done'
    count = 'count=$(echo "$*" | sed "s/.*--array=1-\\([0-9]*\\).*/\\1/")'
    lines = f'cat > "$0.script"; echo "$*" >> {tmp_path}/jobs; {count}; {tasks}'
    path = fake_command(tmp_path, "sbatch", f"{lines}; wc -l < {tmp_path}/jobs")
    return SETTINGS | {"PATH": path, "OUT": str(tmp_path / "runs")}


def test_each_stage_is_an_array_job_that_depends_on_the_previous_one(tmp_path, cluster):
    outcome = run_all("quick", **cluster)
    assert outcome.code == 0, outcome.err
    jobs = [line.split() for line in (tmp_path / "jobs").read_text().splitlines()]
    assert [line.split(":")[0] for line in outcome.out.splitlines()] == NAMES
    for number, words in enumerate(jobs):
        assert {f"--job-name={NAMES[number]}", "--gres=gpu:1", "--requeue"} <= set(words)
        assert (f"--dependency=afterany:{number}" in words) == (number > 0)
    expected = dry_run("quick", **cluster)
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split() for line in log] == [words[1:] for words in expected]
    arms = [words for words in expected if words[1] == "train_sparse.py"]
    assert [parse_flags(words)["--sparsity"] for words in arms] == ["0.5", "0.8"] * 3


def test_a_stage_of_many_tasks_is_several_array_jobs(tmp_path, cluster):
    """SLURM allows 1,001 tasks a job by default."""
    pairs = " ".join(map(str, range(200)))
    path = fake_command(tmp_path, "sbatch", f"cat > /dev/null; echo $* >> {tmp_path}/jobs; echo 7")
    settings = cluster | {"PATH": path, "PAIRS": pairs, "METHODS": "", "SPARSITY": "0.5 0.6 0.7"}
    outcome = run_all("quick", **settings)
    assert outcome.code == 0, outcome.err
    stage4 = [line for line in outcome.out.splitlines() if line.startswith("train_sparse")]
    assert stage4 == ["train_sparse: 1000 tasks, job 7", "train_sparse: 200 tasks, job 7"]
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert "--array=1-200 " in jobs[3] and "afterany:7:7" in jobs[4]
    assert "afterany:7:7" not in jobs[3]


def test_an_unwritable_folder_is_refused_before_anything_is_submitted(tmp_path, cluster):
    (tmp_path / "file").touch()
    outcome = run_all("quick", **cluster | {"OUT": f"{tmp_path}/file/runs"})
    assert outcome.code == 2 and "cannot write OUT=" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "jobs").exists()


def test_only_missing_runs_are_submitted_and_none_twice(tmp_path, cluster):
    finished = tmp_path / "runs/w1/dense/seed1/result.json"
    finished.parent.mkdir(parents=True)
    finished.write_text('{"seconds": 1, "arguments": {"epochs": 9}}')
    save_epochs(finished.parent, 3, 6)
    run_all("quick", **cluster)
    log = (tmp_path / "log").read_text()
    assert "--seed 0 " in log and "--seed 1 " not in log
    assert run_all("quick", **cluster | {"REWIND": "3 6 9"}).code == 0
    assert "--seed 1 " in (tmp_path / "log").read_text()  # to be refused: epoch 9 was not saved
    (tmp_path / "queue").write_text(f"7 {tmp_path} elsewhere\n")
    assert run_all("quick", **cluster).code == 0
    (tmp_path / "queue").write_text(f"7 {ROOT} {cluster['OUT']}\n")
    outcome = run_all("quick", **cluster)
    assert outcome.code == 2 and "has jobs in the queue (7)" in outcome.err


def test_runs_with_other_flags_are_submitted_so_that_the_stage_refuses_them(tmp_path, cluster):
    finished = tmp_path / "runs/w1/dense/seed1/result.json"
    finished.parent.mkdir(parents=True)
    (words,) = (words for words in dry_run("quick", **cluster) if "--seed 1 " in " ".join(words))
    result = {"seconds": 1, "arguments": {"epochs": 9}}
    finished.write_text(json.dumps(result | {"command": " ".join(["python", *words[1:]])}))
    save_epochs(finished.parent, 3, 6)
    flags = parse_flags(words)
    same_flags = f"--image-size {flags['--image-size']} --batch-size {flags['--batch-size']}"
    same_flags += f" --epochs {flags['--epochs']}"
    for more_flags, submitted in (
        (f"--lr {flags['--lr']} --workers 2", False),
        ("--lr 9", True),
        ("", True),
    ):
        (tmp_path / "log").unlink(missing_ok=True)
        run_all("quick", **cluster | {"DENSE_FLAGS": f"{same_flags} {more_flags}"})
        assert ("--seed 1 " in (tmp_path / "log").read_text()) == submitted


def test_a_network_on_several_nodes_has_a_torchrun_per_node(tmp_path, cluster):
    """srun starts them, and the first node of the task hosts the rendezvous."""
    fake_command(tmp_path, "srun", 'echo "$*" >> "$0.log"')
    nodes = parse_settings("SPREAD=16 SLURM_NNODES=2 SLURM_JOB_ID=40007")
    assert run_all("quick", **cluster, **nodes).code == 0
    lines = (tmp_path / "srun.log").read_text().splitlines()
    assert len(lines) == 2 + 1 + 6 and len(set(lines)) == 9
    rendezvous = f"--rdzv-id 40007 --rdzv-endpoint {platform.node()}:20007 train_dense.py"
    for words in ("--ntasks-per-node=1 ", "--nnodes 2 --nproc-per-node 8 ", rendezvous):
        assert words in lines[0]
    log = (tmp_path / "log").read_text().splitlines()
    (alignment,) = (line for line in log if "_mask" in line)
    assert alignment.startswith("align_mask.py")  # in a single process


SMALL = """
    LAUNCH=slurm SBATCH=--cpus-per-task=1 MODEL=mlp WIDTHS=0.25 PAIRS=0 REWIND=1
    DENSE_FLAGS='--image-size 8 --limit-train 256 --batch-size 64 --epochs 200'
    IMP_FLAGS='--batch-size 64 --epochs 1' SPARSE_FLAGS='--batch-size 64 --epochs 3'
"""


def has_slurm():
    process = shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True)
    return bool(process) and process.returncode == 0


@pytest.mark.skipif(not has_slurm(), reason="needs a running SLURM")
def test_the_experiment_runs_on_slurm_and_a_second_run_resumes_it(tmp_path):
    slurm_variables = {key: os.environ[key] for key in os.environ if key.startswith("SLURM_")}

    def submit():
        outcome = run_all("quick", **parse_settings(SMALL), **slurm_variables, OUT=str(tmp_path))
        assert outcome.code == 0, outcome.err
        return outcome.out

    def wait(seconds=600):
        deadline = time.monotonic() + seconds
        while subprocess.run(["squeue", "--me", "-h"], capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline
            time.sleep(2)

    dense_job = submit().splitlines()[0].rpartition(" ")[2]
    while not (tmp_path / "w0.25/dense/seed1/resume.pt").is_file():
        time.sleep(0.5)
    subprocess.run(["scancel", f"{dense_job}_2"], check=True)
    wait()
    finished = {path.parts[-4] for path in tmp_path.rglob("s0.*/result.json")}
    assert finished == {"lth"}  # needs only the source
    log = "".join(path.read_text() for path in (tmp_path / "slurm").glob("train_dense*"))
    assert "stopped" in log
    assert "train_dense: 1 tasks" in submit().splitlines()[0]
    wait()
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 3
    assert submit().startswith("analyze.results")
    wait()
