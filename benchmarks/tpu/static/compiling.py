"""Compile one call for a TPU generation, in a process of its own, and keep the compiler's dumps."""

import dataclasses
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from .chips import CHIPS

Target = str | Callable[..., Any]

_ROOT = pathlib.Path(__file__).resolve().parents[3]
_LABELS = r"(^final_)|(^assembly$)|(^hlo-static-bundle-profile$)"  # a plain dump has some 70 files for each operation
_FATAL = re.compile(r"^[FE]\d{4}.*|.*Check failed.*|.*Mosaic failed.*", re.M)
SCALARS, PROGRAM = "scalars.npz", "program.hlo"


@dataclasses.dataclass
class Compiled:
    """How compiling went: ``info`` has the versions, ``error`` says why there are no dumps."""

    ok: bool
    error: str
    seconds: float
    info: dict[str, Any]


def compile_with_dumps(
    target: Target,
    generation: str,
    kwargs: Mapping[str, Any],
    folder: pathlib.Path,
    *,
    scalars: bool,
    simulate: bool = False,
    flags: str = "",
    timeout: float = 1800,
) -> Compiled:
    """Compile what a builder makes, and leave the dumps in ``folder``.

    **Arguments:**

    - `target`: the builder, as `model` takes it.
    - `generation`: one of `CHIPS`.
    - `kwargs`: the builder's arguments; JSON can hold them.
    - `folder`: where the dumps go; it exists.
    - `scalars`: whether the kernels' integer operands are kept too.
    - `simulate`: whether libtpu estimates cycles itself; it crashes on some kernels.
    - `flags`: more of libtpu's flags.
    - `timeout`: seconds, for everything that the process does.

    **Returns:** how it went. An error of the builder or of the compiler is a result; nothing raises.
    """
    result, log = folder / "result.json", folder / "log.txt"
    task = {
        "target": target_name(target),
        "folder": os.getcwd(),
        "kwargs": dict(kwargs),
        "topology": CHIPS[generation].topology,
        "result": str(result),
        "program": str(folder / PROGRAM),
        "scalars": str(folder / SCALARS) if scalars else "",
    }
    (folder / "task.json").write_text(json.dumps(task))
    command = ["nice", "-n", "10", sys.executable, "-m", f"{__package__}.worker", str(folder / "task.json")]
    environment = {**os.environ, **_environment(), "LIBTPU_INIT_ARGS": _flags(folder, simulate, flags)}
    with log.open("w") as output:
        try:
            child = subprocess.run(
                command, cwd=_ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return Compiled(False, f"timeout after {timeout:.0f} s", 0.0, {})
    if result.exists():
        info = json.loads(result.read_text())
        return Compiled(info["ok"], info.get("error", ""), info.get("compile_seconds", 0.0), info)
    said = log.read_text(errors="replace")[-3000:]
    fatal = _FATAL.search(said)
    reason = fatal.group() if fatal else said[-400:]
    return Compiled(False, f"the compiler's process ended with status {child.returncode}: {reason}", 0.0, {})


def target_name(target: Target) -> str:
    """``"/path/of/file.py:builder"`` or ``"module:builder"``."""
    if callable(target):
        return f"{inspect.getsourcefile(target)}:{target.__qualname__}"
    where, _, name = target.rpartition(":")
    return f"{pathlib.Path(where).resolve()}:{name}" if where.endswith(".py") else target


def _environment() -> dict[str, str]:
    """No TPU is looked for, and several processes may compile at a time."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": os.environ.get("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _flags(folder: pathlib.Path, simulate: bool, more: str) -> str:
    """libtpu's flags: the few dumps that are read, with the source line of every instruction."""
    return " ".join(
        [
            f"--xla_jf_dump_to={folder}",
            f"--xla_jf_dump_llo_pass_label_regex={_LABELS}",
            "--xla_mosaic_enable_llo_source_annotations=true",
            *([f"--xla_jf_dump_static_llo_profile_to={folder}"] if simulate else []),
            *([more] if more else []),
        ]
    )
