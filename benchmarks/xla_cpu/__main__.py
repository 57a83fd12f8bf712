"""The one command: runs every section in child processes, one core and all cores, and prints the tables."""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import jax

from .inputs import KV_HEADS
from .measure import Row
from .plot import plot
from .tables import tables

# Section and settings. Writing and the invariants are about one core's work.
_RUNS = (
    ("decode", ("one", "all")),
    ("invariants", ("one",)),
    ("prefill", ("one", "all")),
    ("gradient", ("one", "all")),
    ("write", ("one",)),
)
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false"
_DEVICES = "--xla_force_host_platform_device_count"


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xla_cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a subset, in about a minute")
    parser.add_argument("--only", choices=[section for section, _ in _RUNS], action="append", help="only this section")
    parser.add_argument("--json", type=pathlib.Path, help="write every row here")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the decode table here (PNG; needs matplotlib)")
    options = parser.parse_args()
    rows, start = [], time.perf_counter()
    for section, settings in _RUNS:
        if options.only is None or section in options.only:
            for cores in settings:
                rows += _run(section, cores, options.quick)
    machine = _machine()
    print(f"All figures are *measured*, on {machine}; {time.perf_counter() - start:.0f} s.\n")
    print(tables(rows))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": [vars(row) for row in rows]}, indent=1))
    if options.plot:
        print(plot(rows, options.plot))


def _run(section: str, cores: str, is_quick: bool) -> list[Row]:
    """One child process: pinned before it starts, because its libraries count CPUs when they load."""
    environment = dict(os.environ)
    can_pin = hasattr(os, "sched_setaffinity")
    allowed = os.sched_getaffinity(0) if can_pin else set()
    if cores == "one":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()
        if can_pin:
            os.sched_setaffinity(0, {max(allowed)})
    else:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_DEVICES}={_devices()}".strip()
    command = [sys.executable, "-m", f"{__package__}.worker", section, cores, "quick" if is_quick else "full"]
    try:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        if can_pin:
            os.sched_setaffinity(0, allowed)
    output, _ = child.communicate()
    rows = [Row(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]
    if child.returncode:
        rows.append(Row(section, "", "", cores, note=f"the child process ended with status {child.returncode}"))
    return rows


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> int:
    """One device per core, as far as KV heads can be shared by them."""
    return max(n for n in range(1, _cores() + 1) if KV_HEADS % n == 0)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{_cores()} cores of {model}, Python {platform.python_version()}, jax {jax.__version__}"


if __name__ == "__main__":
    main()
