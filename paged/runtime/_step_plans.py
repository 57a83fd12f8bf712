"""`StepPlans`: the plans of one step, which the attentions of a model share while it is traced."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import jax
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Int

from paged.lower import Attend, Call, Lowering, Plan, Schedule, ShardedAttend, Step
from paged.spec import GroupedBatch, Mask, PageLayout, Pages, RaggedBatch, batch_for


class _Key(NamedTuple):
    """What is equal in the calls that share a plan."""

    mask: Mask
    layout: PageLayout
    call: Call
    lowering: Lowering
    schedule: Schedule
    placement: Any  # on a mesh, the devices and how they share the work
    check: bool
    values: tuple[str, ...]  # names


class _Asked(NamedTuple):
    """A call as `Attend.plan` needs it: of queries and pages only shapes and dtypes."""

    attend: Attend | ShardedAttend
    q: Any
    pages: Pages

    def key(self, batch: RaggedBatch) -> _Key:
        """What this call shares with others, of a step whose batch for this spec this is."""
        attend, call = self.attend, self.attend.call_of(self.q, self.pages, batch)
        lowering, schedule, _ = attend.choice(call)
        facts = (attend.spec.visibility, attend.layout, call, lowering, schedule, attend.placement)
        return _Key(*facts, attend.check, self.values)

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(value.name for value in self.attend.spec.values)

    def with_pages(self, num_pages: int) -> "_Asked":
        layout = self.attend.layout
        arrays = tuple(jax.ShapeDtypeStruct(shape, layout.dtype) for shape in layout.array_shapes(num_pages))
        return self._replace(pages=dataclasses.replace(self.pages, arrays=arrays))


class _Above(NamedTuple):
    """Whose layer a step is: the plans of all layers, the pages of one layer, and how a plan of these is shifted."""

    plans: "StepPlans"
    num_pages: int
    moved: Callable[[Plan], Plan]


class StepPlans:
    """A step, and the plans that its calls share.

    Inside of `shared`, a call of `PagedCache` that is given the arrays of this very batch uses a plan in its place. The
    first call of each mask, layout and call shape makes the plan. A call with other arrays uses them: those of a layer
    that changes the batch, or hands it to a function that JAX traces on its own.

    - `step`: the batch. Or a plan, which is used as it is.
    """

    def __init__(self, step: Step):
        self.step = step
        self._plans: dict[_Key, Plan] = {}
        self._trace = get_opaque_trace_state()
        self._asked: list[_Asked] = []  # by the layers, for the pages of one layer
        self._above: _Above | None = None  # whose layer this is

    @classmethod
    def of(cls, step: Step) -> "StepPlans":
        """New ones, with those plans that the caller's surroundings share already for this step."""
        own, around = cls(step), _around(step)
        if around is not None:
            if around._trace == own._trace:
                return around
            own._plans |= around._plans
        return own

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A context in which calls find these plans."""
        token = _SHARED.set((self, *_SHARED.get()))
        try:
            yield
        finally:
            _SHARED.reset(token)

    def for_layer(self, layer: Any, num_pages: int, num_layers: int, shards: int = 1, devices: int = 1) -> "StepPlans":
        """The step for one of several layers whose pages lie in one pool, see `Plan.for_layer`.

        The ``num_pages`` of a layer are those of ``shards`` of sequences, each on as many ``devices`` of a context.
        """
        part, step = num_pages // (shards * devices), self.step
        if isinstance(step, Plan):
            own = StepPlans(step.for_layer(layer, part, num_layers))
        else:
            own = StepPlans(step.for_layer(layer, num_pages // shards, num_layers, devices))
        own._above = _Above(self, num_pages, lambda plan: plan.for_layer(layer, part, num_layers))
        for key, plan in self._plans.items():
            if key.call.num_pages == part:
                moved = own._above.moved(plan)
                own._plans[key._replace(call=moved.facts.call)] = moved
        return own

    def make_asked(self) -> None:
        """Make the plans that layers have asked for: before the loop in which they will ask again."""
        for asked in self._asked:
            self.plan_for(asked)
        self._asked.clear()

    def plan_for(self, asked: _Asked) -> RaggedBatch | Plan:
        """The plan for a call, made if there is none.

        Inside of a function with a trace of its own no plan is made, because it could not be used outside: the step is
        returned, as the call's spec reads it.
        """
        if isinstance(self.step, Plan):
            return self.step
        batch = batch_for(asked.attend.spec, self.step)
        key = asked.key(batch)
        if key not in self._plans:
            if self._trace != get_opaque_trace_state():
                return batch
            self._plans[key] = self._made(asked)
        return self._plans[key]

    def _made(self, asked: _Asked) -> Plan:
        """A new plan: of a layer, the plan for the pages of one layer, shifted, and asked for before the next loop."""
        if self._above is None:
            batch: RaggedBatch = batch_for(asked.attend.spec, self.step)
            return asked.attend.plan(asked.q, asked.pages, batch.naming(asked.values))
        above, num_pages, moved = self._above
        one = asked.with_pages(num_pages)
        above._asked.append(one)
        return moved(above._made(one))

    def positions(self, tokens: Any, page_size: int) -> Int[Array, " tokens"] | None:
        """The position of each query row, if a plan has them."""
        for key, plan in self._plans.items():
            shards = plan.positions.size // key.call.tokens // plan.facts.copies
            if (shards * key.call.tokens, key.layout.page_size) == (tokens, page_size):
                return plan.row_positions
        return None


# Innermost first.
_SHARED: contextvars.ContextVar[tuple[StepPlans, ...]] = contextvars.ContextVar("paged.step_plans", default=())


def planned(attend: Attend | ShardedAttend, q: Array, pages: Pages, step: Step) -> RaggedBatch | Plan:
    """The plan that a call shares with others of its step. Where none are shared, the step as its spec reads it."""
    around, own = _around(step), attend.here if isinstance(attend, ShardedAttend) else attend
    if around is None:
        return batch_for(attend.spec, step)
    q_shape, page_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (q, pages))
    return around.plan_for(_Asked(own, q_shape, page_shapes))


def planned_positions(batch: RaggedBatch | GroupedBatch, tokens: Any, page_size: int) -> Int[Array, " tokens"] | None:
    """The position of each query row of a step, if a plan that its calls share has them."""
    around = _around(batch)
    return None if around is None else around.positions(tokens, page_size)


def is_in_stack() -> bool:
    """Whether this is traced inside of a layer of a `LayerStack`, whose pages have other numbers than the layer's."""
    return any(plans._above is not None for plans in _SHARED.get())


def _around(step: Step) -> Optional["StepPlans"]:
    """What is shared around this call for this step, by the identity of its arrays."""
    return next((plans for plans in _SHARED.get() if _is_same(plans.step, step)), None)


def _is_same(one: Step, other: Step) -> bool:
    if isinstance(one, Plan) or isinstance(other, Plan):
        return False
    (own, structure), (given, given_structure) = jax.tree.flatten(one), jax.tree.flatten(other)
    return structure == given_structure and all(x is y for x, y in zip(own, given, strict=True))
