"""What analyses keep so that a second call is quick, named by all that it depends on."""

import ast
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from common import checkpoint, paths, provenance
from common.errors import UserError

LOOKS = ("style", "panels")  # of figures, which no result depends on


@functools.cache
def code_digest(script: str) -> str:
    """8 hex digits of the code of a command, of common/ and of analyze/lib, but for its looks."""
    files = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in LOOKS]
    trees = [ast.dump(ast.parse(path.read_text())) for path in files]
    text = "\n".join([provenance.code_digest(script), *trees])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def place(script: str, kind: str, files: list[Path], *settings: Any, suffix: str = ".csv") -> Path:
    """Where what `script` makes of `files` is kept: beside the last of them.

    Raises UserError when one is missing.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"no such file: {file}")
    made_of = "".join(checkpoint.digest(file)[:8] for file in files)
    made_by = code_digest(script), made_of, *settings
    return paths.cache_file(files[-1], kind, *made_by, suffix=suffix)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The table (.csv) or dict of tensors (.pt) in `path`, made by `make` where it is not there."""
    table = path.suffix == ".csv"
    if not path.is_file():
        made = make()
        if table:
            checkpoint.save_text(made.to_csv(index=False), path)
        else:
            checkpoint.save(made, path)
    return pd.read_csv(path) if table else checkpoint.load(path)
