"""Torch's global generator, used by one thread at a time."""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

_alone = threading.RLock()


def _renew() -> None:
    """A process forked while another thread drew would wait for that thread for ever."""
    global _alone
    _alone = threading.RLock()


os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's global CPU generator to `seed` for a while, and for this thread alone."""
    with _alone, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
