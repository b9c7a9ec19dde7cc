"""Files: atomic writing, safe loading, and run folders that know which experiment they hold."""

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pickle
import platform
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common import distributed
from common.errors import UserError

WEIGHTS = ("model", "dataset", "seed", "epoch", "state_dict")
MASKS = (
    "mask",
    "signs",
    "sparsity",
    "sparsity_total",
    "model",
    "dataset",
    "source_seed",
    "target_seed",
    "method",
    "match_epoch",
)


def epoch_file(folder: Path, epoch: int) -> Path:
    return Path(folder) / f"epoch_{epoch:04d}.pt"


def mask_file(folder: Path, sparsity: float) -> Path:
    return Path(folder) / f"mask_{label(sparsity)}.pt"


def label(sparsity: float) -> str:
    """0.9 -> '0.90', 0.995 -> '0.995': at least two decimals, as many as the number has."""
    return max(f"{sparsity:.2f}", f"{sparsity:.10g}", key=len)


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    Of several processes (common/distributed.py) the first alone writes, when all have asked what there was before.
    """
    distributed.wait()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if distributed.RANK:
            yield io.BytesIO()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        distributed.wait()


def remove(paths: Iterable[Path]) -> None:
    """Delete files, those that are there."""
    distributed.wait()
    for path in paths if distributed.RANK == 0 else ():
        path.unlink(missing_ok=True)
    distributed.wait()


def save(content: Any, path: Path) -> None:
    """Write tensors and plain values; raises UserError when the disk does not take them."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(Path(path)) as file:
        file.write(buffer.getbuffer())


def save_text(text: str, path: Path) -> None:
    with replacing(Path(path)) as file:
        file.write(text.encode())


def save_json(content: Any, path: Path) -> None:
    save_text(json.dumps(content, indent=2) + "\n", path)


def save_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write dicts as a CSV file with a header; a row may lack what others have."""
    text = io.StringIO()
    fields = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save_text(text.getvalue(), path)


# ---------------------------------------------------------------- reading


def load(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a file of ours onto the CPU; raises UserError when it is missing, cut off, or lacks one of `keys`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}{_siblings(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read: it is cut off or no checkpoint of plain tensors ({type(error).__name__}): make it again, or save model.state_dict()"
        ) from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} is not the file that is needed here: it lacks {', '.join(missing)}")
    return content


def _siblings(path: Path) -> str:
    """What a folder offers in place of a missing file, for the error message."""
    if not path.parent.is_dir():
        return " (nor its folder)"
    found = sorted(other.name for other in path.parent.glob(f"{path.name.split('_')[0]}_*.pt"))
    return f" (there: {', '.join(found)})" if found else ""


def load_json(path: Path) -> dict[str, Any]:
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def load_dense(folder: Path, epoch: int | None = None) -> dict[str, Any]:
    """Read the weights after `epoch` epochs of a finished dense run, by default after the last one.

    Adds `result`, the content of result.json. Raises UserError when the run is unfinished or the epoch was not kept.
    """
    folder = Path(folder)
    if not (folder / "result.json").is_file():
        state = (
            "is not finished: run train_dense.py again" if (folder / "arguments.json").is_file() else "is no dense run"
        )
        raise UserError(f"{folder} {state} (no result.json)")
    result = load_json(folder / "result.json")
    if result.get("stage") != "train_dense":
        raise UserError(f"{folder} holds a run of {result.get('stage')}.py, not a dense run")
    epoch = result["arguments"]["epochs"] if epoch is None else epoch
    path = epoch_file(folder, epoch)
    if not path.is_file():
        kept = ", ".join(str(int(other.stem.split("_")[1])) for other in sorted(folder.glob("epoch_*.pt")))
        raise UserError(
            f"{folder} kept no weights after epoch {epoch}: it has {kept or 'none'} (see train_dense.py --save-epochs)"
        )
    dense = load(path, WEIGHTS) | {"result": result, "sha256": digest(path)}
    if not all(value.isfinite().all() for value in dense["state_dict"].values()):
        raise UserError(f"the weights of {path} are not finite: training diverged, so train it with a lower --lr")
    return dense


def digest(path: Path) -> str:
    """The first 16 hex digits of a file's SHA-256: tells a later call whether its inputs are the same."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            checksum.update(chunk)
    return checksum.hexdigest()[:16]


# ---------------------------------------------------------------- run folders


def recorded(folder: Path) -> dict[str, Any]:
    """The arguments of the experiment that `folder` holds; none where it holds none yet."""
    path = Path(folder) / "arguments.json"
    return load_json(path) if path.is_file() else {}


def is_finished(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether `folder` holds the finished run that `arguments` describe.

    Raises UserError when it holds a different experiment, naming the difference, or foreign files.
    """
    folder = Path(folder)
    if before := recorded(folder):
        now = json.loads(json.dumps(arguments))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            differences = ", ".join(f"{key} is {before.get(key)} there and {now.get(key)} here" for key in changed)
            raise UserError(f"{folder} holds another experiment ({differences}): choose another --out or remove it")
    elif folder.exists() and (
        not folder.is_dir() or any(not entry.name.endswith(".tmp") for entry in folder.iterdir())
    ):
        raise UserError(f"{folder} exists and holds no run of this project: choose another --out")
    return (folder / "result.json").is_file()


def claim(folder: Path, arguments: dict[str, Any]) -> None:
    """Record in `folder`, before anything else, which experiment it holds; clear what a killed writer left."""
    folder = Path(folder)
    remove(folder.glob(".*.tmp"))
    if not (folder / "arguments.json").is_file():
        save_json(arguments, folder / "arguments.json")


def finish(
    folder: Path,
    stage: str,
    arguments: dict[str, Any],
    rows: list[dict[str, Any]],
    device: torch.device,
    precision: str,
    **more: Any,
) -> None:
    """Write log.csv and then, last of all, result.json of a run: arguments, final metrics, seconds, environment."""
    folder = Path(folder)
    save_csv(rows, folder / "log.csv")
    seconds = sum(row["seconds"] for row in rows)
    result = {
        "stage": stage,
        "arguments": arguments,
        **more,
        **metrics(rows[-1]),
        "seconds": seconds,
        "precision": precision,
    }
    save_json(result | environment(device), folder / "result.json")
    remove([folder / "resume.pt"])


def metrics(row: dict[str, Any]) -> dict[str, float]:
    """Losses and accuracies of an epoch, on training and test images; None for NaN and inf, which JSON has not."""
    found = {key: value for key, value in row.items() if key.startswith(("train_", "test_"))}
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside its arguments: device, threads, processes and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {package: metadata.version(package) for package in ("torch", "torchvision", "numpy", "scipy")}
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "processes": distributed.PROCESSES,
        "versions": {"python": platform.python_version()} | versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
