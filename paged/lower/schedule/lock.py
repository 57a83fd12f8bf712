"""A lock between processes. The operating system holds it, and releases it when its owner dies."""

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
            except OSError:  # Windows gives up after ten seconds: ask again
                continue

else:
    import fcntl

    def _hold(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold a lock, named by a file, against other threads and other processes.

    The file is created and never deleted: otherwise one process could lock the deleted file while another locks a new
    file of that name.
    """
    with open(path, "ab") as file:
        _hold(file)
        yield
