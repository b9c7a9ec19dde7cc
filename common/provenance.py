"""What made a result: the code, the commit and the machine."""

import ast
import contextlib
import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.runtime import distributed

ROOT = Path(__file__).resolve().parents[1]


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def code_digest(script: str, folder: str = "common") -> str:
    """12 hex digits of the code of a stage's script and of a folder.

    Of the syntax trees without docstrings, so that comments and formatting do not count.
    """
    digest = hashlib.sha256()
    for path in [Path(script), *sorted((ROOT / folder).rglob("*.py"))]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        digest.update(f"{path.name} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


@functools.cache
def commit() -> str | None:
    """The git commit of this checkout, with `-dirty` where it was changed; None outside of git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if Path(_git("rev-parse", "--show-toplevel")).resolve() == ROOT:
            changed = _git("status", "--porcelain", "--untracked-files=no")
            return _git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(changed)
    return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def stamp(script: str) -> dict[str, Any]:
    """`code` and `commit`, as files of tensors and result.json hold them."""
    return {"code": code_digest(script), "commit": commit()}


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside arguments and code: device, threads, processes, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("torch", "torchvision", "numpy", "scipy")
    versions = {package: metadata.version(package) for package in packages}
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "processes": distributed.WORLD_SIZE,
        "versions": {"python": platform.python_version()} | versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
