"""What XLA copies of the pages at every call: `explain` tells of each array, and what it advises needs no copy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged

from .points import needs_libtpu

PAGES, HEADS = 256, 2
JOINED = 'order="joined" lies in whole lanes and needs no copy'
PADDED_SCALE = f"give the spec scale={1 / math.sqrt(192)!r}"

# A layout, the line, and the changes of layout that the line advises.
COPIES = {
    "packed": ({"head_dim": 96}, ("the pool ", "4.0 MiB: head_dim 96 is", JOINED), {"order": "joined"}),
    "interleaved": (
        {"head_dim": 64, "order": "interleaved"},
        ("the pool ", "4.0 MiB: head_dim 64 is", JOINED),
        {"order": "joined"},
    ),
    "split": (
        {"head_dim": 192, "order": "split"},
        ("the pool ", "8.0 MiB: head_dim 192 is", JOINED),
        {"order": "joined"},
    ),
    "values": (
        {"head_dim": 128, "value_dim": 64, "order": "split"},
        ("the pool's values ", "2.0 MiB: value_dim 64 is", "zeros to value_dim=128 and cut the output to 64"),
        {"value_dim": 128},
    ),
    "keys": (
        {"head_dim": 192, "value_dim": 128, "order": "split"},
        ("the pool's keys ", "4.0 MiB: head_dim 192 is", f"zeros to head_dim=256 and {PADDED_SCALE}"),
        {"head_dim": 256},
    ),
    "both": (
        {"head_dim": 192, "value_dim": 64, "order": "split"},
        ("the pool ", "6.0 MiB: head_dim 192 and value_dim 64 are", "head_dim=256", "value_dim=128 and cut"),
        {"head_dim": 256, "value_dim": 128},
    ),
    "scales": (
        {"head_dim": 128, "dtype": jnp.dtype("int8"), "scales": "token"},
        ("the per-token scales ", "0.5 MiB: page_size 16 is", "pages of a multiple of 128 tokens, or a scale per head"),
        {"scales": "head"},
    ),
}
BATCHES = {
    "tpu-decode": paged.RaggedBatch.decode(np.full(2, 8), np.zeros((2, 8), np.int32)),
    "tpu-ragged": paged.RaggedBatch(np.full(2, 8), np.zeros((2, 8), np.int32), np.array([0, 1, 5])),
}


def _call(lowering, layout, **spec):
    """An attention over these pages for v5e, and the shapes of a call."""
    tokens = 2 if lowering == "tpu-decode" else 5
    spec = paged.AttentionSpec(num_q_heads=2 * HEADS, num_kv_heads=HEADS, head_dim=layout.head_dim, **spec)
    q = jnp.zeros((tokens, spec.num_q_heads, layout.head_dim), jnp.bfloat16)
    scales = {"k_scale": jnp.ones(HEADS), "v_scale": jnp.ones(HEADS)} if layout.scales == "head" else {}
    return paged.lower(spec, layout, "tpu").on_chip("v5e"), (q, layout.init(PAGES, **scales), BATCHES[lowering])


def _layouts(name):
    facts, _, changes = COPIES[name]
    layout = paged.PageLayout(page_size=16, num_kv_heads=HEADS, **facts)
    return layout, layout.replace(**changes)


@pytest.mark.parametrize("lowering", BATCHES)
@pytest.mark.parametrize("name", COPIES)
def test_explain_tells_of_a_copy_and_its_advice_needs_none(name, lowering):
    layout, advised = _layouts(name)
    attend, args = _call(lowering, layout)
    (line,) = (note for note in attend.explain(*args).notes if note.startswith("XLA copies"))
    what, *said = COPIES[name][1]
    assert line.startswith(f"XLA copies {what}at every call and every write, {said[0]} no multiple of 128 lanes; ")
    assert all(text in line for text in said)
    attend, args = _call(lowering, advised, scale=layout.head_dim**-0.5)
    explanation = attend.explain(*args)
    assert explanation.schedule.lowering == lowering
    assert not any("copies" in note for note in explanation.notes)


@needs_libtpu
@pytest.mark.parametrize("name", ["keys", pytest.param("values", marks=pytest.mark.kernels)])
def test_a_copy_is_as_large_as_explain_says_and_the_advised_pages_are_not_copied(name):
    layout, advised = _layouts(name)
    told = float(COPIES[name][1][1].partition(" MiB")[0]) * 2**20
    taken = [
        paged.compile_for(attend, "v5e", *args).temporary_bytes
        for attend, args in (_call("tpu-decode", one) for one in (layout, advised))
    ]
    assert told < taken[0] < told + 2**20 and taken[1] < 2**20


@pytest.mark.kernels
def test_padded_keys_and_values_give_the_same_attention():
    """What the advice for unequal dimensions rests on, at small ones."""
    layout, advised = (
        paged.PageLayout(page_size=8, num_kv_heads=HEADS, head_dim=dim, value_dim=8, order="split", dtype=jnp.float32)
        for dim in (12, 16)
    )
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, n, dim)) for i, (n, dim) in enumerate(((4, 12), (2, 12), (2, 8)))
    )
    batch = paged.RaggedBatch.decode([3, 1], [[1], [0]])
    spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=HEADS, head_dim=12)
    expected = paged.lower(spec, layout, "xla").update(q, k, v, layout.init(2), batch)[0]
    q, k = (jnp.pad(x, ((0, 0), (0, 0), (0, 4))) for x in (q, k))
    spec = spec.replace(head_dim=16, scale=12**-0.5)
    np.testing.assert_allclose(
        paged.lower(spec, advised, "xla").update(q, k, v, advised.init(2), batch)[0], expected, rtol=1e-6, atol=1e-6
    )


# The pages of a prefix and those of a chunk are two runs, so that the kernel needs a list of them.
TWO_RUNS = paged.Prefix(16) | paged.Chunk(4096)
TOLD = "about 132 MiB .* 256 x 8192 table entries"


@pytest.mark.parametrize(("width", "mask", "told"), [(512, TWO_RUNS, []), (8192, TWO_RUNS, [True]), (8192, None, [])])
def test_explain_tells_what_wide_tables_cost(width, mask, told):
    """Where the visible pages are one run, the kernel reads the table as it is, and there is no list to pay for."""
    spec = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128, mask=mask)
    layout = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)
    pages = layout.init(64)
    batch = paged.RaggedBatch.decode(np.zeros(256, np.int32), np.zeros((256, width), np.int32))
    q = jnp.zeros((256, 8, 128), jnp.bfloat16)
    notes = paged.lower(spec, layout, "tpu").on_chip("v5e").explain(q, pages, batch).notes
    assert [bool(re.match(TOLD, note)) for note in notes if "work lists" in note] == told
