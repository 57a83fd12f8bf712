"""`Plan`: what a step's calls compute from the batch alone, computed once for all layers of one mask."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paged.spec import GroupedBatch, Mask, PageLayout, RaggedBatch

from .base import Lowering, Schedule
from .program import Call, Program, Sequences
from .schedule import PLANNED, Choice

_REMEDY = "Attentions of one mask, layout and call shape share a plan; make one for the others with attend.plan(...)."


@dataclasses.dataclass(frozen=True)
class PlanFacts:
    """What a plan was made for. A call that differs in any of these would read another call's lists.

    ``mesh`` is the mesh and its axes, for a plan whose arrays lie on the devices of a mesh; else None. ``copies`` tells
    how many devices have the same rows. These are neighbours on the arrays' axis of devices.
    """

    visibility: Mask
    layout: PageLayout
    call: Call
    lowering: Lowering
    schedule: Schedule
    mesh: Any
    copies: int = 1


class Plan(eqx.Module):
    """A step, planned once: the batch with all that calls compute from it alone. Made by `Attend.plan`.

    A call accepts a plan in place of the batch, and gives the same results, bit for bit. What depends on the batch
    alone, such as which pages each row sees and where new rows are written, is then computed once for a step and not
    once for a layer. A plan is for every attention with the same mask, layout and call shape, whatever its scores,
    scale and sinks. It is a pytree, and goes through ``jit``, ``scan`` and ``shard_map``.

    * ``batch``: the batch.
    * ``seqs``: the batch as lowerings read it, with the lowering's lists; None where a step has no row.
    * ``positions`` i32[tokens]: the position of each query row, for rotary embeddings. A row of no sequence has any.
    * ``facts``: what the plan was made for.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
    >>> attend, pages, q = lower(spec, layout), layout.init(num_pages=4), jnp.ones((2, 4, 8))
    >>> plan = attend.plan(q, pages, RaggedBatch.decode(lengths=[3, 1], block_tables=[[3, 1], [2, -1]]))
    >>> plan.positions.tolist(), attend(q, pages, plan).shape
    ([2, 0], (2, 4, 8))
    """

    batch: RaggedBatch
    seqs: Sequences | None
    positions: Int[Array, " tokens"]
    facts: PlanFacts = eqx.field(static=True)

    def for_layer(self, layer: Any, num_pages: int, num_layers: int) -> "Plan":
        """This plan for one of several layers whose pages lie in one pool, one layer after the other.

        A model that runs its layers in a ``jax.lax.scan`` makes one plan before the scan, for the pages of one layer,
        and shifts it in the scan as `RaggedBatch.for_layer` shifts a batch. No list is made anew.

        **Arguments:**

        - `layer`: the layer, an int or a traced int32: a value in ``[0, num_layers)``.
        - `num_pages`: how many pages each layer has: as many as the plan was made for. On a mesh, on each device.
        - `num_layers`: how many layers the pool holds: it has ``num_layers * num_pages`` pages.

        **Returns:** the plan for calls with that pool. Raises ``ValueError`` for another number of pages.
        """
        call, seqs = self.facts.call, self.seqs
        if num_pages != call.num_pages:
            raise ValueError(f"The plan is for {call.num_pages} pages; each layer has {num_pages}. {_REMEDY}")
        batch, checked = self.batch.for_layer(layer, num_pages, num_layers), self.batch.checked_for
        if checked is not None:  # by all devices of a context together, for the pages of all of them
            checked = checked._replace(num_pages=num_layers * checked.num_pages)
            batch = batch.with_fields(checked_for=checked)
        if seqs is not None:
            planned = None if seqs.planned is None else seqs.planned.moved(layer * num_pages)
            seqs = seqs._replace(tables=batch.block_tables, planned=planned)
        facts = dataclasses.replace(self.facts, call=dataclasses.replace(call, num_pages=num_layers * num_pages))
        return dataclasses.replace(self, batch=batch, seqs=seqs, facts=facts)

    @property
    def row_positions(self) -> Int[Array, " tokens"]:
        """The position of every query row of the step, of all devices of a mesh."""
        if self.facts.mesh is None:
            return self.positions
        return self.positions[:: self.facts.copies].reshape(-1)

    def choice(
        self,
        program: Program,
        layout: PageLayout,
        lowerings: tuple[Lowering, ...],
        pinned: Schedule | None,
        call: Call,
    ) -> Choice:
        """What runs a call with this plan: what the plan was made for, because its lists are for that schedule.

        ``ValueError`` says what differs, if the plan is not for such a call.
        """
        facts, names = self.facts, ", ".join(lowering.name for lowering in lowerings)
        pairs = [
            (f"the mask {facts.visibility}", facts.visibility == program.visibility, program.visibility),
            (f"{facts.layout}", facts.layout == layout, layout),
            (f"the lowering {facts.lowering.name}", facts.lowering in lowerings, names),
            (f"{facts.schedule}", pinned in (None, facts.schedule), pinned),
        ]
        for field in dataclasses.fields(Call):
            own, asked = getattr(facts.call, field.name), getattr(call, field.name)
            pairs.append((f"calls with {field.name} = {own}", own == asked, asked))
        for own, is_alike, asked in pairs:
            if not is_alike:
                raise ValueError(f"The plan is for {own}; this call has {asked}. {_REMEDY}")
        reason = facts.lowering.refuses(program, layout, call)
        reason = reason or facts.lowering.cannot_honour(program, layout, call, facts.schedule)
        if reason is not None:
            raise ValueError(f"The plan is for {facts.schedule}, which cannot run this call: {reason}. {_REMEDY}")
        return Choice(facts.lowering, facts.schedule, PLANNED)

    def require_mesh(self, mesh: Any) -> None:
        """``ValueError`` unless the plan's arrays lie on these devices: a mesh and its axes, or None for one device."""
        if self.facts.mesh != mesh:
            own, asked = (_devices(x) for x in (self.facts.mesh, mesh))
            raise ValueError(f"The plan is for {own}; this attention is of {asked}. {_REMEDY}")


def _devices(mesh: Any) -> str:
    return "one device" if mesh is None else f"the devices of {mesh[0]} by {mesh[1]}"


def make_plan(program: Program, layout: PageLayout, choice: Choice, call: Call, batch: RaggedBatch) -> Plan:
    """The plan of a step for the lowering and the schedule that were chosen for its calls."""
    facts = PlanFacts(program.visibility, layout, call, choice.lowering, choice.schedule, mesh=None)
    if not batch.has_rows(call.tokens):
        return Plan(batch, None, jnp.zeros(call.tokens, jnp.int32), facts)
    seqs = Sequences.of(batch, call.tokens, layout.page_size)
    positions = seqs.rows(call.tokens)[1] if batch.positions is None else batch.positions
    planned = choice.lowering.plan(program, choice.schedule, call, layout, seqs)
    return Plan(batch, seqs._replace(planned=planned), positions, facts)


# What a call takes as its step.
Step = RaggedBatch | GroupedBatch | Plan


def batch_of(step: RaggedBatch | Plan) -> RaggedBatch:
    """The batch of a step that may be planned."""
    return step.batch if type(step) is Plan else step  # pyright: ignore


def stacked_plan(plan: Plan, mesh: Any, copies: int) -> Plan:
    """One device's plan with a leading axis of devices on every array, as a plan for all devices of ``mesh`` has it."""
    facts = dataclasses.replace(plan.facts, mesh=mesh, copies=copies)
    return dataclasses.replace(jax.tree.map(lambda x: x[None], plan), facts=facts)
