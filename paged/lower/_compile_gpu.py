"""Compiling for a GPU that need not be there: the process that compiles, and what its program consists of."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from jax import export

from .gpu_targets import GpuTarget
from .jax_version import abstract_device

# Seconds that one call may compile. A kernel that is wrong may keep a compiler busy for ever.
PATIENCE = 900
_INSTALL = (
    'pip install "paged[gpu-compile]", which brings jax-cuda13-plugin and jax-cuda13-pjrt (of the version of JAX that '
    "is installed), nvidia-cuda-nvcc and flatbuffers"
)
_THUNK = re.compile(r"^( *)\d+: k(\w+) ")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_DYNAMIC = re.compile(r": kCustomKernel .*?\] (\S+) grid: .*shared_memory: (\d+) bytes")
# In the text of a compiled program: where a computation begins, and which computations an operation runs.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) .*\{$")
_RUNS_OTHERS = re.compile(r" (while|conditional|call|async-start)\(")
_RUN = re.compile(
    r"(?:condition|body|branch_computations|true_computation|false_computation|calls|to_apply)=(\{[^}]*\}|[%\w.-]+)"
)
# What runs nothing on the GPU, or runs what is listed below it.
_NO_LAUNCH = ("While", "Conditional", "CommandBuffer", "Sequential")


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """One kernel of a compiled program: its registers, bytes that it spills, and shared memory of a block of threads.

    Shared memory that a Pallas kernel asks for when it is launched is not in it; `Attend.explain` tells that.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class GpuProgram:
    """What a compiled program consists of, counted from XLA's list of what it launches, and by ``ptxas``.

    * ``launches``: kernels, copies and fills outside of loops and branches.
    * ``launches_in_loops``: those inside, each counted once.
    * ``loops``: loops.
    * ``host_steered``: loops and branches for which the host waits for a number from the GPU: a loop before every turn.
      A loop that XLA knows the number of turns of is none: the host launches each turn, and waits for nothing. A loop
      inside of a CUDA graph is none either: the GPU counts its turns.
    * ``kernels``: every kernel that was compiled. Launches of equal code share one.
    """

    launches: int
    launches_in_loops: int
    loops: int
    host_steered: int
    kernels: tuple[GpuKernel, ...]


class CompilerFailed(Exception):
    """The compiler refused, ended or hung; the text says which."""


def compile_on_gpu(
    target: GpuTarget, function: Any, donated: int | None, *args: Any, options: Mapping[str, Any] | None = None
) -> tuple[Any, GpuProgram]:
    """Compile ``function(*args)``, with argument number ``donated`` donated. Only their shapes and dtypes matter.

    ``options`` are XLA's, as `jax.jit` accepts them.

    **Returns:** the sizes of its memory by name, and what it consists of. Raises ``ImportError`` without the compiler,
    and `CompilerFailed`.
    """
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise ImportError(f"The GPU compiler is not installed: {_INSTALL}.")
    with tempfile.TemporaryDirectory(prefix="paged-gpu-") as name:
        folder = pathlib.Path(name)
        _write_task(folder, target, function, donated, args, dict(options or {}))
        return _compiled(folder)


def _write_task(
    folder: pathlib.Path,
    target: GpuTarget,
    function: Any,
    donated: int | None,
    args: Any,
    options: dict[str, Any],
) -> None:
    """The function of flat arguments, exported. So the other process needs none of the caller's classes."""
    flat, tree = jax.tree.flatten(args)
    sizes = [len(jax.tree.leaves(arg)) for arg in args]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
    run = lambda *leaves: jax.tree.leaves(function(*tree.unflatten(leaves)))
    # Pallas asks the mesh which chip it lowers for.
    kind = abstract_device(target.device_kinds[0], None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        exported = export.export(jax.jit(run), platforms=["cuda"])(*shapes)
    (folder / "function.bin").write_bytes(exported.serialize())
    (folder / "target.txt").write_text(target.text)
    first = 0 if donated is None else sum(sizes[:donated])
    which = [] if donated is None else list(range(first, first + sizes[donated]))
    (folder / "task.json").write_text(json.dumps({"donated": which, "options": options}))


def _compiled(folder: pathlib.Path) -> tuple[Any, GpuProgram]:
    dumps = folder / "dumps"
    dumps.mkdir()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dumps} --xla_dump_emitter_re=.*"
    package = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    env |= {"MOSAIC_GPU_DUMP_TO": str(dumps), "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-m", "paged.lower._gpu_worker", str(folder)]
    try:
        ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, cwd=folder)
    except subprocess.TimeoutExpired:
        raise CompilerFailed(f"the compiler did not end in {PATIENCE} seconds.") from None
    result = folder / "result.json"
    if not result.exists():
        raise CompilerFailed(f"the compiler's process ended with status {ended.returncode}: {ended.stderr[-2000:]}")
    told = json.loads(result.read_text())
    if "missing" in told:
        raise ImportError(f"The GPU compiler did not load: {told['missing']} It comes with {_INSTALL}.")
    if "refused" in told:
        raise CompilerFailed(told["refused"])
    return told["sizes"], _program(dumps, told["text"])


