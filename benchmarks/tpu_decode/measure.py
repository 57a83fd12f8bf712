"""How a row is taken: one candidate on one shape and generation, compiled and modelled in a process of its own."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = "tpu_static"
_START = "{"


@dataclasses.dataclass
class Row:
    """One candidate on one shape and generation. Every figure is modelled; all of the call's kernels are added up.

    ``needed_cycles`` are those of the visible pages' bytes at the public peak of the device's HBM, ``bundles`` those
    of the busier core. ``error`` says why there is no figure, ``note`` what to know about those that there are.
    ``other_operations`` are XLA's beside the kernels, by name and size in bundles: no figure has their time.
    """

    shape: str
    generation: str
    candidate: str
    error: str = ""
    note: str = ""
    cycles: float = 0.0
    needed_cycles: float = 0.0
    bundles: int = 0
    tokens: int = 0
    read_bytes: int = 0
    visible_bytes: int = 0
    written_bytes: int = 0
    transfers: int = 0
    spills: int = 0
    vmem_bytes: int = 0
    compile_seconds: float = 0.0
    cores: int = 0
    other_operations: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(shape: str, generation: str, candidate: str, timeout: float) -> Row:
    """Run the worker, and end it with everything that it started when it takes longer than ``timeout`` seconds."""
    with tempfile.TemporaryDirectory(prefix="tpu_decode_") as scratch:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "TMPDIR": scratch, "PYTHONPATH": path}
        command = [sys.executable, "-m", f"{__package__}.worker", shape, generation, candidate, str(timeout)]
        child = subprocess.Popen(
            command,
            cwd=ROOT,  # the tool imports the builders from here
            env=environment,
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
            return Row(shape, generation, candidate, f"timeout after {timeout:.0f} s")
        except BaseException:  # the user's interrupt, which a process group of its own doesn't see
            os.killpg(child.pid, signal.SIGKILL)
            raise
    lines = [line for line in output.splitlines() if line.startswith(_START)]
    if lines:
        return Row(**json.loads(lines[-1]))
    return Row(shape, generation, candidate, f"the process ended with status {child.returncode}: {errors[-300:]}")
