"""Names of all files and folders that the stages write; no other module builds or parses them."""

import contextlib
from pathlib import Path
from typing import Any


def format_sparsity(sparsity: float) -> str:
    """0.9 -> '0.90', 0.995 -> '0.995': all decimals, at least two."""
    return max(f"{sparsity:.2f}", f"{sparsity:.10g}", key=len)


def dense_folder(out: Path, seed: int) -> Path:
    return out / f"seed{seed}"


def epoch_file(folder: Path, epoch: int) -> Path:
    """Weights of a dense run after `epoch` epochs."""
    return folder / f"epoch_{epoch:04d}.pt"


def epoch_files(folder: Path) -> dict[int, Path]:
    """Saved weights of a dense run, by epoch."""
    return _numbered_files(folder, "epoch", int)


def mask_file(folder: Path, sparsity: float) -> Path:
    return folder / f"mask_{format_sparsity(sparsity)}.pt"


def mask_files(folder: Path) -> list[Path]:
    return [*_numbered_files(folder, "mask", float).values()]


def imp_file(folder: Path, sparsity: float) -> Path:
    """The network that IMP pruned to a sparsity."""
    return folder / f"sparse_{format_sparsity(sparsity)}.pt"


def imp_files(folder: Path) -> dict[float, Path]:
    """Networks that IMP pruned, by sparsity."""
    return _numbered_files(folder, "sparse", float)


def round_file(folder: Path, number: int) -> Path:
    """The network after round `number` of an IMP chain."""
    return Path(folder) / f"round_{number:02d}.pt"


def round_files(folder: Path) -> dict[int, Path]:
    """Saved networks of an IMP chain, by round."""
    return _numbered_files(folder, "round", int)


def _numbered_files(folder: Path, prefix: str, number_type: type) -> dict[Any, Path]:
    """Files named PREFIX_NUMBER.pt, by ascending number; other files, as copies, are skipped."""
    files = {}
    for path in folder.glob(f"{prefix}_*.pt"):
        with contextlib.suppress(ValueError):
            files[number_type(path.stem.removeprefix(f"{prefix}_"))] = path
    return dict(sorted(files.items()))


def permutation_file(folder: Path, mask_name: str | None = None) -> Path:
    """The permutation for all masks of a folder, or for the mask file `mask_name` alone."""
    return folder / (mask_name.replace("mask", "permutation") if mask_name else "permutation.pt")


def permutation_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("permutation*.pt"))


def sparse_folder(out: Path, sparsity: float, rewind: int) -> Path:
    """Folder of the sparse run for a sparsity and a rewind epoch."""
    return out / f"s{format_sparsity(sparsity)}_k{rewind:03d}"


def final_file(folder: Path) -> Path:
    """The network of a finished sparse run; a run that diverged has none."""
    return folder / "final.pt"


def sparsity_of(path: Path) -> float | None:
    """The sparsity in a mask, IMP or permutation file's name; None if it is for all of them."""
    _, _, sparsity = path.stem.partition("_")
    return float(sparsity) if sparsity else None
