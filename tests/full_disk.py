"""A disk that is full, for one process: by a bound on the size of its files (setrlimit(2)).

A write beyond the bound fails as on a disk without room: with an error, not with a signal, since
Python ignores SIGXFSZ.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_room_beyond(size: int, pid: int = 0) -> Iterator[None]:
    """No file of the process (0: this one) grows beyond ``size`` bytes."""
    pid = pid or os.getpid()
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
