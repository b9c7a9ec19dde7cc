"""The exception for errors that the user can fix, and one-line messages for them."""

import errno

import torch

# Errors of the environment: permissions, full or failing disks, quotas, mounts, process limits.
ENVIRONMENT = "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO ESTALE EMFILE ENAMETOOLONG ENOTDIR EISDIR"
ENVIRONMENT = {getattr(errno, name) for name in ENVIRONMENT.split()}


class UserError(Exception):
    """An error that the user can fix; its one-line message names the cause and the fix."""


def explain(error: BaseException) -> str | None:
    """Return a one-line message for an error that the user can fix, None for a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    if "Connection closed by peer" in str(error):  # raised by gloo
        return "another process of this run ended: its message says why"
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))  # CUDA, NumPy
    if out_of_memory or "can't allocate memory" in str(error):  # torch on the CPU
        details = ". ".join(str(error).rpartition("Allocator: ")[2].split(". ")[:2])
        fix = "use smaller batches, a smaller width or fewer runs in parallel"
        return f"out of memory: {fix} ({details or 'Python'})"
    return None
