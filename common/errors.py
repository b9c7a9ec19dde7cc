"""The one exception for what a user can mend, and how errors are told."""

import torch


class UserError(Exception):
    """A problem that the user can mend; its message names the thing and the mend, on one line."""


def explain(error: BaseException) -> str | None:
    """One line for what the user can mend, or None for a bug of ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, PermissionError):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(
        error
    ):  # GPU, numpy, torch
        return f"out of memory: use smaller batches, a smaller width or fewer side by side ({str(error).partition('. ')[0]})"
    return None
