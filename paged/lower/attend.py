"""`lower`, the door: from a spec and a page layout to a function of arrays, and what there is to ask of it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, overload

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from paged.spec import AttentionSpec, AttentionState, PageLayout, Pages, RaggedBatch

from .advice import NO_ADVICE, Advice
from .call import Call
from .checks import check, require_layout, require_new_tokens, require_pages, require_queries, require_sinks
from .choice import Choice, choose, choose_for_any_call
from .explain import Explanation, explain
from .finish import finish
from .lowering import Lowering
from .mesh import Axes, ShardedAttend, on_mesh
from .program import Program
from .schedule import Schedule
from .select import select, select_write
from .tpu import Chip


@dataclasses.dataclass(frozen=True)
class Attend:
    """A lowered attention: a pure function of arrays, made by `lower`. Hashable; works under every JAX transform.

    ``out = attend(q, pages, batch, sinks=None)``, where ``q`` is float[tokens, q_heads, head_dim] and ``out`` is
    float[tokens, q_heads, value_dim] in ``q``'s dtype, 0 in empty rows and in rows of no sequence. Gradients flow to
    ``q``, float ``pages``, ``sinks`` and whatever the spec's biases close over, and are finite in empty rows; scales
    of quantised pages are constants.
    """

    spec: AttentionSpec
    layout: PageLayout
    program: Program
    lowerings: tuple[Lowering, ...]  # those that take the program, in order of preference
    pinned: Schedule | None  # the caller's schedule
    check: bool
    advice: Advice = NO_ADVICE  # what contexts and the tuning file said when it was lowered

    def __hash__(self) -> int:
        """Computed once: by it every call outside of ``jax.jit`` finds its program."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.layout, self.lowerings, self.pinned, self.check, self.advice))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a hash means nothing in another process."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def lowering(self) -> Lowering:
        """The lowering of choice; a call that it refuses goes to the next."""
        return self.lowerings[0]

    @property
    def schedule(self) -> Schedule:
        """The caller's schedule, or a context's, or else what the lowering would choose for a common call."""
        return self.choice().schedule

    def on_chip(self, chip: Chip) -> "Attend":
        """This attention as it would be lowered on a chip, whatever this process has."""
        lowerings = tuple(lowering.on_chip(chip) for lowering in self.lowerings)
        return dataclasses.replace(self, lowerings=lowerings, advice=self.advice.on(chip.device_kinds))

    def choose(self, call: Call) -> tuple[Lowering, Schedule]:
        """What runs in a call of these shapes. Raises ``ValueError`` when no lowering takes it, or when the caller's
        schedule cannot be honoured."""
        return self.choice(call)[:2]

    def choice(self, call: Call | None = None) -> Choice:
        """`choose`, and who chose; without a call, for a common one."""
        if call is None:
            return choose_for_any_call(self.program, self.layout, self.lowering, self.pinned, self.advice)
        return choose(self.program, self.layout, self.lowerings, self.pinned, self.advice, call)

    def __call__(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch,
        sinks: Float[Array, " q_heads"] | None = None,
    ) -> Float[Array, "tokens q_heads value_dim"]:
        """Attend over the pages as they are."""
        return self.state(q, pages, batch, sinks).out

    def state(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch,
        sinks: Float[Array, " q_heads"] | None = None,
    ) -> AttentionState:
        """The output and its log-sum-exp, for `paged.merge`; in an empty row ``(0, -inf)``, or ``(0, sink)``."""
        require_queries(self.spec, q, batch)
        require_pages(self.layout, pages)
        require_sinks(self.spec, sinks)
        if self.check:
            batch = check(batch, pages, q.shape[0], self.spec)
        return _state(self, q, pages, batch, sinks)

    def update(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        pages: Pages,
        batch: RaggedBatch,
        sinks: Float[Array, " q_heads"] | None = None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], Pages]:
        """Write this step's keys and values into their slots, then attend. In place where ``pages`` are donated."""
        require_queries(self.spec, q, batch)
        require_pages(self.layout, pages)
        require_sinks(self.spec, sinks)
        require_new_tokens(self.layout, k, v, q.shape[0])
        if self.check:
            batch = check(batch, pages, q.shape[0], self.spec)
        state, pages = _update(self, q, k, v, pages, batch, sinks)
        return state.out, pages

    def explain(
        self,
        q: Float[Array, "tokens q_heads head_dim"] | None = None,
        pages: Pages | None = None,
        batch: RaggedBatch | None = None,
    ) -> Explanation:
        """What will run, who chose its schedule, and why not the others; with a concrete batch also the pages and bytes
        it touches."""
        if q is None or pages is None or batch is None:
            return explain(self.program, self.layout, self.choice())
        return explain(self.program, self.layout, self.choice(Call.of(q, pages, batch)), q, pages, batch)