def _program(dumps: pathlib.Path, text: str) -> GpuProgram:
    # Of several programs the largest is the function; others make constants. The last list has CUDA graphs.
    lists = [sorted(dumps.glob(f"*thunk_sequence{end}.txt"), key=_size) for end in ("", "_after_thunk_passes")]
    listed = next((found[-1].read_text() for found in reversed(lists) if found), "")
    counts = {"launches": 0, "launches_in_loops": 0, "loops": 0, "host_steered": 0}
    depth_of_loop, depth_of_graph, is_known = None, None, _known_loops(text)
    if len(is_known) != len(re.findall(r"^ *\d+: kWhile ", listed, re.M)):
        is_known = []  # the two lists cannot be matched: then no loop is taken as known
    for line in listed.splitlines():
        found = _THUNK.match(line)
        if found is None:
            continue
        depth, kind = len(found.group(1)), found.group(2)
        depth_of_loop = None if depth_of_loop is not None and depth <= depth_of_loop else depth_of_loop
        depth_of_graph = None if depth_of_graph is not None and depth <= depth_of_graph else depth_of_graph
        if kind in ("While", "Conditional"):
            is_steered = kind == "Conditional" or not is_known or not is_known[counts["loops"]]
            counts["loops"] += kind == "While"
            counts["host_steered"] += depth_of_graph is None and is_steered
            depth_of_loop = depth if depth_of_loop is None else depth_of_loop
        elif kind == "CommandBuffer":
            depth_of_graph = depth if depth_of_graph is None else depth_of_graph
        elif kind not in _NO_LAUNCH:
            counts["launches" if depth_of_loop is None else "launches_in_loops"] += 1
    return GpuProgram(**counts, kernels=tuple(_kernels(dumps, listed)))


def _known_loops(text: str) -> list[bool]:
    """Whether XLA knows the number of turns: for each loop of a compiled program, in the order of running."""
    computations: dict[str, list[str]] = {}
    name, entry, found = "", "", []
    for line in text.splitlines():
        begins = _COMPUTATION.match(line)
        if begins is not None:
            name = begins.group(2)
            entry = name if begins.group(1) else entry
        elif _RUNS_OTHERS.search(line):
            computations.setdefault(name, []).append(line)

    def walk(name: str) -> None:
        for line in computations.get(name, ()):
            if " while(" in line:
                found.append("known_trip_count" in line)
            for names in _RUN.findall(line):
                for one in re.findall(r"[\w.-]+", names):
                    walk(one)

    walk(entry)
    return found


def _size(file: pathlib.Path) -> int:
    return file.stat().st_size


def _kernels(dumps: pathlib.Path, listed: str) -> list[GpuKernel]:
    """What ``ptxas`` says of every kernel. Shared memory is what the code names and what a launch adds to it."""
    added = {name: int(size) for name, size in _DYNAMIC.findall(listed)}
    ptxas, found = _ptxas(), []
    for file in sorted(dumps.glob("*.ptx")):
        target = re.search(r"^\.target (\w+)", file.read_text(), re.M)
        command = [ptxas, "-v", f"-arch={target.group(1) if target else 'sm_90'}", str(file), "-o", os.devnull]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        told = ended.stderr
        if ended.returncode:
            raise CompilerFailed(f"{ptxas} ended with status {ended.returncode}: {told[-2000:]}")
        names = list(_ENTRY.finditer(told))
        ends = [one.start() for one in names[1:]] + [len(told)]
        for one, end in zip(names, ends, strict=False):
            part = told[one.end() : end]
            spilled, used = _STACK.search(part), _USED.search(part)
            if used is None:
                continue
            spills = sum(map(int, spilled.groups())) if spilled else 0
            shared = int(used.group(2) or 0) + added.get(one.group(1), 0)
            found.append(GpuKernel(one.group(1), int(used.group(1)), spills, shared))
    return found


def _ptxas() -> str:
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations or ()) if spec else ()
    folders = [pathlib.Path(place) / "cu13/bin" for place in places]
    found = next((str(folder / "ptxas") for folder in folders if (folder / "ptxas").exists()), shutil.which("ptxas"))
    if found is None:
        raise ImportError(f"ptxas was not found. It comes with {_INSTALL}.")
    return found
