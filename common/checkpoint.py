"""Atomic writing and safe loading of files."""

import contextlib
import hashlib
import io
import json
import os
import platform
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from common import paths
from common.errors import UserError
from common.models import build_model, check_fits
from common.runtime.distributed import RANK, barrier

# Keys of checkpoints and of mask files, and types of entries in any file.
WEIGHTS = ("model", "dataset", "seed", "epoch", "state_dict")
MASKS = ("mask", "signs", "sparsity", "sparsity_total", "model", "dataset")
MASKS += ("source_seed", "target_seed", "method", "match_epoch")
TYPES = {"seed": int, "epoch": int, "round": int, "rows": list}
TYPES["source_seed"] = (int, str)  # a name if the network was trained elsewhere
TYPES["match_epoch"] = (int, type(None))
TYPES |= dict.fromkeys(("model", "dataset", "state_dict", "mask", "signs", "permutation"), dict)

# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    Only rank 0 writes, between two barriers, so that all ranks see the same files. Raises UserError
    when the file cannot be written.
    """
    barrier()
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        if RANK:
            yield io.BytesIO()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                # Without this a crash of the machine could leave the new name with no content.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        barrier()


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash, if the file system can synchronise folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(files: Iterable[Path]) -> None:
    """Delete files, on rank 0; missing ones are skipped."""
    barrier()
    for path in () if RANK else files:
        path.unlink(missing_ok=True)
    barrier()


def save(content: Any, path: Path) -> None:
    """Write tensors and plain values. Raises UserError when the file cannot be written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def save_text(text: str, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def save_json(content: Any, path: Path) -> None:
    save_text(json.dumps(content, indent=2) + "\n", path)


def save_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write dicts as rows of a CSV file with a header; missing values stay empty."""
    import pandas as pd  # imported here because it takes a second

    save_text(pd.DataFrame(rows).to_csv(index=False), path)


# ---------------------------------------------------------------- reading


def load(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a file written by `save` onto the CPU.

    Raises UserError when it is missing or damaged, or when one of `keys` is missing or of the wrong
    type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}{alternatives(path)}")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unsafe pickles, which raise here
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage can raise nearly anything in zipfile, zlib, pickle, torch
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason}): it is damaged, truncated or not a checkpoint of "
            "plain tensors; create it again, or save model.state_dict()"
        ) from error
    entries = content if isinstance(content, dict) else {}
    missing = [key for key in keys if key not in entries or not _has_type(key, entries[key])]
    if missing:
        raise UserError(f"{path} is not the file needed here: it lacks {', '.join(missing)}")
    return content


def _has_type(key: str, value: Any) -> bool:
    """Whether an entry has its type; weights, masks and signs are dicts of tensors."""
    if key in ("state_dict", "mask", "signs"):
        return isinstance(value, dict) and all(map(torch.is_tensor, value.values()))
    return isinstance(value, TYPES.get(key, object))


def _check_archive(path: Path) -> None:
    """Raise an exception if a zip archive is damaged; torch.load does not verify checksums."""
    with zipfile.ZipFile(path) as archive:
        # torch reads an entry with attributes as a folder, and returns uninitialised memory.
        attributes = [entry.filename for entry in archive.infolist() if entry.external_attr]
        if damaged := archive.testzip() or attributes:
            raise ValueError(f"{damaged} is damaged")


def alternatives(path: Path) -> str:
    """For an error message: list files of the same kind as a missing file, or else the folders."""
    folder = path.parent
    if folder.is_file():
        return f" ({folder.name} is a file: pass its folder)"
    if not folder.is_dir():
        return " (the folder does not exist)"
    pattern = f"{path.name.split('_')[0]}_*.pt"
    files = [*folder.glob(pattern)] or [child for child in folder.iterdir() if child.is_dir()]
    return f" (there: {', '.join(sorted(file.name for file in files))})" if files else ""


def load_json(path: Path) -> dict[str, Any]:
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read: it is not a file of this project")
    return content


def load_dense(folder: Path, epoch: int | None = None) -> dict[str, Any]:
    """Read a checkpoint of a finished dense run: after `epoch` epochs, by default the last.

    Adds `result` (the content of result.json), `kept` (the digests of all saved checkpoints, by
    epoch) and `sha256` (the digest of this one). Raises UserError when the run is unfinished, the
    epoch was not saved, or the file was changed after the run.
    """
    folder = Path(folder)
    result_file = folder / "result.json"
    if not result_file.is_file():
        if (folder / "arguments.json").is_file():
            raise UserError(
                f"{folder} is not finished: run train_dense.py again, or at a lower --lr"
            )
        missing = f"no such file: {result_file}{alternatives(result_file)}"
        raise UserError(f"{folder} is not a dense run: {missing}")
    result = load_json(result_file)
    if result.get("stage") != "train_dense":
        raise UserError(f"{folder} holds a run of {result.get('stage')}.py, not a dense run")
    try:
        last_epoch, _ = result["arguments"]["epochs"], result["precision"]
    except (KeyError, TypeError):
        raise UserError(f"{result_file} was changed after the run: train it again") from None
    epoch = last_epoch if epoch is None else epoch
    kept, path = recorded_digests(folder, result), paths.epoch_file(folder, epoch)
    if str(epoch) not in kept:
        saved = f"it saved {', '.join(kept) or 'none'} (see train_dense.py --save-epochs)"
        raise UserError(f"{folder} has no weights after epoch {epoch}: {saved}")
    dense = load(path, WEIGHTS) | {"result": result, "kept": kept, "sha256": digest(path)}
    if dense["sha256"] != kept[str(epoch)]:
        raise UserError(f"{path} was changed after the run: train it again in another --out")
    check_fits(dense["state_dict"], build_model(**dense["model"]), path, dense["model"]["name"])
    return dense


def recorded_digests(folder: Path, result: dict[str, Any]) -> dict[str, str]:
    """Return the digests of the checkpoints of a finished dense run, by epoch.

    For older runs, whose result.json does not record them, computes those of the current files.
    """
    return result.get("kept") or digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of the checkpoints in the folder of a dense run, by epoch."""
    return {str(epoch): digest(path) for epoch, path in paths.epoch_files(folder).items()}


def digest(path: Path) -> str:
    """Return the first 16 hex digits of a file's SHA-256, by which later stages recognise it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
