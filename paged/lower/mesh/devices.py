"""What runs on each device of a mesh: its share of a call, or of a plan. ``attend`` is always a `ShardedAttend`."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from paged.spec import Pages, RaggedBatch

from .._check import check_values, demands_of
from ..jax_version import on_devices
from ..plan import Plan, make_plan, stacked_plan
from ..program import Call, Results
from ..run import run_state, run_update
from .context import with_own_pages
from .heads import select_own_heads


@functools.partial(jax.jit, static_argnums=(0, 1))
def state(attend: Any, has_lse: bool, *args: Any) -> Results:
    """`run_state` on every device, with that device's shares of ``q, pages, batch, sinks``."""
    specs = attend.specs
    own = (specs.q, specs.pages, _spec_of_step(attend, args[2]), specs.sinks)
    run = functools.partial(_state_on_device, attend, has_lse)
    return on_devices(run, attend.mesh, own, Results(specs.out, specs.lse if has_lse else None))(*args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def update(attend: Any, has_lse: bool, *args: Any) -> tuple[Results, Pages]:
    """`run_update` on every device, with that device's shares of ``q, k, v, pages, batch, sinks``."""
    specs = attend.specs
    own = (specs.q, specs.k, specs.v, specs.pages, _spec_of_step(attend, args[4]), specs.sinks)
    run = functools.partial(_update_on_device, attend, has_lse)
    results = Results(specs.out, specs.lse if has_lse else None), specs.pages
    return on_devices(run, attend.mesh, own, results)(*args)


def _state_on_device(
    attend: Any, has_lse: bool, q: Array, pages: Pages, batch: RaggedBatch | Plan, sinks: Array | None
) -> Results:
    """What one device computes from its shares of the arrays."""
    pages, batch = _own(attend, q, pages, batch)
    one, program = attend.first_device, attend.program_per_device
    return run_state(one, program, has_lse, q, pages, batch, sinks, attend._merge)


def _update_on_device(
    attend: Any,
    has_lse: bool,
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    batch: RaggedBatch | Plan,
    sinks: Array | None,
) -> tuple[Results, Pages]:
    """What one device computes, after it has written the new tokens that belong into its own pages."""
    pages, batch = _own(attend, q, pages, batch)
    kv_heads = pages.layout.num_kv_heads
    k, v = (select_own_heads(x, kv_heads, attend._repeats, attend.axes.kv_heads) for x in (k, v))
    one, program = attend.first_device, attend.program_per_device
    results, pages = run_update(one, program, has_lse, q, k, v, pages, batch, sinks, attend._merge, attend._copy)
    return results, dataclasses.replace(pages, layout=attend.layout)


@functools.partial(jax.jit, static_argnums=(0, 1))
def plan(attend: Any, call: Call, batch: RaggedBatch) -> Plan:
    """Every device's plan. ``call`` is the call of each device; a plan's arrays have a leading axis of devices."""

    def on_device(batch: RaggedBatch) -> Plan:
        own = _own_batch(attend, batch, call.tokens, call.num_pages)
        one = attend.first_device
        made = make_plan(attend.program_per_device.for_batch(own), one.layout, one.choice(call), call, own)
        return stacked_plan(made, attend.placement, attend.shares.context)

    return on_devices(on_device, attend.mesh, (attend.specs.batch,), P(attend.axes.pages))(batch)


def _spec_of_step(attend: Any, step: RaggedBatch | Plan) -> P:
    return P(attend.axes.pages) if isinstance(step, Plan) else attend.specs.batch


def _own(attend: Any, q: Array, pages: Pages, step: RaggedBatch | Plan) -> tuple[Pages, RaggedBatch | Plan]:
    """One device's pages and its batch or plan, as its own attention has them."""
    pages = dataclasses.replace(pages, layout=attend.first_device.layout)
    if isinstance(step, Plan):
        return pages, jax.tree.map(lambda x: x[0], step)
    return pages, _own_batch(attend, step, q.shape[0], pages.num_pages)


def _own_batch(attend: Any, batch: RaggedBatch, tokens: int, num_pages: int) -> RaggedBatch:
    """One device's batch. ``num_pages`` are this device's pages."""
    if attend.axes.sequences is not None:
        batch = jax.tree.map(lambda x: x[0], batch)
    if attend.check:
        batch = check_shard(attend, batch, tokens, num_pages * attend.shares.context)
    return batch if attend.axes.context is None else with_own_pages(batch, num_pages, attend.axes.context)


def check_shard(attend: Any, batch: RaggedBatch, tokens: int, num_pages: int) -> RaggedBatch:
    """One shard's batch, its values checked. ``num_pages`` is of all devices that share its contexts."""
    sizes = {"page_size": attend.layout.page_size, "num_pages": num_pages, "tokens": tokens}
    return check_values(batch, **sizes, **demands_of(attend.spec))
