"""Files: atomic writing and safe loading."""

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

WEIGHTS = ("model", "dataset", "seed", "epoch", "state_dict")
MASKS = ("mask", "signs", "sparsity", "sparsity_total", "model", "dataset")
MASKS += ("source_seed", "target_seed", "method", "match_epoch")
KINDS = {"seed": int, "epoch": int, "round": int, "rows": list}  # of these entries in any file
KINDS["source_seed"] = (int, str)  # a name where a network was trained elsewhere
KINDS["match_epoch"] = (int, type(None))
KINDS |= dict.fromkeys(("model", "dataset", "state_dict", "mask", "signs", "permutation"), dict)

# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    Of several processes the first alone writes, when all have met, so that none sees it too early.
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
                # Or a machine that goes down might keep the new name and lose what it stands for.
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
    """Have a rename on the disk before the next one, where the file system can do that."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def remove(files: Iterable[Path]) -> None:
    """Delete files, those that are there."""
    barrier()
    for path in () if RANK else files:
        path.unlink(missing_ok=True)
    barrier()


def save(content: Any, path: Path) -> None:
    """Write tensors and plain values; raises UserError when the disk does not take them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def save_text(text: str, path: Path) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def save_json(content: Any, path: Path) -> None:
    save_text(json.dumps(content, indent=2) + "\n", path)


def save_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write dicts as a CSV file with a header; a row may lack what others have."""
    import pandas as pd  # here, because it takes a second that most calls need not pay

    save_text(pd.DataFrame(rows).to_csv(index=False), path)


# ---------------------------------------------------------------- reading


def load(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a file of ours onto the CPU.

    Raises UserError when it is missing, damaged, cut off, or lacks one of `keys`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}{siblings(path)}")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused in a line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zipfile, zlib, pickle and torch, whatever the damage brings up
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{path} cannot be read ({why}): if it is damaged, cut off or no checkpoint of plain "
            "tensors, make it again, or save model.state_dict()"
        ) from error
    held = content if isinstance(content, dict) else {}
    lacking = [key for key in keys if key not in held or not _is_kind(key, held[key])]
    if lacking:
        raise UserError(f"{path} is not the file needed here: it lacks {', '.join(lacking)}")
    return content


def _is_kind(key: str, value: Any) -> bool:
    """Whether an entry is of its kind; weights, masks and signs are tensors throughout."""
    if key in ("state_dict", "mask", "signs"):
        return isinstance(value, dict) and all(map(torch.is_tensor, value.values()))
    return isinstance(value, KINDS.get(key, object))


def _check_archive(path: Path) -> None:
    """Raise ValueError or what zipfile raises when a file is damaged; torch does not look."""
    with zipfile.ZipFile(path) as archive:
        # An entry with attributes torch takes for a folder, and returns what is in memory.
        attributes = [entry.filename for entry in archive.infolist() if entry.external_attr]
        if damaged := archive.testzip() or attributes:
            raise ValueError(f"{damaged} is damaged")


def siblings(path: Path) -> str:
    """What a folder offers in place of a missing file, for the error message."""
    if path.parent.is_file():
        return f" ({path.parent.name} is a file: give its folder)"
    if not path.parent.is_dir():
        return " (nor its folder)"
    kind = f"{path.name.split('_')[0]}_*.pt"
    there = [*path.parent.glob(kind)] or [each for each in path.parent.iterdir() if each.is_dir()]
    return f" (there: {', '.join(sorted(each.name for each in there))})" if there else ""


def load_json(path: Path) -> dict[str, Any]:
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read: it is no file of this project")
    return content


def load_dense(folder: Path, epoch: int | None = None) -> dict[str, Any]:
    """Read the weights after `epoch` epochs of a finished dense run, by default after the last one.

    Adds `result`, the content of result.json, `kept`, the digests of all kept weights by epoch, and
    `sha256`, that of these. Raises UserError when the run is unfinished, the epoch was not kept, or
    the file is not as the run wrote it.
    """
    folder = Path(folder)
    record = folder / "result.json"
    if not record.is_file():
        if (folder / "arguments.json").is_file():
            raise UserError(
                f"{folder} is not finished: run train_dense.py again, or at a lower --lr"
            )
        raise UserError(f"{folder} is no dense run: no such file: {record}{siblings(record)}")
    result = load_json(record)
    if result.get("stage") != "train_dense":
        raise UserError(f"{folder} holds a run of {result.get('stage')}.py, not a dense run")
    try:
        last, _ = result["arguments"]["epochs"], result["precision"]
    except (KeyError, TypeError):
        raise UserError(f"{record} is not as the run wrote it: train it again") from None
    epoch = last if epoch is None else epoch
    kept, path = kept_weights(folder, result), paths.epoch_file(folder, epoch)
    if str(epoch) not in kept:
        has = f"it has {', '.join(kept) or 'none'} (see train_dense.py --save-epochs)"
        raise UserError(f"{folder} kept no weights after epoch {epoch}: {has}")
    dense = load(path, WEIGHTS) | {"result": result, "kept": kept, "sha256": digest(path)}
    if dense["sha256"] != kept[str(epoch)]:
        raise UserError(f"{path} is not as the run wrote it: train it again in another --out")
    check_fits(dense["state_dict"], build_model(**dense["model"]), path, dense["model"]["name"])
    return dense


def kept_weights(folder: Path, result: dict[str, Any]) -> dict[str, str]:
    """The digests of the weights that a finished dense run kept, by epoch.

    Where its result.json does not tell, being older, those of the files as they are now.
    """
    return result.get("kept") or digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """The digests of the weights in a folder of a dense run, by epoch."""
    return {str(epoch): digest(path) for epoch, path in paths.epoch_files(folder).items()}


def digest(path: Path) -> str:
    """16 hex digits of a file's SHA-256: tells a later call whether its inputs are the same."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
