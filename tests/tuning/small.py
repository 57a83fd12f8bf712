"""A small attention, and tuning files that know it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

import paged
from paged.lower import Call, Key, XlaSchedule
from paged.lower.schedule import Entry

SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=9)
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
PAGES = LAYOUT.wrap(jnp.asarray(np.random.default_rng(0).normal(0, 3, LAYOUT.array_shapes(9)[0]), jnp.float32))
BATCH = paged.RaggedBatch.decode([13, 2], [[3, 1, 4, 6], [5, -1, -1, -1]])
Q = jnp.asarray(np.random.default_rng(1).normal(0, 3, (2, 4, 8)), jnp.float32)
CALL = Call.of(Q, PAGES, BATCH)

# Four schedules that differ from each other and from the heuristic's.
EXPLICIT, CONTEXT, FILE, OTHER = (XlaSchedule(pages_per_block=n) for n in (1, 2, 3, 4))


def key(spec=SPEC, call=CALL, **changes):
    """The key of the small call, with some texts changed."""
    attend = paged.lower(spec, LAYOUT)
    names = [lowering.name for lowering in attend.lowerings]
    return dataclasses.replace(Key.of(attend.program, LAYOUT, names, call), **changes)


def entry(schedule=FILE, of=None):
    """An entry for a key; by default the small call's."""
    return Entry(key() if of is None else of, schedule.to_json(), 1e-3, 0.5)


def stored(path, *entries):
    """A tuning file with these entries."""
    file = paged.TuningFile(path)
    file.store(entries)
    return file


def chosen(attend, call=CALL):
    """The schedule that runs a call, and who picked it."""
    choice = attend.choice(call)
    return choice.schedule, choice.source
