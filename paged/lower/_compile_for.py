"""`compile_for`: compile a call with the compiler of a TPU or a GPU, on any machine, for any of their generations."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from paged.spec import Pages, RaggedBatch, Sinks

from ._around import Around
from ._compile_gpu import CompilerFailed, GpuProgram, compile_on_gpu
from .attend import Attend
from .base import Schedule
from .gpu_targets import GPU_TARGETS
from .jax_version import abstract_device
from .program import Call
from .require import require_queries, require_type
from .tpu import CHIPS, Chip, chip_named

# With these variables libtpu loads where there is no TPU, and in several processes at once.
_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled call, as `compile_for` reports it.

    * ``generation``: the generation of chips that it is compiled for.
    * ``lowering``, ``schedule``: what was compiled.
    * ``argument_bytes``, ``output_bytes``: device memory of the arguments and of the results.
    * ``temporary_bytes``: device memory besides these.
    * ``code_bytes``: the size of the compiled program.
    * ``around``: on a TPU, what XLA runs around the kernels: operations, loops, sorts, copies, and the bytes that they
      write. None for a GPU.
    * ``gpu``: for a GPU, its launches, loops and kernels. None for a TPU.
    """

    generation: str
    lowering: str
    schedule: Schedule
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    around: Around | None
    gpu: GpuProgram | None = None


class CompileError(RuntimeError):
    """The compiler refused a call.

    ``generation`` and ``schedule`` are what it was asked to compile; ``reason`` is the compiler's own message.
    """

    def __init__(self, generation: str, schedule: Schedule, reason: str):
        super().__init__(f"{generation} cannot compile the schedule {schedule}: {reason}")
        self.generation, self.schedule, self.reason = generation, schedule, reason


def compile_for(
    attend: Attend,
    generation: str,
    q: Any,
    pages: Pages,
    batch: RaggedBatch,
    sinks: Sinks | jax.ShapeDtypeStruct | None = None,
    *,
    new: tuple[Any, Any] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a call ahead of time for a generation of TPUs or GPUs. It needs their compiler, and no chip.

    The TPU compiler is the package ``libtpu``. For GPUs the extra ``gpu-compile`` brings it, see docs/gpu.md. It runs
    in a process of its own, because a kernel that a chip cannot do may end the process.

    The schedule is the one that would run on that chip: the caller's own if `lower` was given one, else the choice of
    contexts, tuning file and heuristic.

    **Arguments:**

    - `attend`: the lowered attention.
    - `generation`: ``"v4"``, ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``; ``"a100"``, ``"h100"``, ``"h200"`` or
      ``"b200"``.
    - `q`, `pages`, `batch`, `sinks`: the arguments of ``attend(q, pages, batch, sinks)``. Arrays may be
      ``jax.ShapeDtypeStruct``: only shapes and dtypes matter.
    - `new`: ``(k, v)``, to compile ``attend.update(q, k, v, pages, batch, sinks)`` with donated pages instead.
    - `compiler_options`: XLA's options, as ``jax.jit`` accepts them, such as `GPU_GRAPHS`.

    **Returns:** a `Compiled`: what was compiled, and how much memory it needs.

    Raises ``TypeError`` for arguments of other types; `CompileError` with the compiler's message; ``ImportError``
    without the compiler; and ``ValueError`` for an unknown generation or a call that no lowering accepts.

    >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
    >>> layout = PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
    >>> batch = RaggedBatch.decode(lengths=[40, 7], block_tables=[[3, 11, 5], [4, -1, -1]])
    >>> q = jax.ShapeDtypeStruct((2, 8, 128), jnp.bfloat16)
    >>> compiled = compile_for(lower(spec, layout, target="tpu"), "v5e", q, layout.init(num_pages=16), batch)
    >>> print(compiled.schedule)
    tpu-decode(pages_per_block=3, buffers=8)
    """
    require_generation(generation)
    require_type("attend", attend, Attend)
    require_queries(attend.spec, q, batch)
    require_type("pages", pages, Pages)
    if new is not None and not (isinstance(new, tuple) and len(new) == 2):
        raise TypeError(f"new must be (k, v), this step's keys and values; got {type(new).__name__}.")
    attend = attend.on_chip(generation)
    lowering, schedule, _ = attend.choice(Call.of(q, pages, batch))
    args = (q, pages, batch, sinks) if new is None else (q, *new, pages, batch, sinks)
    donated, options = None if new is None else 3, dict(compiler_options or {})
    call = attend.__call__ if new is None else attend.update
    if generation in GPU_TARGETS:
        return _for_gpu(generation, lowering.name, schedule, jax.jit(call), donated, args, options)
    function = jax.jit(call, donate_argnums=donated, compiler_options=options)
    try:
        compiled = compile_on(chip_named(generation), function, *args)
    except ImportError:
        raise
    except Exception as error:  # Mosaic and XLA raise many kinds, none of them public
        raise CompileError(generation, schedule, str(error)) from error
    memory: Any = compiled.memory_analysis()
    return Compiled(
        generation,
        lowering.name,
        schedule,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        Around.of(compiled.as_text()),
    )


def require_generation(generation: Any) -> None:
    """A ``ValueError`` that lists the known generations, for another one."""
    known = sorted({*CHIPS, *GPU_TARGETS})
    if not isinstance(generation, str) or generation not in known:
        raise ValueError(f"generation must be one of {known}; got {generation!r}.")


def _for_gpu(
    generation: str,
    name: str,
    schedule: Schedule,
    function: Any,
    donated: int | None,
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> Compiled:
    try:
        sizes, program = compile_on_gpu(GPU_TARGETS[generation], function, donated, *args, options=options)
    except CompilerFailed as error:
        raise CompileError(generation, schedule, str(error)) from error
    memory = (sizes[kind] for kind in ("argument", "output", "temp", "generated_code"))
    return Compiled(generation, name, schedule, *memory, around=None, gpu=program)


def compile_on(chip: Chip, function: Any, *args: Any) -> Any:
    """Compile a jitted function ahead of time; of its arguments only shapes and dtypes matter."""
    device = _topology(chip.topology).devices[0]
    sharding = SingleDeviceSharding(device)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    # Pallas asks the mesh, and where there is none the process, which chip it lowers for.
    kind = abstract_device(device.device_kind, chip.cores, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        return function.lower(*abstract).compile()


def _topology(name: str) -> Any:
    added = {key: value for key, value in _WITHOUT_A_TPU.items() if key not in os.environ}
    os.environ.update(added)
    try:
        return topologies.get_topology_desc(name, platform="tpu")
    except Exception as error:
        raise ImportError(
            f"The TPU compiler did not load: {error}. It comes with `pip install libtpu`, or this package's extra "
            '"tpu-compile".'
        ) from error
    finally:
        for key in added:
            del os.environ[key]
