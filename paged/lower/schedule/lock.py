"""A lock between processes, held by the operating system, which lets go of it when its owner dies."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import IO

if sys.platform == "win32":
    import msvcrt

    def _hold(file: IO[bytes]) -> None:
        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            except OSError:  # ten seconds have passed
                continue

else:
    import fcntl

    def _hold(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold the lock that a file stands for, between threads and between processes. The file is made, and stays: were it
    deleted, one process could hold the lock of the old file while another holds that of a new one."""
    with open(path, "ab") as file:
        _hold(file)
        yield
