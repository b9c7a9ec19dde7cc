import contextlib
import errno
import json
import multiprocessing
import os
import shutil
from unittest import mock

import pytest
import torch

from common import checkpoint, models, provenance
from common import runs as folders
from common.errors import UserError
from tests.conftest import ROOT, call, fork, refuse, same_files, stage1, succeed

SCRIPT = str(ROOT / "train_dense.py")


def test_tables_are_of_rows_that_may_lack_something(tmp_path):
    checkpoint.save_csv([{"a": 1}, {"a": 2, "b": 0.1}], tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,\n2,0.1\n"


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, at):
    """Network file systems tell of a quota when a file is synchronised."""
    path = tmp_path / "file.pt"
    checkpoint.save({"old": 1}, path)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, at, mock.Mock(side_effect=full))
    with pytest.raises(UserError, match=r"cannot write .*file\.pt: No space"):
        checkpoint.save({"new": 1}, path)
    assert list(tmp_path.iterdir()) == [path] and checkpoint.load(path) == {"old": 1}


def test_a_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """A machine that goes down might keep the name alone. Then the name has to be there, too."""
    path, synced = tmp_path / "file.pt", []

    def sync(number):
        synced.append((os.fstat(number), path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    checkpoint.save({"x": torch.arange(9)}, path)
    (file, early), (folder, late) = synced
    assert file.st_size == path.stat().st_size and not early
    assert folder.st_ino == tmp_path.stat().st_ino and late


def test_folders_that_are_of_no_use_are_refused(tmp_path):
    refuse(stage1(tmp_path / ("a" * 300)), "too long")
    (tmp_path / "seed0/thesis").mkdir(parents=True)
    refuse(stage1(tmp_path), "no run of this project")


def test_a_run_that_is_killed_after_its_result_is_finished_without_training(runs, tmp_path):
    command, run, whole = stage1(tmp_path), tmp_path / "seed0", runs / "dense/seed0"
    with mock.patch.object(folders, "_unlock", side_effect=KeyboardInterrupt):
        call(*command)
    assert (run / "result.json").is_file() and (run / "resume.pt").is_file()
    (run / ".lock").rename(tmp_path / "lock")  # it was unlocked, too
    assert "3/3" not in succeed(*command) and "nothing to do" in succeed(*command)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    same_files(run, whole)


@pytest.mark.parametrize("content", [{"x": pytest.raises}, torch.nn.Linear(2, 2)])
def test_objects_are_never_loaded(tmp_path, content):
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(
        UserError, match=rf"{path} .* not a checkpoint .* save model\.state_dict\(\)"
    ):
        checkpoint.load(path)


def test_a_file_that_is_missing_cut_off_or_another_is_named(tmp_path):
    path = tmp_path / "epoch_0001.pt"
    checkpoint.save({"a": torch.ones(9)}, path)
    with pytest.raises(UserError, match=r"no such file: .*epoch_0002.pt \(there: epoch_0001.pt\)"):
        checkpoint.load(tmp_path / "epoch_0002.pt")
    with pytest.raises(UserError, match="not the file needed here: it lacks b"):
        checkpoint.load(path, ("a", "b"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged, truncated"):
        checkpoint.load(path)


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
            with contextlib.suppress(UserError):
                loaded = checkpoint.load(path, ("x",))["x"]
                assert place >= entry and torch.equal(loaded, value), (place, bit)


def test_a_run_that_does_not_tell_what_it_kept_is_taken_as_it_is_now(runs, tmp_path):
    run = shutil.copytree(runs / "dense/seed0", tmp_path / "seed0")
    told = json.loads((run / "result.json").read_text())
    kept = told.pop("kept")
    (run / "result.json").write_text(json.dumps(told))
    assert checkpoint.load_dense(run, 1)["kept"] == kept
    with pytest.raises(UserError, match=r"no weights after epoch 2: it has 0, 1, 3 \(see"):
        checkpoint.load_dense(run, 2)


def test_weights_of_a_model_that_was_edited_since_are_named(ends, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mlp", lambda width, *of: models.mlp(2 * width, *of))
    with pytest.raises(UserError, match=r"epoch_0003.pt does not fit mlp: size mismatch for 1\.w"):
        checkpoint.load_dense(ends[0])


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
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on \S+ since"):
            folders.claim(tmp_path, {}, SCRIPT)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    finally:
        other.kill()
        other.join()
    folders.claim(tmp_path, {}, SCRIPT)  # a dead process holds nothing
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_file_system_without_locks_is_worked_on_without(tmp_path, monkeypatch):
    lockf = mock.Mock(side_effect=OSError(errno.ENOSYS, "no locks"))
    monkeypatch.setattr(folders.fcntl, "lockf", lockf)
    assert "code" in folders.claim(tmp_path / "a", {}, SCRIPT)
    lockf.side_effect = OSError(errno.EIO, "no locks")
    with pytest.raises(UserError, match=r"cannot write .*\.lock: no locks"):
        folders.claim(tmp_path / "b", {}, SCRIPT)


def test_result_json_is_written_last(tmp_path, monkeypatch):
    resume, written = tmp_path / "resume.pt", []
    resume.touch()

    def noted(text, path):
        written.append(path.name)
        assert resume.exists()

    monkeypatch.setattr(checkpoint, "save_text", noted)
    folders.finish(tmp_path, "a stage", {}, [{"epoch": 1}], torch.device("cpu"), {})
    assert written == ["log.csv", "result.json"] and not resume.exists()


def test_docstrings_and_comments_are_no_code(tmp_path):
    sources = ['"""One."""\nx = 1\n', '"""Two."""\n\nx = (1)  # one\n', '"""One."""\nx = 2\n']
    digests = []
    for source in sources:
        (tmp_path / "script.py").write_text(source)
        provenance.code_digest.cache_clear()
        digests.append(provenance.code_digest(str(tmp_path / "script.py")))
    assert digests[0] == digests[1] != digests[2]