@overload
def lower(
    spec: AttentionSpec,
    layout: PageLayout,
    target: str = "auto",
    *,
    schedule: Schedule | None = None,
    check: bool = False,
    interpret: Any = False,
) -> Attend: ...
@overload
def lower(
    spec: AttentionSpec,
    layout: PageLayout,
    target: str = "auto",
    *,
    mesh: Mesh,
    axes: Axes | None = None,
    in_specs: Mapping[str, PartitionSpec] | None = None,
    out_specs: PartitionSpec | None = None,
    schedule: Schedule | None = None,
    check: bool = False,
    interpret: Any = False,
) -> ShardedAttend: ...
def lower(
    spec: AttentionSpec,
    layout: PageLayout,
    target: str = "auto",
    *,
    mesh: Mesh | None = None,
    axes: Axes | None = None,
    in_specs: Mapping[str, PartitionSpec] | None = None,
    out_specs: PartitionSpec | None = None,
    schedule: Schedule | None = None,
    check: bool = False,
    interpret: Any = False,
) -> Attend | ShardedAttend:
    """Lower a spec over a page layout to a target: ``"xla"``, ``"tpu"``, or ``"auto"``, the best that takes each call.

    ``schedule`` goes before what the context says (`schedules`), that before what `tune` has stored, and that before
    the lowering's own choice. With ``check`` every call checks the batch's values with `paged.check`; without, faults
    of the caller give the results that the semantics name, and never a crash.
    ``interpret`` runs kernels on any machine, slowly: True, or the interpreter's own settings
    (``jax.experimental.pallas.tpu.InterpretParams``).

    With ``mesh`` and ``axes`` it is a `ShardedAttend`, which runs on every device of the mesh. How arrays lie there
    follows from the axes; or the axes follow from ``in_specs``, by argument (of ``pages``, that of their first array),
    and ``out_specs``. Given together they must agree.

    Raises ``ValueError`` when no lowering of the target takes the spec, with every candidate's reason.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=4)
    >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> attend = lower(spec, layout)
    >>> batch = RaggedBatch.decode(lengths=[3, 0], block_tables=[[5, 1], [-1, -1]])
    >>> q, kv = jnp.ones((2, 4, 8)), jnp.ones((2, 2, 8))
    >>> out, pages = attend.update(q, kv, kv, layout.init(num_pages=8), batch)
    >>> out.shape, float(out[1].sum())
    ((2, 4, 8), 0.0)
    """
    if mesh is not None:
        one = functools.partial(lower, target=target, schedule=schedule, interpret=interpret)
        return on_mesh(one, spec, layout, mesh, axes, (in_specs, out_specs), check)
    if axes is not None or in_specs is not None or out_specs is not None:
        raise ValueError("axes, in_specs and out_specs say what a mesh shares: they need mesh=.")
    require_layout(spec, layout)
    program = Program.from_spec(spec)
    lowerings = select(program, layout, target, schedule)
    if interpret:
        lowerings = tuple(lowering.interpreted(interpret) for lowering in lowerings)
    return Attend(spec, layout, program, lowerings, schedule, check, Advice.now(program, layout))


def write(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads value_dim"],
    pages: Pages,
    batch: RaggedBatch,
    target: str = "auto",
    *,
    interpret: Any = False,
) -> Pages:
    """Write this step's keys and values into their slots; in place where ``pages`` are donated under ``jax.jit``.

    Row ``i`` of a sequence with ``n`` rows goes to token ``lengths - n + i``. Rows of no sequence, tokens before the
    first and table entries outside the pool are dropped. Float pages take ``k`` and ``v`` rounded to their dtype;
    quantised ones take ``k / scale``, rounded and saturated, where scales a token are computed here. Gradients flow to
    ``k``, ``v`` and float ``pages``.

    ``target`` and ``interpret`` are those of `lower`; ``"auto"`` is a kernel on TPUs and XLA elsewhere. Raises
    ``ValueError`` when nothing on the target writes pages of this layout.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=1, dtype=jnp.float32)
    >>> batch = RaggedBatch.prefill(length=3, block_table=[2, 0], query_rows=2)
    >>> k = jnp.array([[[7.0]], [[8.0]]])
    >>> write(k, -k, layout.init(num_pages=3), batch).keys()[:, 0, :, 0].tolist()
    [[8.0, 0.0], [0.0, 0.0], [0.0, 7.0]]
    """
    require_pages(None, pages)
    require_new_tokens(pages.layout, k, v)
    lowering = select_write(pages.layout, target)
    return _write(lowering.interpreted(interpret) if interpret else lowering, k, v, pages, batch)


@functools.partial(jax.jit, static_argnums=0)
def _state(attend: Attend, q: Array, pages: Pages, batch: RaggedBatch, sinks: Array | None) -> AttentionState:
    lowering, schedule = attend.choose(Call.of(q, pages, batch))
    state = lowering.state(attend.program, schedule, q, pages, batch)
    return finish(attend.spec, state, q, pages.layout.page_size, batch, sinks)


@functools.partial(jax.jit, static_argnums=0)
def _update(
    attend: Attend, q: Array, k: Array, v: Array, pages: Pages, batch: RaggedBatch, sinks: Array | None
) -> tuple[AttentionState, Pages]:
    lowering, schedule = attend.choose(Call.of(q, pages, batch))
    state, pages = lowering.update(attend.program, schedule, q, k, v, pages, batch)
    return finish(attend.spec, state, q, pages.layout.page_size, batch, sinks), pages


@functools.partial(jax.jit, static_argnums=0)
def _write(lowering: Lowering, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
    return lowering.write(k, v, pages, batch)
