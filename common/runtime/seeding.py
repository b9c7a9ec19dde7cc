"""Seeding of torch's global CPU generator, by one thread at a time."""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

_lock = threading.RLock()


def _renew_lock() -> None:
    """Replace the lock in a forked child: a thread that held it does not exist there."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator within the block, and exclude other threads from it."""
    with _lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
