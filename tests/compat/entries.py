"""Every entry point, called with the arrays of a case, and the same case on the native surface."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paged
from paged.spec import AttentionSpec, RaggedBatch
from paged.testing.entries import ENTRY_POINTS, EntryPoint
from tests.support import Built, Case, build
from tests.support.oracle import attention_by_loops

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
RICH = SPEC.replace(window=5, soft_cap=4.0, scale=0.3)
# The largest rounding error of float32 sums over a few keys of 3 x normal. Without a term outputs differ by over 0.1.
CLOSE = 1e-4


class Entry(EntryPoint):
    """An entry point of `paged.testing`, with cases of its own."""

    @property
    def phase(self) -> str:
        """The phase that it is tried on."""
        return self.phases[0]

    def case(self, spec: AttentionSpec = SPEC, **facts: Any) -> Case:
        """A case of this entry point's phase and page order."""
        rows = {"prefill": 6}.get(self.phase, 1)
        sinks = (spec.num_q_heads,) if spec.sinks else None
        return Case(spec=spec, order=self.order, phase=self.phase, rows=rows, sink_shape=sinks).replace(**facts)


NAMES = ("page", "prefill", "v2", "v3")
ENTRIES = {name: Entry(**vars(entry)) for name, entry in zip(NAMES, ENTRY_POINTS.values(), strict=True)}


def arrays_of(name: str, built: Built) -> list[Any]:
    """A case's arrays in the order of an entry point's arguments. Version 3 donates its pages, so it gets a copy."""
    return ENTRIES[name].arrays(built.q, built.pages, built.batch, built.sinks, (built.k, built.v))


def built_for(name: str, case: Case, **how: Any) -> Built:
    """The arrays of a case. Where the entry point writes, pages do not hold the new tokens yet."""
    return build(case, hold_new=not ENTRIES[name].writes, **how)


def output(name: str, built: Built, **arguments: Any) -> Any:
    """The output of an entry point for a case."""
    got = results(name, built, **arguments)
    return got[0] if ENTRIES[name].writes else got


def results(name: str, built: Built, **arguments: Any) -> Any:
    """Everything that an entry point returns."""
    entry = ENTRIES[name]
    arguments = {**entry.arguments(built.case.spec), "target": "xla", **arguments}
    return entry.call(*arrays_of(name, built), **arguments)


@functools.cache
def native(case: Case, **how: Any) -> paged.Attend:
    """The attention of the native surface for a case."""
    return paged.lower(case.spec, case.layout, **{"target": "xla", **how})


@functools.cache
def in_place(attend: paged.Attend) -> Callable[..., Any]:
    """Its update, of donated pages: from JAX 0.12 on the results on CPUs differ in a last bit where pages are kept."""
    return jax.jit(attend.update, donate_argnums=3)


def native_results(name: str, built: Built, **how: Any) -> Any:
    """The output of the native surface for a case."""
    attend = native(built.case.replace(corner="mixed", seed=0), **how)
    if ENTRIES[name].writes:
        pages = built.case.layout.wrap(jnp.array(built.pages.arrays[0]))
        out, pages = in_place(attend)(built.q, built.k, built.v, pages, built.batch, built.sinks)
        return out, pages.arrays[0]
    return attend(built.q, built.pages, native_batch(name, built), built.sinks)


def native_batch(name: str, built: Built) -> RaggedBatch:
    """The batch that an entry point's arguments can express."""
    if name != "page":
        return built.batch
    return RaggedBatch.decode(arrays_of(name, built)[3], built.batch.block_tables)


def by_loops(name: str, built: Built, spec: AttentionSpec | None = None) -> np.ndarray:
    """The oracle's output for the case's spec or another. ``built`` has this step's tokens in its pages."""
    pools, batch = (np.asarray(x, np.float64) for x in (built.pages.keys(), built.pages.values())), built.batch
    told = native_batch(name, built)
    integers = [np.asarray(x) for x in (told.lengths, told.block_tables, batch.query_starts)]
    q, live = np.asarray(built.q, np.float64), int(told.num_seqs)
    return attention_by_loops(spec or built.case.spec, q, *pools, *integers, live, built.sinks)[0]


def numpy(x: Any) -> np.ndarray:
    """The array in float64."""
    return np.asarray(x, np.float64)
