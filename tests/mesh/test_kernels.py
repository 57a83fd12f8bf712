"""Kernels for TPUs on a mesh, interpreted and compiled for four chips; pages of other devices are holes."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh

import paged
from paged.lower import DecodeSchedule, RaggedSchedule
from paged.lower._compile_for import _topology
from paged.lower.tpu import CHIPS
from paged.spec import ALiBi, RaggedBatch
from tests.support import assert_state_close, build, case_of
from tests.tpu.interpreter import interpreted, state_of

from .placing import SIZES, built, collectives, mesh_of, needs_devices, placed, rows_of

SCHEDULES = {
    "decode": DecodeSchedule(pages_per_block=2, buffers=3),
    "ragged": RaggedSchedule(pages_per_block=2, rows_per_tile=16, single_rows=DecodeSchedule(pages_per_block=2)),
}


@pytest.mark.kernels
@pytest.mark.parametrize("phase", SCHEDULES)
def test_kernels_skip_holes_and_the_parts_merge_to_the_whole(phase):
    """Each page lies on one of two devices. The other device does not see its tokens, and positions do not change."""
    case = case_of("rich", phase, page_size=64).replace(sink_shape=None)
    case = case.replace(spec=case.spec.replace(sinks=False))
    one, attend = build(case), interpreted(case, SCHEDULES[phase])
    tables = one.batch.block_tables
    states = []
    for device in range(2):
        own = jnp.where(tables % 2 == device, tables, -1)
        batch = RaggedBatch(
            one.batch.lengths, own, one.batch.query_starts, one.batch.num_seqs, query_rows=one.batch.query_rows
        )
        states.append(state_of(attend, dataclasses.replace(one, batch=batch)))
    assert all(np.asarray(state.out).any() for state in states)
    assert_state_close(paged.merge(*states), one)


@needs_devices
@pytest.mark.parametrize("field", [pytest.param("kv_heads", marks=pytest.mark.kernels), "context"])
def test_interpreted_kernels_on_two_devices_equal_the_reference(field):
    case = case_of("rich", "decode", page_size=16)
    mesh, axes = mesh_of({field: 2})
    params = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
    attend = paged.lower(
        case.spec, case.layout, "tpu", mesh=mesh, axes=axes, schedule=SCHEDULES["decode"], interpret=params
    )
    one = built(case, 1)[0]
    q, _, _, *others = placed(attend, [one])
    assert_state_close(rows_of(attend.state(q, *others), 0, 1), one)


@pytest.mark.kernels
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is in the package libtpu")
@pytest.mark.parametrize("field", ["kv_heads", pytest.param("context", marks=pytest.mark.slow)])
def test_the_tpu_compiler_takes_a_step_on_four_chips(field):
    """A decode step that writes donated pages. Devices exchange nothing, or states only."""
    chip, spec = CHIPS["v5e"], paged.AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128, scores=(ALiBi(),))
    devices = np.array(_topology(chip.topology).devices)
    mesh, axes = Mesh(devices, (SIZES[field],)), paged.Axes(**{field: SIZES[field]})
    layout = paged.PageLayout(page_size=16, num_kv_heads=8, head_dim=128)
    attend = paged.lower(spec, layout, "tpu", mesh=mesh, axes=axes).on_chip(chip.generation)
    at = attend.shardings

    def abstract(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    q = jax.ShapeDtypeStruct((16, 32, 128), jnp.bfloat16, sharding=at.q)
    new = jax.ShapeDtypeStruct((16, 8, 128), jnp.bfloat16, sharding=at.k)
    pages = abstract(jax.eval_shape(lambda: layout.init(1024)), at.pages.arrays[0])
    batch = abstract(RaggedBatch.decode(np.zeros(16, int), np.zeros((16, 64), int)), at.batch)
    compiled = jax.jit(attend.update, donate_argnums=3).lower(q, new, new, pages, batch).compile()
    text = compiled.as_text()
    assert "paged_" in text and "input_output_alias" in text
    states = [(4 * 16 * 32 * (128 + 1), "f32", "all-gather")] if field == "context" else []
    assert collectives(text) == states
