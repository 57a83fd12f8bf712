"""How a row is taken: one candidate on one shape and generation, compiled and modelled in a process of its own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import TypeVar

from .row import Row

ROOT = pathlib.Path(__file__).resolve().parents[2]
_START = "{"

RowT = TypeVar("RowT", bound=Row)


def measure(row: type[RowT], benchmark: str, key: tuple[str, str, str], timeout: float) -> RowT:
    """Run the benchmark's worker on ``(shape, generation, candidate)``.

    End it, with everything that it started, when it takes longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_benchmark_") as scratch:
        child = subprocess.Popen(
            [sys.executable, "-m", f"{benchmark}.worker", *key, str(timeout)],
            cwd=ROOT,  # where the benchmarks are imported from
            env={**os.environ, "TMPDIR": scratch},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return row(*key, f"timeout after {timeout:.0f} s")
        except BaseException:  # the user's interrupt, which a process group of its own doesn't see
            os.killpg(child.pid, signal.SIGKILL)
            raise
    lines = [line for line in output.splitlines() if line.startswith(_START)]
    if lines:
        return row(**json.loads(lines[-1]))
    return row(*key, f"the process ended with status {child.returncode}: {errors[-300:]}")
