"""Random programs of prompts and single tokens: entry points equal the native surface, bitwise, step by step."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from paged.compat import page_attention, prefill_page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from paged.spec import Pages, RaggedBatch
from tests.support import Case

from .entries import CLOSE, ENTRIES, RICH, built_for, by_loops, in_place, native

SLOTS, ROWS, WIDTH = 5, 16, 4


class Target(NamedTuple):
    """A target to run programs on: its arguments, its smallest page size, and how many steps to run."""

    page_size: int
    steps: int
    said: dict[str, Any]

    def case(self, entry: str, **spec: Any) -> Case:
        """A case of an entry point."""
        return ENTRIES[entry].case(RICH.replace(**spec), page_size=self.page_size)


XLA = Target(4, 6, {"target": "xla"})
KERNELS = Target(8, 2, {"target": "tpu", "interpret": pltpu.InterpretParams(uninitialized_memory="nan")})


class Requests:
    """The state of a server: the pages and the number of tokens of every slot."""

    def __init__(self, seed: int, case: Case):
        self.rng, self.case = np.random.default_rng(seed), case
        self.lengths = np.zeros(SLOTS, np.int32)
        self.tables = self.rng.permutation(case.num_pages)[: SLOTS * WIDTH].reshape(SLOTS, WIDTH).astype(np.int32)

    def step(self) -> RaggedBatch:
        """Some slots take a new request, some get no rows, most one, some several."""
        capacity = WIDTH * self.case.page_size
        counts, left = np.zeros(SLOTS, np.int32), ROWS
        for s in range(SLOTS):
            if self.lengths[s] == capacity or self.rng.random() < 0.15:
                self.lengths[s] = 0
                self.tables[s] = self.rng.permutation(self.tables[s])
            wanted = self.rng.choice([0, 1, 1, 1, 1, 3, 6, 9])
            counts[s] = min(wanted, left, capacity - self.lengths[s])
            left -= counts[s]
        self.lengths += counts
        starts = np.concatenate([[0], np.cumsum(counts)])
        # Table entries past a length may be pages of the slot, or nonsense.
        used = np.arange(WIDTH) * self.case.page_size < self.lengths[:, None]
        tables = np.where(used, self.tables, self.rng.choice([-1, 7, 10**6], self.tables.shape))
        return RaggedBatch(self.lengths, tables, starts, SLOTS)

    def draw(self, *shape: int) -> jax.Array:
        """Random numbers of about 3 x normal."""
        return jax.numpy.asarray(self.rng.normal(0, 3, shape), "float32")


@pytest.mark.parametrize(
    ("target", "seed"),
    [*((XLA, seed) for seed in range(3)), pytest.param(KERNELS, 0, marks=pytest.mark.slow)],
    ids=["xla-0", "xla-1", "xla-2", "tpu-0"],
)
def test_random_programs_equal_the_native_surface_bitwise(target, seed):
    case = target.case("v3", sinks=True)
    requests, said = Requests(seed, case), {**ENTRIES["v3"].arguments(RICH), **target.said}
    pages = case.layout.init(case.num_pages)
    kv_pages, sinks = jax.numpy.array(pages.arrays[0]), requests.draw(4)
    attend = native(case, **target.said)
    for _ in range(target.steps):
        batch = requests.step()
        q, k, v = requests.draw(ROWS, 4, 8), requests.draw(ROWS, 2, 8), requests.draw(ROWS, 2, 8)
        ints = (batch.lengths, batch.block_tables, batch.query_starts)
        want, pages = in_place(attend)(q, k, v, pages, batch, sinks)
        ends = np.array([0, 0, SLOTS], np.int32)
        flat = batch.block_tables.reshape(-1)
        out, kv_pages = ragged_page_attention_v3(q, k, v, kv_pages, ints[0], flat, ints[2], ends, sinks, **said)
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(kv_pages, pages.arrays[0])
        read = ragged_page_attention_v2(q, kv_pages, *ints, batch.num_seqs, sinks, **said)
        np.testing.assert_array_equal(read, attend(q, pages, batch, sinks))
        assert_loops("v2", case, read, q, pages, batch, sinks)
        assert_split_entries_agree(target, requests, q, np.asarray(kv_pages), batch)


def assert_split_entries_agree(target, requests, q, kv_pages, batch):
    """The tokens in a cache of two arrays: one more row for every sequence, then six rows of one sequence."""
    arrays = tuple(jax.numpy.asarray(np.moveaxis(kv_pages[:, :, i::2], 2, 0)) for i in range(2))
    one, prefill = target.case("page"), target.case("prefill")
    pages = one.layout.wrap(*arrays)
    said = {**ENTRIES["page"].arguments(RICH), **target.said}
    decode = RaggedBatch.decode(batch.lengths, batch.block_tables)
    out = page_attention(q[:SLOTS], *arrays, batch.lengths, batch.block_tables, **said)
    np.testing.assert_array_equal(out, native(one, **target.said)(q[:SLOTS], pages, decode))
    assert_loops("page", one, out, q[:SLOTS], pages, decode, None)
    said = {**ENTRIES["prefill"].arguments(RICH), **target.said}
    slot = int(requests.rng.integers(SLOTS))
    length, table = batch.lengths[slot : slot + 1], batch.block_tables[slot]
    prompt = RaggedBatch.prefill(length, table, 6)
    out = prefill_page_attention(q[:6], *arrays, length, table, **said)
    np.testing.assert_array_equal(out, native(prefill, **target.said)(q[:6], pages, prompt))


def assert_loops(name, case, out, q, pages: Pages, batch, sinks):
    """Equals the oracle's output, within float32's rounding."""
    some = built_for(name, case)
    built = type(some)(**{**vars(some), "q": q, "pages": pages, "batch": batch, "sinks": sinks})
    np.testing.assert_allclose(out, by_loops(name, built), rtol=0, atol=CLOSE)
