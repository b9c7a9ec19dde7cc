"""The one exception for what a user can mend, and how errors are told."""

import errno

import torch

# What disks, quotas, mounts and limits of a process answer with.
ENVIRONMENT = "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO ESTALE EMFILE ENAMETOOLONG ENOTDIR EISDIR"
ENVIRONMENT = {getattr(errno, name) for name in ENVIRONMENT.split()}


class UserError(Exception):
    """A problem that the user can mend; its message names the thing and the mend, on one line."""


def explain(error: BaseException) -> str | None:
    """One line for what the user can mend, or None for a bug of ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    if "Connection closed by peer" in str(error):  # gloo's word for it
        return "another process of this run ended: its message says why"
    no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))  # of a GPU, and numpy's
    if no_memory or "can't allocate memory" in str(error):  # torch's on a CPU
        what = ". ".join(str(error).rpartition("Allocator: ")[2].split(". ")[:2])
        mend = "use smaller batches, a smaller width or fewer side by side"
        return f"out of memory: {mend} ({what or 'Python'})"
    return None
