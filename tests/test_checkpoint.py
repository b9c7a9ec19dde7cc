import contextlib
import errno
import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from common import checkpoint, paths, provenance
from common import runs as folders
from common.errors import UserError
from tests.conftest import ROOT, fork, refuse, stage1, stage3, succeed

SCRIPT = str(ROOT / "train_dense.py")


def test_labels_and_file_names(tmp_path):
    assert [paths.label(s) for s in (0.8, 0.95, 0.995)] == ["0.80", "0.95", "0.995"]
    assert paths.epoch_file(tmp_path, 7).name == "epoch_0007.pt"
    assert paths.mask_file(tmp_path, 0.9).name == "mask_0.90.pt"


def test_what_is_saved_comes_back(tmp_path):
    content = {"x": torch.arange(3), "plain": [1, "two", None]}
    checkpoint.save(content, tmp_path / "deep/file.pt")
    loaded = checkpoint.load(tmp_path / "deep/file.pt", ("x", "plain"))
    assert torch.equal(loaded.pop("x"), content.pop("x")) and loaded == content
    checkpoint.save_csv([{"a": 1}, {"a": 2, "b": 3}], tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,\n2,3\n"


@pytest.mark.parametrize("at", ["fsync", "replace", "the limit of a file's size"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, at):
    """Network file systems tell of a quota when a file is synchronised."""
    path, usual = tmp_path / "file.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.save({"old": 1}, path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if at in dir(os):
            patch.setattr(os, at, full)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, usual[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write .*file\.pt: (No space|File too)"):
                checkpoint.save({"new": torch.ones(5000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(tmp_path.iterdir()) == [path] and checkpoint.load(path) == {"old": 1}
    checkpoint.save({"new": 2}, path)
    assert checkpoint.load(path) == {"new": 2}


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


def test_what_a_disk_answers_is_one_line(runs, tmp_path, monkeypatch):
    """Of a read-only folder in the way of a stage, for one."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refuse(stage1(tmp_path / "out"), "Read-only file system")
    refuse(
        stage3(*(runs / f"dense/seed{n}" for n in (0, 1)), runs / "imp/seed0", "a" * 300),
        "too long",
    )
    assert not list(tmp_path.iterdir())


def test_what_a_run_leaves_that_is_killed_after_its_result_is_cleared(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path, dirs_exist_ok=True)
    for name in ("resume.pt", ".lock", ".log.csv.elsewhere.1.tmp"):
        (tmp_path / "seed0" / name).touch()
    assert "nothing to do" in succeed(*stage1(tmp_path, "--seed", 0))
    assert {path.name for path in (tmp_path / "seed0").iterdir()} == {
        path.name for path in (runs / "dense/seed0").iterdir()
    }


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cut off or no checkpoint"),
        (lambda path: path.write_bytes(b""), "cut off or no checkpoint"),
        (lambda path: path.write_text("hello"), "cut off or no checkpoint"),
        (lambda path: torch.save([1], path), "lacks x"),
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


def test_a_flipped_bit_in_a_tensor_is_seen(tmp_path):
    path, value = tmp_path / "file.pt", torch.linspace(1, 2, 1200)
    checkpoint.save({"x": value}, path)
    whole = path.read_bytes()
    start = whole.index(value.numpy().tobytes())
    for place in range(start, start + 4800, 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not torch.equal(torch.load(path, weights_only=True)["x"], value)  # torch is silent
        with pytest.raises(UserError, match=r"file\.pt cannot be read: it is damaged"):
            checkpoint.load(path)


def test_no_flipped_bit_of_the_directory_changes_what_is_loaded(tmp_path):
    path, value = tmp_path / "file.pt", torch.arange(40.0)
    checkpoint.save({"x": value}, path)
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))  # of the tensor, whose flags
    for bit in range(8 * entry, 8 * (entry + 46)):  # torch obeys
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            assert torch.equal(checkpoint.load(path, ("x",))["x"], value), bit


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
    (folder / ".log.csv.123.tmp").touch()
    folders.claim(folder, arguments, SCRIPT)
    assert not folders.is_finished(folder, arguments) and not list(folder.glob(".*.tmp"))
    with pytest.raises(UserError, match="lr is 0.1 there and 0.2 here"):
        folders.is_finished(folder, arguments | {"lr": 0.2})
    checkpoint.save_json({}, folder / "result.json")
    assert folders.is_finished(folder, arguments)
    other = tmp_path / "other"
    other.mkdir()
    assert not folders.is_finished(other, arguments)  # an empty folder may be used
    (other / "thesis.txt").touch()
    with pytest.raises(UserError, match="no run of this project"):
        folders.is_finished(other, arguments)


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
    cpu, stamp = torch.device("cpu"), {"code": "abc"}
    folders.finish(tmp_path, "train_dense", {"a": 1}, [row] * 2, cpu, stamp, precision="fp32")
    assert order == ["log.csv", "result.json"] and not (tmp_path / "resume.pt").exists()
    result = json.loads((tmp_path / "result.json").read_text())
    expected = {"test_acc": 4, "seconds": 10, "arguments": {"a": 1}, "code": "abc"}
    assert expected.items() <= result.items() and result["threads"] >= 1
    assert (tmp_path / "log.csv").read_text().startswith("epoch,train_loss,test_acc,seconds\n")


def test_docstrings_and_comments_are_no_code(tmp_path):
    sources = ['"""One."""\nx = 1\n', '"""Two."""\n\nx = (1)  # one\n', '"""One."""\nx = 2\n']
    digests = []
    for source in sources:
        (tmp_path / "script.py").write_text(source)
        provenance.code_digest.cache_clear()
        digests.append(provenance.code_digest(str(tmp_path / "script.py")))
    assert digests[0] == digests[1] != digests[2]
