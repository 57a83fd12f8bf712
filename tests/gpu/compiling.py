"""Compiles decode calls for a GPU that need not be there, and says what came of each: `python -m tests.gpu.compiling`.

It is a program of its own, because a kernel that a chip cannot do may end the process, and because the compiler reads
its settings once. It needs JAX 0.12 with its CUDA plugin, ptxas and nvdisasm.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental import topologies

import paged
from paged.lower.gpu import HOPPERS
from paged.lower.gpu.launch import shared_bytes
from paged.lower.gpu.plan import rows_of
from paged.spec import ALiBi, AttentionSpec, PageLayout, Prefix, RaggedBatch, Window

from .sass import count, loop_with

_PACKAGES = pathlib.Path(jaxlib.__file__).parent.parent
# Seconds that a process may compile; ten points take 60 on an idle core.
PATIENCE = 900
# Where Mosaic writes what its compilers make. It reads this once.
_DUMPS = "MOSAIC_GPU_DUMP_TO"


@dataclasses.dataclass(frozen=True)
class Point:
    """One call to compile: a shape, page size, order and dtype, and the terms of the spec."""

    chip: str = "h200"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    order: Any = "packed"
    dtype: str = "bfloat16"
    scales: Any = None
    rows: int = 1
    slots: int = 16
    pages_per_seq: int = 256
    window: int | None = None
    rich: bool = False
    listed: bool = False
    writes: bool = False

    @property
    def attend(self) -> paged.Attend:
        """The attention, lowered for the chip."""
        terms: dict[str, Any] = {"soft_cap": 30.0, "sinks": True, "scores": (ALiBi(),)} if self.rich else {}
        if self.listed:
            terms["mask"] = Prefix(64) | Window(1024)
        spec = AttentionSpec(
            num_q_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim, window=self.window, **terms
        )
        layout = PageLayout(
            page_size=self.page_size,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=jnp.dtype(self.dtype),
            scales=self.scales,
            order=self.order,
        )
        return paged.lower(spec, layout, "gpu").on_chip(self.chip)


def compile_point(point: Point) -> dict[str, Any]:
    """Compile a point, and tell what its kernel needs."""
    folder = pathlib.Path(os.environ[_DUMPS])
    for file in folder.iterdir():
        file.unlink()
    attend, topology = point.attend, _topology(point.chip)
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    q_dtype = "bfloat16" if attend.layout.is_quantised else point.dtype

    def given(*shape: int, dtype: Any = q_dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    tokens, heads = point.slots * point.rows, (point.kv_heads, point.head_dim)
    q, new = given(tokens, point.heads, point.head_dim), (given(tokens, *heads), given(tokens, *heads))
    arrays = (given(*shape, dtype=point.dtype) for shape in attend.layout.array_shapes(8192))
    shape = attend.layout.scale_shape(8192)
    k_scale, v_scale = (None if shape is None else given(*shape, dtype="float32") for _ in range(2))
    pages = attend.layout.wrap(*arrays, k_scale=k_scale, v_scale=v_scale)
    lengths = given(point.slots, dtype="int32")
    batch = RaggedBatch.decode(lengths, given(point.slots, point.pages_per_seq, dtype="int32"), query_rows=point.rows)
    batch = jax.tree.map(lambda x: given(*x.shape, dtype=x.dtype), batch)
    sinks = given(point.heads, dtype="float32") if point.rich else None
    call = jax.jit(attend.update, donate_argnums=3) if point.writes else jax.jit(attend.__call__)
    # Pallas asks the mesh which chip it lowers for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = call.trace(q, *(new if point.writes else ()), pages, batch, sinks)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    _, schedule, _ = attend.choice(paged.lower.Call.of(q, pages, batch))
    memory: Any = compiled.memory_analysis()
    return {
        "schedule": str(schedule),
        "counted_bytes": shared_bytes(
            attend.layout, rows_of(attend.program, paged.lower.Call.of(q, pages, batch)), schedule
        ),
        "tile_bytes": schedule.pages_per_block * point.page_size * point.head_dim * jnp.dtype(point.dtype).itemsize,
        "launches": _launches(compiled.as_text()),
        "loops": compiled.as_text().count(" while("),
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        **_kernel_facts(folder),
    }


def _kernel_facts(folder: pathlib.Path) -> dict[str, Any]:
    """Registers, spills, shared memory and the loop of the kernel, from what its compilers have dumped."""
    texts = {
        kind: next(folder.glob(f"*.{kind}")).read_text() for kind in ("ptxas", "ptx", "sass_ctrl", "resources.txt")
    }
    loop = loop_with(texts["sass_ctrl"], "HGMMA")
    return {
        "registers": int(re.search(r"Used (\d+) registers", texts["ptxas"]).group(1)),  # pyright: ignore
        "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", texts["ptxas"])),
        "stack_bytes": int(re.search(r"(\d+) bytes stack frame", texts["ptxas"]).group(1)),  # pyright: ignore
        "shared_bytes": int(re.search(r"smem_scratch_bytes=(\d+)", texts["resources.txt"]).group(1)),  # pyright: ignore
        "fences": texts["ptx"].count("fence.proxy.async"),
        "loop": loop,
        "issue_slots": len(loop),
        "products": count(loop, "HGMMA"),
        "copies": count(loop, "UTMALDG"),
    }


def _launches(text: str) -> int:
    """The operations of the entry computation that are kernels."""
    entry = text[text.index("\nENTRY ") :]
    names = re.findall(r"^\s+(?:ROOT )?%?\S+ = .*? ([a-z][\w-]*)\(", entry, re.MULTILINE)
    idle = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    return sum(name not in idle for name in names)


def _topology(chip: str) -> Any:
    config = HOPPERS[chip].text
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")


def compiled(points: dict[str, Point]) -> dict[str, dict[str, Any]]:
    """What came of some points, compiled in a process of its own for each chip.

    Both chips have one instruction set. In one process the second would find the first one's kernel, and dump nothing.
    """
    found = {}
    for chip in sorted({point.chip for point in points.values()}):
        found |= _compiled({name: dataclasses.asdict(point) for name, point in points.items() if point.chip == chip})
    return found


def _compiled(points: dict[str, Any]) -> dict[str, dict[str, Any]]:
    # The plugin looks for CUDA's libraries unless the process is for CPUs. ptxas and nvdisasm come by pip.
    tools = f"{_PACKAGES / 'nvidia/cu13/bin'}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "tests.gpu.compiling"]
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PATH": tools, "XLA_FLAGS": "", _DUMPS: folder}
        given = json.dumps(points)
        run = subprocess.run(command, input=given, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Compile the points that stand in the input as JSON, and print what came of them as JSON."""
    facts = {}
    for name, fields in json.load(sys.stdin).items():
        facts[name] = compile_point(Point(**fields))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
