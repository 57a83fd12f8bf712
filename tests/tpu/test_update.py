"""The fused update: the kernel that attends also writes new rows into the pages, and changes no other bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import DecodeSchedule
from paged.lower.tpu import CHIPS
from paged.spec import RaggedBatch
from tests.support import build, case_of
from tests.support.specs import PLAIN

from .interpreter import interpreted, params, watched

SCHEDULE = DecodeSchedule(pages_per_block=2, buffers=3)
# What differs from a case of one row per sequence and packed float32 pages of 16; from `SCHEDULE`; and the mode.
CASES = {
    "joined": ({"order": "joined"}, {}, "eager"),
    "split, grid": ({"order": "split", "rows": 3}, {"sequence": "grid"}, "on_wait"),
    "interleaved": ({"order": "interleaved", "page_size": 8}, {}, "on_wait"),
    "two cores": ({"rows": 3}, {"cores": 2}, "on_wait"),
    "per-token scales": ({"dtype": "int8", "scales": "token"}, {}, "eager"),
    "per-head scales": ({"dtype": "float8_e4m3fn", "scales": "head"}, {}, "on_wait"),
    "bfloat16, many rows": ({"dtype": "bfloat16", "rows": 10}, {}, "on_wait"),
    "splits, written first": ({}, {"kv_splits": 2}, "on_wait"),
}
CORNERS = ("mixed", "one past a page", "more rows than tokens", "few live")
# Two cores are interpreted several times as slowly: first in two corners.
ROWS = [pytest.param(name, CORNERS[: 2 if "cores" in CASES[name][1] else 4], id=name) for name in CASES]
ROWS += [pytest.param("two cores", CORNERS, id="two cores, every corner", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "corners"), ROWS)
@pytest.mark.kernels
def test_pages_are_those_of_the_write_and_rows_those_of_attending_to_them(name, corners):
    facts, choices, mode = CASES[name]
    case = case_of("plain", "decode", **{"page_size": 16, **facts})
    attend = interpreted(case, SCHEDULE.replace(**choices), mode)
    for corner in corners:
        built = build(case.replace(corner=corner), hold_new=False)
        out, pages = watched(attend.update, built.q, built.k, built.v, built.pages, built.batch)
        written = paged.write(built.k, built.v, built.pages, built.batch)
        for got, want in zip(jax.tree.leaves(pages), jax.tree.leaves(written), strict=True):
            np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
        np.testing.assert_array_equal(out, watched(attend, built.q, written, built.batch))


def _neighbours(cores, sequence):
    """Two sequences write to different tokens of one granule of the page that they share, and a third elsewhere."""
    layout = paged.PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    batch = RaggedBatch.decode([3, 4, 9], [[3, 1], [3, 2], [4, 5]])
    q, k = (jax.random.normal(jax.random.key(i), (3, heads, 8)) for i, heads in enumerate((4, 2)))
    pages = layout.wrap(jax.random.normal(jax.random.key(2), layout.array_shapes(8)[0]))
    xla = paged.lower(PLAIN, layout, "xla")
    tpu = paged.lower(PLAIN, layout, "tpu", schedule=SCHEDULE.replace(cores=cores, sequence=sequence))
    settings = {"chip": CHIPS["v5p"], "interpret": params("on_wait", cores)}
    lowerings = tuple(dataclasses.replace(low, **settings) for low in tpu.lowerings)
    tpu = dataclasses.replace(tpu, lowerings=lowerings)
    return watched(tpu.update, q, k, k + 1, pages, batch, patience=20.0), xla.update(q, k, k + 1, pages, batch)


@pytest.mark.parametrize(("cores", "sequence"), [(1, "inline"), pytest.param(2, "grid", marks=pytest.mark.kernels)])
def test_sequences_that_write_next_to_each_other_lose_nothing(cores, sequence):
    (out, pages), (want, written) = _neighbours(cores, sequence)
    np.testing.assert_array_equal(pages.arrays[0], written.arrays[0])
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)
