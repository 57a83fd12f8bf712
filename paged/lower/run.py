"""What a call does once it is traced: it makes the batch safe to read, chooses a lowering, and runs the program.

``attend`` is always an `Attend`.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from paged.spec import AttentionState, Pages, RaggedBatch, sinks_per_head

from .base import Lowering
from .plan import Plan, batch_of
from .program import Call, PageCopies, Program, Results, Sequences, Wanted
from .schedule import Choice

Merge = Callable[[AttentionState], AttentionState]
# From the pages, the step's copies by page ids as the batch has them, and its sequences.
Copy = Callable[[Pages, Array, Sequences], Pages]


def run_state(
    attend: Any,
    program: Program,
    has_lse: bool,
    q: Array,
    pages: Pages,
    batch: RaggedBatch | Plan,
    sinks: Array | None,
    merge: Merge | None = None,
) -> Results:
    """Choose a lowering and its schedule, and run ``program``.

    On one device ``program`` is the attention's own. On a mesh it is the program of this device's heads, and ``merge``
    makes the states of all devices one, if there is anything to merge.
    """
    if not batch_of(batch).has_rows(q.shape[0]):
        return _no_rows(attend, program, has_lse, q)
    program, call, (lowering, schedule, _), seqs = _resolve(attend, program, q, pages, batch, merge is not None)
    wanted, sinks = Wanted(q.dtype, has_lse), None if sinks is None else sinks_per_head(attend.spec, sinks)
    if merge is None:
        return lowering.results(program, schedule, call, wanted, q, pages, sinks, seqs)
    # Sinks enter once, after the merge: a sink in each device's state would count once per device.
    return wanted.of(merge(lowering.state(program, schedule, call, q, pages, seqs)), seqs, sinks)


def run_update(
    attend: Any,
    program: Program,
    has_lse: bool,
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    batch: RaggedBatch | Plan,
    sinks: Array | None,
    merge: Merge | None = None,
    copy: Copy | None = None,
) -> tuple[Results, Pages]:
    """`run_state` after a write of this step's keys and values, before which shared pages are copied.

    ``copy`` is given with ``merge``: it copies pages between devices.
    """
    if not batch_of(batch).has_rows(q.shape[0]):
        return _no_rows(attend, program, has_lse, q), pages
    program, call, (lowering, schedule, _), seqs = _resolve(attend, program, q, pages, batch, merge is not None)
    wanted, sinks = Wanted(q.dtype, has_lse), None if sinks is None else sinks_per_head(attend.spec, sinks)
    copy_from = batch_of(batch).copy_from
    if copy_from is not None:
        pages = copied(lowering, pages, copy_from, seqs) if copy is None else copy(pages, copy_from, seqs)
    if merge is None:
        return lowering.update_results(program, schedule, call, wanted, q, k, v, pages, sinks, seqs)
    state, pages = lowering.update(program, schedule, call, q, k, v, pages, seqs)
    return wanted.of(merge(state), seqs, sinks), pages


def copied(lowering: Lowering, pages: Pages, copy_from: Array, seqs: Sequences) -> Pages:
    """The pages after the copies of a step, before its write."""
    return lowering.copy(pages, PageCopies.of(copy_from, seqs, pages.layout.page_size, pages.num_pages))


def _resolve(
    attend: Any, program: Program, q: Array, pages: Pages, step: RaggedBatch | Plan, has_holes: bool
) -> tuple[Program, Call, Choice, Sequences]:
    """The step's program, the call, what runs it, and its sequences: with what was planned for the step, if it was.

    Where states are merged over devices, the other devices' pages are holes in this device's tables.
    """
    batch = batch_of(step)
    program, call = program.for_batch(batch), Call.of(q, pages, batch, has_holes)
    choice = choice_of(attend, program, call, step)
    if isinstance(step, Plan) and step.seqs is not None:
        return program, call, choice, step.seqs
    return program, call, choice, Sequences.of(batch, q.shape[0], pages.layout.page_size)


def choice_of(attend: Any, program: Program, call: Call, step: RaggedBatch | Plan) -> Choice:
    """The lowering and the schedule of a call. A plan has its own; without one they are chosen."""
    if isinstance(step, Plan):
        return step.choice(program, attend.layout, attend.lowerings, attend.pinned, call)
    return attend.choice(call)


def _no_rows(attend: Any, program: Program, has_lse: bool, q: Array) -> Results:
    empty = AttentionState.empty(q.shape[0], program.num_q_heads, attend.layout.value_dim, q.dtype)
    return Results(empty.out, empty.lse if has_lse else None)
