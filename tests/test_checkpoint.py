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


def test_missing_values_of_a_csv_row_stay_empty(tmp_path):
    checkpoint.save_csv([{"a": 1}, {"a": 2, "b": 0.1}], tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,\n2,0.1\n"


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, function):
    """Network file systems report an exceeded quota in fsync."""
    path = tmp_path / "file.pt"
    checkpoint.save({"old": 1}, path)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, function, mock.Mock(side_effect=full))
    with pytest.raises(UserError, match=r"cannot write .*file\.pt: No space"):
        checkpoint.save({"new": 1}, path)
    assert list(tmp_path.iterdir()) == [path] and checkpoint.load(path) == {"old": 1}


def test_a_file_is_synchronised_before_its_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    """Otherwise a crash of the machine could keep the new name without the content."""
    path, synced = tmp_path / "file.pt", []

    def fsync(descriptor):
        synced.append((os.fstat(descriptor), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.save({"x": torch.arange(9)}, path)
    (file, renamed_before), (folder, renamed_after) = synced
    assert file.st_size == path.stat().st_size and not renamed_before
    assert folder.st_ino == tmp_path.stat().st_ino and renamed_after


def test_unusable_output_folders_are_refused(tmp_path):
    refuse(stage1(tmp_path / ("a" * 300)), "too long")
    (tmp_path / "seed0/thesis").mkdir(parents=True)
    refuse(stage1(tmp_path), "no run of this project")


def test_a_run_that_is_killed_after_its_result_is_finished_without_training(runs, tmp_path):
    command, run, expected = stage1(tmp_path), tmp_path / "seed0", runs / "dense/seed0"
    with mock.patch.object(folders, "_unlock", side_effect=KeyboardInterrupt):
        call(*command)
    assert (run / "result.json").is_file() and (run / "resume.pt").is_file()
    (run / ".lock").rename(tmp_path / "lock")  # as if it had been unlocked
    assert "3/3" not in succeed(*command) and "nothing to do" in succeed(*command)
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}
    same_files(run, expected)


@pytest.mark.parametrize("content", [{"x": pytest.raises}, torch.nn.Linear(2, 2)])
def test_objects_are_never_loaded(tmp_path, content):
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with pytest.raises(
        UserError, match=rf"{path} .* not a checkpoint .* save model\.state_dict\(\)"
    ):
        checkpoint.load(path)


def test_a_missing_truncated_or_wrong_file_is_named(tmp_path):
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
    """Neither in a tensor nor in its entry of the zip directory, whose flags torch obeys."""
    path, tensor = tmp_path / "file.pt", torch.linspace(1, 2, 40)
    checkpoint.save({"x": tensor}, path)
    original = path.read_bytes()
    data = original.index(tensor.numpy().tobytes())
    entry = original.rindex(b"PK\x01\x02", 0, original.rindex(b"data/0"))
    for position in (*range(data, data + 160, 20), *range(entry, entry + 46)):
        for bit in range(8):
            flipped = bytearray(original)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with contextlib.suppress(UserError):
                loaded = checkpoint.load(path, ("x",))["x"]
                assert position >= entry and torch.equal(loaded, tensor), (position, bit)


def test_the_files_of_a_run_that_recorded_no_digests_are_trusted(runs, tmp_path):
    run = shutil.copytree(runs / "dense/seed0", tmp_path / "seed0")
    result = json.loads((run / "result.json").read_text())
    kept = result.pop("kept")
    (run / "result.json").write_text(json.dumps(result))
    assert checkpoint.load_dense(run, 1)["kept"] == kept
    with pytest.raises(UserError, match=r"no weights after epoch 2: it saved 0, 1, 3 \(see"):
        checkpoint.load_dense(run, 2)


def test_weights_that_do_not_fit_an_edited_model_are_named(ends, monkeypatch):
    monkeypatch.setitem(models.MODELS, "mlp", lambda width, *rest: models.mlp(2 * width, *rest))
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
        (tmp_path / f".log.csv.elsewhere.{other.pid}.tmp").touch()  # as if it were writing
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on \S+ since"):
            folders.claim(tmp_path, {}, SCRIPT)
        assert len(list(tmp_path.glob(".*.tmp"))) == 1
    finally:
        other.kill()
        other.join()
    folders.claim(tmp_path, {}, SCRIPT)  # a dead process holds no lock
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_file_system_without_locks_is_used_without_locks(tmp_path, monkeypatch):
    lockf = mock.Mock(side_effect=OSError(errno.ENOSYS, "no locks"))
    monkeypatch.setattr(folders.fcntl, "lockf", lockf)
    assert "code" in folders.claim(tmp_path / "a", {}, SCRIPT)
    lockf.side_effect = OSError(errno.EIO, "no locks")
    with pytest.raises(UserError, match=r"cannot write .*\.lock: no locks"):
        folders.claim(tmp_path / "b", {}, SCRIPT)


def test_result_json_is_written_last(tmp_path, monkeypatch):
    resume, written = tmp_path / "resume.pt", []
    resume.touch()

    def save_text(text, path):
        written.append(path.name)
        assert resume.exists()

    monkeypatch.setattr(checkpoint, "save_text", save_text)
    folders.finish(tmp_path, "a stage", {}, [{"epoch": 1}], torch.device("cpu"), {})
    assert written == ["log.csv", "result.json"] and not resume.exists()


def test_docstrings_and_comments_do_not_change_the_code_digest(tmp_path):
    sources = ['"""One."""\nx = 1\n', '"""Two."""\n\nx = (1)  # one\n', '"""One."""\nx = 2\n']
    digests = []
    for source in sources:
        (tmp_path / "script.py").write_text(source)
        provenance.code_digest.cache_clear()
        digests.append(provenance.code_digest(str(tmp_path / "script.py")))
    assert digests[0] == digests[1] != digests[2]
