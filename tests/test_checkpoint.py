import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from common import checkpoint, provenance
from common import runs as folders
from common.errors import UserError
from tests.conftest import ROOT, fork, refuse, stage1, succeed

SCRIPT = str(ROOT / "train_dense.py")


def test_tables_are_of_rows_that_may_lack_something(tmp_path):
    checkpoint.save_csv([{"a": 1}, {"a": 2, "b": 3}], tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,\n2,3\n"


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, at):
    """Network file systems tell of a quota when a file is synchronised."""
    path = tmp_path / "file.pt"
    checkpoint.save({"old": 1}, path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, at, full)
    with pytest.raises(UserError, match=r"cannot write .*file\.pt: No space"):
        checkpoint.save({"new": 1}, path)
    assert list(tmp_path.iterdir()) == [path] and checkpoint.load(path) == {"old": 1}


def test_a_machine_that_goes_down_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    """On a file system that keeps of a file what was synchronised before it was renamed."""
    path, safe, replace = tmp_path / "file.pt", {}, os.replace

    def lossy(temporary, to):
        kept = safe.get(os.stat(temporary).st_ino, 0)
        os.truncate(temporary, kept)
        replace(temporary, to)

    def sync(number):
        safe[os.fstat(number).st_ino] = os.fstat(number).st_size

    monkeypatch.setattr(os, "replace", lossy)
    monkeypatch.setattr(os, "fsync", sync)
    checkpoint.save({"x": torch.arange(9)}, path)
    assert torch.equal(checkpoint.load(path)["x"], torch.arange(9))
    assert tmp_path.stat().st_ino in safe  # the rename, too


def test_what_a_disk_answers_is_one_line(tmp_path, monkeypatch):
    """Of a read-only folder in the way of a stage, for one."""
    refuse(stage1(tmp_path / ("a" * 300)), "too long")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refuse(stage1(tmp_path / "out"), "Read-only file system")
    assert not list(tmp_path.iterdir())


def test_what_a_run_leaves_that_is_killed_after_its_result_is_cleared(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path, dirs_exist_ok=True)
    for name in ("resume.pt", ".lock", ".log.csv.elsewhere.1.tmp"):
        (tmp_path / "seed0" / name).touch()
    assert "nothing to do" in succeed(*stage1(tmp_path, "--seed 0"))
    assert {path.name for path in (tmp_path / "seed0").iterdir()} == {
        path.name for path in (runs / "dense/seed0").iterdir()
    }


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cut off or no checkpoint"),
        (lambda path: torch.save({"y": 1}, path), "lacks x"),
        # Arbitrary objects are never loaded.
        (lambda path: torch.save({"x": pytest.raises}, path), "cut off or no checkpoint"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), r"save model\.state_dict\(\)"),
    ],
)
def test_bad_files_are_named(tmp_path, spoil, words):
    path = tmp_path / "file.pt"
    checkpoint.save({"x": 1}, path)
    spoil(path)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.load(path, ("x",))
    assert str(path) in str(caught.value)


def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    """Of a tensor, and of its entry in the directory, whose flags torch obeys."""
    path, value = tmp_path / "file.pt", torch.linspace(1, 2, 40)
    checkpoint.save({"x": value}, path)
    whole = path.read_bytes()
    data = whole.index(value.numpy().tobytes())
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))
    for place in (*range(data, data + 160, 20), *range(entry, entry + 46)):
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            path.write_bytes(content)
            try:
                loaded = checkpoint.load(path, ("x",))
            except UserError:
                continue
            assert place >= entry and torch.equal(loaded["x"], value), (place, bit)


def test_a_checkpoint_in_the_place_of_another_is_named(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "dense")
    run = tmp_path / "dense/seed0"
    larger = checkpoint.load(run / "epoch_0001.pt")
    larger["model"] |= {"input_shape": [3, 32, 32]}
    checkpoint.save(larger, tmp_path / "larger.pt")
    for other, words in (
        (run / "epoch_0000.pt", "seed 0 after epoch 0 of .*, not seed 0 after epoch 1"),
        (tmp_path / "dense/seed1/epoch_0001.pt", "holds seed 1 after epoch 1"),
        (tmp_path / "larger.pt", r"for \[3, 32, 32\] images, not .* for \[3, 8, 8\] images"),
    ):
        shutil.copy(other, run / "epoch_0001.pt")
        with pytest.raises(UserError, match=words):
            checkpoint.load_dense(run, 1)


def test_run_folders_know_their_experiment(tmp_path):
    folder, arguments = tmp_path / "run", {"lr": 0.1, "epochs": (1, 2)}
    assert not folders.is_finished(folder, arguments) and not folder.exists()
    folders.claim(folder, arguments, SCRIPT)
    assert not folders.is_finished(folder, arguments)
    with pytest.raises(UserError, match="lr is 0.1 there and 0.2 here"):
        folders.is_finished(folder, arguments | {"lr": 0.2})
    checkpoint.save_json({}, folder / "result.json")
    assert folders.is_finished(folder, arguments)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="no run of this project"):
        folders.is_finished(tmp_path, arguments)


def test_a_folder_in_which_another_process_works_is_left_alone(tmp_path):
    ready = multiprocessing.Event()

    def work():
        folders.claim(tmp_path, {}, SCRIPT)
        ready.set()
        multiprocessing.Event().wait()

    other = fork(work)
    try:
        assert ready.wait(60)
        (tmp_path / f".log.csv.elsewhere.{other.pid}.tmp").touch()  # it is writing this
        with pytest.raises(UserError, match=rf"is in work by process {other.pid} on \S+ since"):
            folders.claim(tmp_path, {}, SCRIPT)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    finally:
        other.kill()
        other.join()
    folders.claim(tmp_path, {}, SCRIPT)  # a dead process holds nothing
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_file_system_without_locks_is_worked_on_without(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(folders.fcntl, "lockf", lockf)
    number = errno.ENOSYS
    assert "code" in folders.claim(tmp_path / "a", {}, SCRIPT)
    number = errno.EIO
    with pytest.raises(UserError, match=r"cannot write .*\.lock: no locks"):
        folders.claim(tmp_path / "b", {}, SCRIPT)


def test_result_json_is_written_last(tmp_path, monkeypatch):
    row = {"epoch": 1, "train_loss": 1.0, "test_acc": 4.0, "seconds": 5.0}
    (tmp_path / "resume.pt").touch()
    order, real = [], checkpoint.replacing
    monkeypatch.setattr(checkpoint, "replacing", lambda path: order.append(path.name) or real(path))
    folders.finish(tmp_path, "a stage", {}, [row] * 2, torch.device("cpu"), {"code": "abc"})
    assert order == ["log.csv", "result.json"] and not (tmp_path / "resume.pt").exists()
    result = checkpoint.load_json(tmp_path / "result.json")
    assert {"test_acc": 4, "seconds": 10, "code": "abc"}.items() <= result.items()


def test_docstrings_and_comments_are_no_code(tmp_path):
    sources = ['"""One."""\nx = 1\n', '"""Two."""\n\nx = (1)  # one\n', '"""One."""\nx = 2\n']
    digests = []
    for source in sources:
        (tmp_path / "script.py").write_text(source)
        provenance.code_digest.cache_clear()
        digests.append(provenance.code_digest(str(tmp_path / "script.py")))
    assert digests[0] == digests[1] != digests[2]
