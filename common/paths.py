"""The names of all files and folders that the stages write: made and read back here alone."""

import contextlib
from pathlib import Path
from typing import Any


def label(sparsity: float) -> str:
    """0.9 -> '0.90', 0.995 -> '0.995': at least two decimals, as many as the number has."""
    return max(f"{sparsity:.2f}", f"{sparsity:.10g}", key=len)


def dense_folder(out: Path, seed: int) -> Path:
    return out / f"seed{seed}"


def epoch_file(folder: Path, epoch: int) -> Path:
    """Weights of a dense run after `epoch` epochs."""
    return folder / f"epoch_{epoch:04d}.pt"


def epoch_files(folder: Path) -> dict[int, Path]:
    """The weights that a dense run kept, by epoch."""
    return _by_number(folder, "epoch", int)


def mask_file(folder: Path, sparsity: float) -> Path:
    return folder / f"mask_{label(sparsity)}.pt"


def mask_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mask_*.pt"))


def imp_file(folder: Path, sparsity: float) -> Path:
    """The network that IMP pruned to a sparsity."""
    return folder / f"sparse_{label(sparsity)}.pt"


def imp_files(folder: Path) -> dict[float, Path]:
    """The networks that an IMP chain pruned, by sparsity."""
    return _by_number(folder, "sparse", float)


def round_file(folder: Path, number: int) -> Path:
    """The network after round `number` of an IMP chain."""
    return Path(folder) / f"round_{number:02d}.pt"


def round_files(folder: Path) -> dict[int, Path]:
    """The networks after each round of an IMP chain that are there, by number."""
    return _by_number(folder, "round", int)


def _by_number(folder: Path, word: str, kind: type) -> dict[Any, Path]:
    """The files word_NUMBER.pt in order; others, as copies of such, are left out."""
    found = {}
    for path in folder.glob(f"{word}_*.pt"):
        with contextlib.suppress(ValueError):
            found[kind(path.stem.removeprefix(f"{word}_"))] = path
    return dict(sorted(found.items()))


def permutation_file(folder: Path, mask: str | None = None) -> Path:
    """The permutation of a folder, or that of the mask file of this name alone."""
    return folder / (mask.replace("mask", "permutation") if mask else "permutation.pt")


def permutation_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("permutation*.pt"))


def sparse_folder(out: Path, sparsity: float, rewind: int) -> Path:
    """The run of stage 4 for a sparsity and a rewind epoch."""
    return out / f"s{label(sparsity)}_k{rewind:03d}"


def final_file(folder: Path) -> Path:
    """The network of a finished run of stage 4; one that diverged has none."""
    return folder / "final.pt"


def sparsity_of(path: Path) -> float | None:
    """The sparsity of a mask, IMP or permutation file; None where it is for all."""
    _, _, sparsity = path.stem.partition("_")
    return float(sparsity) if sparsity else None
