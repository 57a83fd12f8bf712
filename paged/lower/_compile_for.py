"""`compile_for`: the real TPU compiler, on any machine, for any generation."""

import dataclasses
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from paged.spec import Pages, RaggedBatch, Sinks

from .attend import Attend
from .base import Schedule
from .program import Call
from .tpu import Chip, chip_named

# What lets libtpu load where there is no TPU, and in several processes at once.
_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a call: which lowering and schedule, and how many bytes of what.

    ``temporary_bytes`` is device memory besides arguments and results; ``code_bytes`` is the program's size.
    """

    generation: str
    lowering: str
    schedule: Schedule
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int


class CompileError(RuntimeError):
    """The compiler refused a call. ``schedule`` is what it was asked to compile, ``generation`` for what."""

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
) -> Compiled:
    """Compile ``attend(q, pages, batch, sinks)`` ahead of time for a TPU generation.

    With ``new=(k, v)`` it is ``attend.update`` that is compiled, with donated pages. ``generation`` is ``"v4"``,
    ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``. Arrays may be ``jax.ShapeDtypeStruct``s:
    only shapes and dtypes count. Needs the package ``libtpu``, and no TPU. The schedule is what would be chosen on that
    chip, unless the caller's own was given to `lower`.

    Raises `CompileError` with the compiler's own words, ``ImportError`` without libtpu, and ``ValueError`` for an
    unknown generation or a call that no lowering takes.

    >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128)
    >>> layout = PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
    >>> batch = RaggedBatch.decode(lengths=[40, 7], block_tables=[[3, 11, 5], [4, -1, -1]])
    >>> q = jax.ShapeDtypeStruct((2, 8, 128), jnp.bfloat16)
    >>> compiled = compile_for(lower(spec, layout, target="tpu"), "v5e", q, layout.init(num_pages=16), batch)
    >>> print(compiled.schedule)
    tpu-decode(pages_per_block=3, buffers=8)
    """
    chip = chip_named(generation)
    attend = attend.on_chip(generation)
    lowering, schedule, _ = attend.choice(Call.of(q, pages, batch))
    args = (q, pages, batch, sinks) if new is None else (q, *new, pages, batch, sinks)
    function = jax.jit(attend.__call__) if new is None else jax.jit(attend.update, donate_argnums=3)
    try:
        compiled = compile_on(chip, function, *args)
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
    )


def compile_on(chip: Chip, function: Any, *args: Any) -> Any:
    """A jitted function of these arguments, of which only shapes and dtypes count, compiled ahead of time."""
    device = _topology(chip.topology).devices[0]
    sharding = SingleDeviceSharding(device)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    # Pallas asks the mesh, and where there is none the process, which chip it lowers for.
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=chip.cores, platform="tpu")
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
