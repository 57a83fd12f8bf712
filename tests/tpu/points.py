"""Points at which the real TPU compiler compiles kernels, without a TPU: arguments that have no memory.

A point is compiled for one or two generations, so that each generation meets every family of points.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import LOWERINGS, Call, CompileError, compile_for
from paged.lower.tpu import CHIPS
from tests.support import real

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is in the package libtpu, which is not here"
)
GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
assert set(GENERATIONS) == set(CHIPS)


def wave(p, j, h):
    """An opaque bias."""
    return 0.1 * jnp.sin(real(p - j)) + 0.01 * real(h)


def not_fifth(p, j):
    """An opaque mask."""
    return (p + j) % 5 != 0


def int8(scales, **facts):
    """Facts of a point with int8 pages."""
    return {"dtype": "int8", "scales": scales, **facts}


def table_of(points, fast, every):
    """Rows of a point and a generation: every point once, every ``every``-th point twice, and the fast rows."""
    names = list(points)
    table = [(name, GENERATIONS[i % 5]) for i, name in enumerate(names)]
    table += [(name, GENERATIONS[(i + 2 + i // 5) % 5]) for i, name in enumerate(names) if i % every == 0]
    return list(dict.fromkeys((*fast, *table)))


def marked(table, fast, every=3):
    """The table's rows as parameters: where they are not fast, one in ``every`` is `kernels`, and the others `slow`."""

    def mark(i, row):
        return [] if row in fast else [pytest.mark.kernels if i % every == 0 else pytest.mark.slow]

    return [pytest.param(*row, id="-".join(row), marks=mark(i, row)) for i, row in enumerate(table)]


def abstract_call(
    lowering, pool_bytes, *, slots, rows, tokens=None, length=4096, page_size=16, kv_heads=8, group=4, head_dim=128,
    order="packed", dtype="bfloat16", scales=None, q_dtype="bfloat16", schedule=None, spec=None, update=False,
    ancestors=None,
):  # fmt: skip
    """The attention lowered for TPUs, a point's arguments, and the new keys and values if it is an update.

    Of batches whose rows vary, ``rows`` None, only the number of tokens is known. The batch brings zeros for every
    value of the spec, and with ``ancestors`` the positions of its rows and so many words of ancestors.
    """
    layout = paged.PageLayout(
        page_size=page_size, num_kv_heads=kv_heads, head_dim=head_dim, dtype=jnp.dtype(dtype), order=order,
        scales=scales,
    )  # fmt: skip
    spec = paged.AttentionSpec(num_q_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=head_dim, **(spec or {}))
    num_pages = pool_bytes // layout.bytes_per_page
    arrays = [jax.ShapeDtypeStruct(shape, layout.dtype) for shape in layout.array_shapes(num_pages)]
    if scales is not None:
        scale = jax.ShapeDtypeStruct(layout.scale_shape(num_pages), jnp.float32)
        scales = {"k_scale": scale, "v_scale": scale}
    lengths, tables = np.full(slots, length), np.zeros((slots, -(-length // page_size)), int)
    if rows is None:
        batch = paged.RaggedBatch(lengths, tables, np.linspace(0, tokens, slots + 1).astype(int))
    else:
        batch, tokens = paged.RaggedBatch.decode(lengths, tables, query_rows=rows), slots * rows
    q = jax.ShapeDtypeStruct((tokens, spec.num_q_heads, head_dim), jnp.dtype(q_dtype))
    sinks = jax.ShapeDtypeStruct((spec.num_q_heads,), jnp.float32) if spec.sinks else None
    classes = {low.name: low.schedule_type for low in LOWERINGS}
    chosen = None if schedule is None else classes[lowering](**schedule)
    attend = paged.lower(spec, layout, "tpu", schedule=chosen)
    values = {v.name: np.zeros((slots, v.size) if v.size else slots, v.dtype) for v in attend.program.values}
    own = {} if ancestors is None else {"positions": (tokens,), "ancestors": (tokens, ancestors)}
    own = {name: jnp.zeros(shape, jnp.int32) for name, shape in own.items()}
    batch = dataclasses.replace(batch, values={name: jnp.asarray(x) for name, x in values.items()}, **own)
    new = jax.ShapeDtypeStruct((tokens, kv_heads, head_dim), jnp.dtype(q_dtype))
    return attend, (q, layout.wrap(*arrays, **(scales or {})), batch, sinks), {"new": (new, new)} if update else {}


def compiled(call, lowering, generation, schedule):
    """A call, compiled for a generation; asserts that the lowering and the schedule are those that were asked for."""
    attend, args, new = call
    made = compile_for(attend, generation, *args, **new)
    assert made.lowering == made.schedule.lowering == lowering
    assert made.generation == generation and made.code_bytes > 0
    for field, value in (schedule or {}).items():
        assert getattr(made.schedule, field) == value
    return made


def assert_crosses_generations(points, table, fast, is_special):
    """The table is large enough, and each generation has special points, scales and specs."""
    assert len(table) >= 60 and set(fast) <= set(table)
    for generation in GENERATIONS:
        facts = [points[name] for name, to in table if to == generation]
        assert len(facts) >= 10 and any(map(is_special, facts))
        assert any("scales" in point for point in facts) and any("spec" in point for point in facts)


def assert_takes_back_its_own(name, call):
    """Assert that the lowering accepts the schedule of its own heuristic, which must fit the chip's memory."""
    attend, args, _ = call
    abstract = Call.of(*args[:3])
    for generation in GENERATIONS:
        lowering, at = attend.lowering.on_chip(generation), (name, generation)
        schedule = lowering.schedule(attend.program, attend.layout, abstract)
        assert lowering.cannot_honour(attend.program, attend.layout, abstract, schedule) is None, at
        assert lowering.refuses(attend.program, attend.layout, abstract) is None, at


def assert_refused_with_the_nearest(call, own, match):
    """Assert that a schedule too large for v4 is refused. ``own`` is the same call without a schedule."""
    attend, args, _ = call
    with pytest.raises(ValueError, match=match) as error:
        compile_for(attend, "v4", *args)
    nearest = own[0].on_chip("v4").choice(Call.of(*args[:3]))[1]
    assert f"The nearest that can: {nearest}." in str(error.value)


def assert_error_carries_the_compilers_words(call, monkeypatch):
    """With a chip that claims sixty times its memory, a schedule passes our rule and fails in the compiler."""
    attend, args, _ = call
    monkeypatch.setitem(CHIPS, "v4", dataclasses.replace(CHIPS["v4"], vmem_bytes=2**30))
    with pytest.raises(CompileError) as error:
        compile_for(attend, "v4", *args)
    assert error.value.schedule == attend.schedule and error.value.generation == "v4"
    assert str(attend.schedule) in str(error.value) and "vmem" in error.value.reason.lower()
