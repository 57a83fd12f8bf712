"""`Attend`: a lowered attention on one device, which is called with arrays and answers what a call will run."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from paged.spec import (
    AttentionSpec,
    AttentionState,
    GroupedBatch,
    PageLayout,
    Pages,
    RaggedBatch,
    Sinks,
    batch_for,
    require_sinks,
)

from ._check import check, demands_of, require_checked
from ._explain import Explanation, explain
from .base import Lowering, Schedule
from .jax_version import on_whole_arrays
from .plan import Plan, Step, batch_of, make_plan
from .program import Call, Program, Results
from .registry import device_kinds
from .require import require_new_tokens, require_pages, require_queries, require_whole_call
from .run import choice_of, run_state, run_update
from .schedule import EXPLICIT, NO_ADVICE, Advice, Choice, choose, choose_for_any_call
from .tpu import Chip


@dataclasses.dataclass(frozen=True)
class Attend:
    """A lowered attention: a pure function of arrays, made by `lower`. Hashable.

    It works under ``jax.jit``, ``vmap``, ``scan``, ``checkpoint`` and ``shard_map``; and under ``export``, on XLA with
    symbolic numbers of rows, sequences, pages and table entries. It has every first and second derivative, in any
    order of ``grad``, ``jvp``, ``linearize`` and ``hessian``, and third ones in forward mode; `paged.dense_attention`
    has derivatives of any order.

    * ``attend(q, pages, batch, sinks)`` attends over the pages as they are.
    * ``attend.state(q, pages, batch, sinks)`` also gives the log-sum-exp, for `merge`.
    * ``attend.update(q, k, v, pages, batch, sinks)`` writes new keys and values first; ``attend.update_state`` does so
      and also gives the log-sum-exp.
    * ``attend.explain(q, pages, batch)`` says what will run.

    Gradients flow to ``q``, float ``pages``, ``sinks`` and whatever the spec's biases close over. They are finite in
    empty rows. Scales of quantised pages are constants.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
    >>> batch = RaggedBatch.decode(lengths=[3, 0], block_tables=[[3, 1], [-1, -1]])
    >>> attend, pages = lower(spec, layout), layout.init(num_pages=4)
    >>> state = attend.state(jnp.ones((2, 4, 8)), pages, batch)
    >>> state.out.shape, state.lse[:, 0].tolist() == [float(jnp.log(3.0)), -jnp.inf]
    ((2, 4, 8), True)
    """

    spec: AttentionSpec
    layout: PageLayout
    program: Program
    lowerings: tuple[Lowering, ...]  # the lowerings that accept the program, in order of preference
    pinned: Schedule | None  # the caller's schedule
    check: bool
    advice: Advice = NO_ADVICE  # what contexts and the tuning file proposed when it was lowered
    pinned_by: str = EXPLICIT  # how the caller gave the schedule

    def __hash__(self) -> int:
        """Computed once, because every call outside of ``jax.jit`` finds its program by it."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.layout, self.lowerings, self.pinned, self.check, self.advice))

    def __getstate__(self) -> dict[str, Any]:
        """The fields, without the hash, which differs in another process."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def lowering(self) -> Lowering:
        """The preferred lowering. A call that it refuses goes to the next one."""
        return self.lowerings[0]

    @property
    def schedule(self) -> Schedule:
        """The schedule of a common call: the caller's, or else a context's, or else the lowering's heuristic."""
        return self.choice().schedule

    def on_chip(self, generation: str | Chip) -> "Attend":
        """This attention as it would be lowered for a chip, whatever this process has.

        **Arguments:**

        - `generation`: a key of `paged.CHIPS`, such as ``"v5e"``, or a `paged.Chip`; or a GPU: ``"a100"``,
          ``"h100"``, ``"h200"`` or ``"b200"``.

        **Returns:** the attention, to ask for its schedule and explanation, or to compile with `compile_for`.

        Raises ``ValueError`` that lists the known generations, for another one.
        """
        kinds = device_kinds(generation)
        lowerings = tuple(lowering.on_chip(generation) for lowering in self.lowerings)
        return dataclasses.replace(self, lowerings=lowerings, advice=self.advice.on(kinds))

    def choice(self, call: Call | None = None) -> Choice:
        """The lowering that runs a call, its schedule, and who picked the schedule.

        **Arguments:**

        - `call`: the shapes of the call; None for a common call.

        **Returns:** ``(lowering, schedule, source)``. Raises ``ValueError`` when no lowering accepts the call, and when
        the schedule of the caller or of a context cannot run.
        """
        if call is None:
            return choose_for_any_call(
                self.program, self.layout, self.lowering, self.pinned, self.advice, self.pinned_by
            )
        return choose(self.program, self.layout, self.lowerings, self.pinned, self.advice, call, self.pinned_by)

    def __call__(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> Float[Array, "tokens q_heads value_dim"]:
        """Attend over the pages as they are.

        **Arguments:**

        - `q`: queries, one row per query token of the batch, in float16, bfloat16 or float32.
        - `pages`: pages of the layout that was lowered for. They hold this step's own keys and values already.
        - `batch`: whose rows these are, and where the tokens of their sequences lie. Or the step's plan, see `plan`. Of
          a `GroupedBatch` the table of this spec's group is used.
        - `sinks`: logits of the sinks, float[q_heads] or float[q_heads, n]; given exactly when the spec has sinks.

        **Returns:** the output in ``q``'s dtype, 0 in rows that see no key and in rows of no sequence.

        Raises ``ValueError`` or ``TypeError`` that names the argument, for a wrong shape or dtype when traced; with
        ``check`` also ``ValueError`` for a wrong value in the batch, see `check`.
        """
        return self._checked(False, q, pages, batch, sinks).out

    def state(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> AttentionState:
        """The output and its log-sum-exp, to `merge` with the state over other tokens.

        **Arguments:** see `__call__`.

        **Returns:** the output in ``q``'s dtype, and the natural log-sum-exp of the scores, float32[tokens, q_heads],
        with sinks. A row that sees no key has ``(0, -inf)``, or with sinks ``(0, sink)``. A row of no sequence has
        ``(0, -inf)``. Raises as a call does.
        """
        return self._checked(True, q, pages, batch, sinks).state

    def _checked(self, has_lse: bool, q: Array, pages: Pages, batch: Any, sinks: Sinks | None) -> Results:
        batch = self._step(q, pages, batch)
        require_sinks(self.spec, sinks)
        return _state(self, has_lse, q, pages, batch, sinks)

    def update(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        pages: Pages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], Pages]:
        """Write this step's keys and values into the pages, then attend.

        **Arguments:**

        - `q`, `pages`, `batch`, `sinks`: see `__call__`. Donate ``pages`` to ``jax.jit``: they are updated in place.
        - `k`, `v`: new keys and values, one row per row of ``q``. Row ``i`` of a sequence with ``n`` rows is written
          as its token ``lengths - n + i``.

        **Returns:** the output, as a call's, and the new pages. Raises as a call does.

        >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
        >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
        >>> batch = RaggedBatch.decode(lengths=[1, 0], block_tables=[[5, 1], [-1, -1]])
        >>> q, kv = jnp.ones((2, 4, 8)), jnp.full((2, 2, 8), 7.0)
        >>> out, pages = lower(spec, layout).update(q, kv, kv, layout.init(num_pages=8), batch)
        >>> out[:, 0, 0].tolist()  # the token sees itself; the other slot is empty
        [7.0, 0.0]
        """
        results, pages = self._updated(False, q, k, v, pages, batch, sinks)
        return results.out, pages

    def update_state(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        pages: Pages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> tuple[AttentionState, Pages]:
        """`update`, with the log-sum-exp beside the output.

        **Arguments:** see `update`.

        **Returns:** the state, as `state` gives it over the new pages, and the new pages. Raises as a call does.
        """
        results, pages = self._updated(True, q, k, v, pages, batch, sinks)
        return results.state, pages

    def _updated(
        self, has_lse: bool, q: Array, k: Array, v: Array, pages: Pages, batch: Step, sinks: Sinks | None
    ) -> tuple[Results, Pages]:
        batch = self._step(q, pages, batch)
        require_sinks(self.spec, sinks)
        require_new_tokens(self.layout, k, v, q.shape[0])
        return _update(self, has_lse, q, k, v, pages, batch, sinks)

    def _step(self, q: Any, pages: Pages, step: Step) -> RaggedBatch | Plan:
        """The batch or the plan of a call, after checks of all shapes, and with ``check`` of the batch's values."""
        if type(step) is not Plan:
            own: RaggedBatch = batch_for(self.spec, step)
            require_queries(self.spec, q, own)
            require_pages(self.layout, pages)
            return check(self.spec, pages, own, q.shape[0]) if self.check else own
        step.require_mesh(None)
        require_queries(self.spec, q, step.batch)
        require_pages(self.layout, pages)
        if self.check:
            sizes = {"page_size": self.layout.page_size, "num_pages": pages.num_pages, "tokens": q.shape[0]}
            require_checked(step.batch, **sizes, **demands_of(self.spec))
        return step

    def plan(
        self,
        q: Float[Array | jax.ShapeDtypeStruct, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch | GroupedBatch,
    ) -> Plan:
        """Compute once what all calls of a step compute from its batch alone.

        The calls of all layers with this mask then accept the plan in place of the batch, and give the same results,
        bit for bit. In a ``jax.lax.scan`` over layers nothing is listed in the loop then. See `Plan`.

        **Arguments:**

        - `q`, `pages`: the arrays of the calls. Only their shapes and dtypes matter: ``jax.ShapeDtypeStruct`` does for
          queries.
        - `batch`: the step's batch. With ``check`` its values are checked, here and not in the calls.

        **Returns:** the plan. Raises as a call does.

        >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
        >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
        >>> batch = RaggedBatch.decode(lengths=[3, 0], block_tables=[[3, 1], [-1, -1]])
        >>> first, second = lower(spec, layout), lower(spec.replace(soft_cap=50.0), layout)
        >>> q, pages = jnp.ones((2, 4, 8)), layout.init(num_pages=4)
        >>> plan = first.plan(q, pages, batch)
        >>> bool((first(q, pages, plan) == first(q, pages, batch)).all()), second(q, pages, plan).shape
        (True, (2, 4, 8))
        """
        if type(batch) is Plan:
            raise TypeError("batch must be a paged.RaggedBatch; got a Plan, which a call accepts as it is.")
        checked: Any = self._step(q, pages, batch)
        return _plan(self, self.call_of(q, pages, checked), checked)

    def call_of(self, q: Any, pages: Pages, batch: RaggedBatch) -> Call:
        """The static facts of a call, of whose arguments only shapes and dtypes matter. A plan is for one such call."""
        return Call.of(q, pages, batch)

    @property
    def placement(self) -> None:
        """On which devices of a mesh a plan's arrays lie, see `ShardedAttend.placement`: here there is none."""
        return None

    def explain(
        self,
        q: Float[Array | jax.ShapeDtypeStruct, "tokens q_heads head_dim"] | None = None,
        pages: Pages | None = None,
        batch: Step | None = None,
    ) -> Explanation:
        """Explain what a call will run: program, schedule, who picked it, and why other lowerings refuse.

        **Arguments:**

        - `q`, `pages`, `batch`: the arrays of a call; or none of them, for a common call. Only the batch, or the plan,
          must be concrete: ``jax.ShapeDtypeStruct`` does for queries.

        **Returns:** the explanation. With a batch it also counts the pages and bytes that the call touches.

        Raises ``TypeError`` when only some of the arguments are given.

        >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=2)
        >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
        >>> batch = RaggedBatch.decode(lengths=[7], block_tables=[[5, 1, 0, 2]])
        >>> explanation = lower(spec, layout).explain(jnp.ones((1, 4, 8)), layout.init(num_pages=8), batch)
        >>> explanation.pages_visited, explanation.pages_held
        (2, 4)
        """
        require_whole_call(q=q, pages=pages, batch=batch)
        if q is None or pages is None or batch is None:
            return explain(self.program, self.layout, self.choice())
        step: RaggedBatch | Plan = batch_for(self.spec, batch)
        call = Call.of(q, pages, batch_of(step))
        program = self.program.for_batch(batch_of(step))
        return explain(program, self.layout, choice_of(self, program, call, step), call, batch_of(step))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _plan(attend: Attend, call: Call, batch: RaggedBatch) -> Plan:
    program = attend.program.for_batch(batch)
    run = functools.partial(make_plan, program, attend.layout, attend.choice(call), call)
    return on_whole_arrays(run, batch=batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _state(
    attend: Attend, has_lse: bool, q: Array, pages: Pages, batch: RaggedBatch | Plan, sinks: Array | None
) -> Results:
    run = functools.partial(run_state, attend, attend.program, has_lse)
    return on_whole_arrays(run, q=q, pages=pages, batch=batch, sinks=sinks)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(
    attend: Attend,
    has_lse: bool,
    q: Array,
    k: Array,
    v: Array,
    pages: Pages,
    batch: RaggedBatch | Plan,
    sinks: Array | None,
) -> tuple[Results, Pages]:
    run = functools.partial(run_update, attend, attend.program, has_lse)
    return on_whole_arrays(run, q=q, k=k, v=v, pages=pages, batch=batch, sinks=sinks)
