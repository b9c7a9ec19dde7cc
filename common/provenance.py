"""What produced a result: the code, the git commit and the machine."""

import ast
import contextlib
import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import PIL
import torch

from common.runtime import distributed

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def code_digest(script: str, folder: str = "common") -> str:
    """Return 12 hex digits that identify the code of a script and of all modules in a folder.

    Hashes the syntax trees without docstrings, so comments and formatting do not matter.
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
    """The git commit of this checkout, plus `-dirty` if files were changed; None outside of git."""
    if not (ROOT / ".git").exists():  # git would search the parent folders for another repository
        return None
    command = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


def stamp(script: str) -> dict[str, Any]:
    """`code` and `commit`, which every .pt file and result.json records."""
    return {"code": code_digest(script), "commit": commit()}


def environment(device: torch.device) -> dict[str, Any]:
    """What else can change a result: device, number of threads and processes, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("torch", "torchvision", "numpy", "scipy", "matplotlib")
    versions = {package: metadata.version(package) for package in packages}
    versions["pillow"] = PIL.__version__  # also if it is pillow-simd
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "processes": distributed.WORLD_SIZE,
        "versions": {"python": platform.python_version()} | versions,
    }


def _processor() -> str:
    """The model name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
