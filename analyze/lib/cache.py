"""What analyses keep so that a second call is quick, named by the code that made it."""

import ast
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from common import checkpoint, provenance

LOOKS = ("style", "panels")  # of figures, which no result depends on


@functools.cache
def code_digest(script: str) -> str:
    """8 hex digits of the code of a command, of common/ and of analyze/lib, but for its looks."""
    files = [path for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in LOOKS]
    trees = [ast.dump(ast.parse(path.read_text())) for path in files]
    text = "\n".join([provenance.code_digest(script), *trees])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in `path`, which `make` makes where it is not there yet."""
    if not path.is_file():
        checkpoint.save_text(make().to_csv(index=False), path)
    return pd.read_csv(path)
