"""`ShardedAttend`: a lowered attention on every device of a mesh, and what there is to ask of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from paged.spec import AttentionSpec, AttentionState, PageLayout, Pages, RaggedBatch, sinks_per_head

from .._check import check_values
from .._explain import Explanation, explain
from ..attend import Attend, finish
from ..jax_version import on_devices
from ..program import Call, Program
from ..require import require_layout, require_new_tokens, require_pages, require_queries, require_sinks
from .axes import Axes, Shares
from .context import dealt, merge_over, with_own_pages
from .heads import own_new_heads, repeated, repeats_of, share_of
from .specs import ArraySpecs, axes_of, require_agreement


@dataclasses.dataclass(frozen=True)
class ShardedAttend:
    """An attention on a mesh, made by ``lower(..., mesh=, axes=)``: called like `Attend`, with arrays of all devices.

    ``q``, ``k``, ``v`` and results are of all sequences and heads, ``layout`` is that of the whole cache, and `specs`
    say how each lies on the mesh; arrays that lie otherwise are moved. With ``axes.sequences`` the batch is one of
    `RaggedBatch.stack`, a shard's rows come after those of the shards before, and so do its pages. A pure function of
    arrays; hashable.
    """

    spec: AttentionSpec
    layout: PageLayout  # of the whole cache, KV heads repeated where the axes ask for it
    mesh: Mesh
    axes: Axes
    local: Attend  # what the first device runs
    every: Attend  # what each runs, under `jax.shard_map`: score operations ask there which heads they see
    check: bool

    @property
    def program(self) -> Program:
        """What is computed, by all devices together."""
        return Program.from_spec(self.spec)

    @property
    def schedule(self) -> Any:
        """The schedule of one device, for a common call."""
        return self.local.schedule

    @property
    def shares(self) -> Shares:
        """Into how many parts heads, sequences and contexts are cut."""
        return Shares.of(self.axes, self.mesh)

    @property
    def specs(self) -> ArraySpecs:
        """The `PartitionSpec` of each array."""
        return ArraySpecs.of(self.axes, self.layout, has_copies=self._repeats > 1)

    @property
    def shardings(self) -> ArraySpecs:
        """The `NamedSharding` of each array, for ``jax.device_put`` and ``out_shardings``."""
        is_spec = lambda x: isinstance(x, P)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs, is_leaf=is_spec)

    @property
    def _repeats(self) -> int:
        return self.layout.num_kv_heads // self.spec.num_kv_heads

    def on_chip(self, generation: str) -> "ShardedAttend":
        """This attention as it would be lowered for a chip, whatever this process has."""
        return self.with_local(lambda attend: attend.on_chip(generation))

    def with_local(self, change: Callable[[Attend], Attend]) -> "ShardedAttend":
        """With what each device runs changed."""
        return dataclasses.replace(self, local=change(self.local), every=change(self.every))

    def adopt(self, pages: Pages) -> Pages:
        """A pool of the spec's KV heads as one of `layout`: the same, or where it repeats them a copy."""
        return repeated(pages, self.layout)

    def deal(self, ids: Int[Array, "..."], num_pages: int) -> Int[Array, "..."]:
        """Page ids, so that pages with consecutive ones lie on devices in turn; ids that are no page stay.

        For allocators that hand out the lowest free id, such as `paged.runtime.PagePool`: the pages of a sequence then
        lie evenly on the devices of its context. Any tables are right; dealt ones share the work. ``num_pages`` is the
        pool's, of one shard of sequences.
        """
        if num_pages % self.shares.context:
            raise ValueError(f"num_pages must be a multiple of {self.shares.context} devices; got {num_pages}.")
        return dealt(ids, num_pages, self.shares.context)

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
        """The output and its log-sum-exp; in an empty row ``(0, -inf)``, or ``(0, sink)``."""
        batch = self._checked(q, pages, batch)
        require_sinks(self.spec, sinks)
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
        batch = self._checked(q, pages, batch)
        require_sinks(self.spec, sinks)
        require_new_tokens(dataclasses.replace(self.layout, num_kv_heads=self.spec.num_kv_heads), k, v, q.shape[0])
        return _update(self, q, k, v, pages, batch, sinks)

    def explain(
        self,
        q: Float[Array, "tokens q_heads head_dim"] | None = None,
        pages: Pages | None = None,
        batch: RaggedBatch | None = None,
    ) -> Explanation:
        """What one device will run, and what it exchanges with others; with a concrete batch also the pages and bytes
        that all devices touch together."""
        if q is None or pages is None or batch is None:
            one = self.local.explain()
            return dataclasses.replace(one, program=self.program, layout=self.layout, notes=self._notes())
        self._require(q, pages, batch)
        q, group = self._one_shard(q, pages)
        own = _abstract_pages(self.local.layout, pages.num_pages // self.shares.pages)
        parts = []
        for part in self._shards(batch):
            choice = self.local.choice(Call.of(q, own, part))
            parts.append(explain(self.local.program, self.local.layout, choice, q, group, part))
        return dataclasses.replace(
            parts[0],
            program=self.program,
            layout=self.layout,
            pages_visited=sum(part.pages_visited for part in parts),
            pages_held=sum(part.pages_held for part in parts),
            notes=(*parts[0].notes, *self._notes()),
        )

    def _notes(self) -> tuple[str, ...]:
        shares, spec = self.shares, self.local.spec
        lines = []
        if self.axes.kv_heads is not None:
            copies = f", each KV head on {self._repeats}" if self._repeats > 1 else ""
            own = f"{spec.num_q_heads} query and {spec.num_kv_heads} KV"
            lines.append(f"heads are shared by {shares.kv_heads} devices{copies}: {own} on each")
        if self.axes.sequences is not None:
            lines.append(f"sequences are shared by {shares.sequences} devices, each with its own pages")
        if self.axes.context is not None:
            what = f"[tokens, {spec.num_q_heads}, {self.layout.value_dim + 1}] float32"
            lines.append(f"contexts are shared by {shares.context} devices; one collective gathers states, {what}")
        return tuple(lines)

    def _checked(self, q: Any, pages: Any, batch: RaggedBatch) -> RaggedBatch:
        """The batch, when shapes are right, and on request its values, if they are known. If not, each device checks
        its own: were it one for all, the others would wait for it forever."""
        self._require(q, pages, batch)
        if not self.check or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(batch)):
            return batch
        one, group = self._one_shard(q, pages)
        parts = [_checked(self, part, one.shape[0], group.num_pages) for part in self._shards(batch)]
        return parts[0] if self.axes.sequences is None else RaggedBatch.stack(parts)

    def _require(self, q: Any, pages: Any, batch: RaggedBatch) -> None:
        """Raise unless shapes and dtypes are right, and every share is of one size."""
        require_pages(self.layout, pages)
        shares, stacked = self.shares, batch.lengths.ndim == 2
        if stacked != (self.axes.sequences is not None) or (stacked and batch.lengths.shape[0] != shares.sequences):
            need = "a plain RaggedBatch: these axes do not share sequences"
            if self.axes.sequences is not None:
                need = f"RaggedBatch.stack of {shares.sequences} batches, one for each shard of sequences"
            raise ValueError(f"batch must be {need}; got lengths of shape {batch.lengths.shape}.")
        if pages.num_pages % shares.pages:
            raise ValueError(f"The pool has {pages.num_pages} pages, which {shares.pages} devices cannot share evenly.")
        if getattr(q, "ndim", 0) == 3 and q.shape[0] % shares.sequences:
            raise ValueError(f"q has {q.shape[0]} rows, which {shares.sequences} shards cannot share evenly.")
        one = self._one_shard(q, pages)[0] if hasattr(q, "shape") and hasattr(q, "dtype") else q
        shard = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[stacked:], x.dtype), batch)
        require_queries(self.spec, one, shard)

    def _one_shard(self, q: Any, pages: Pages) -> tuple[Any, Pages]:
        """Queries and pages of one shard of sequences, abstract: on all devices of its context and heads."""
        rows = (q.shape[0] // self.shares.sequences, *q.shape[1:]) if q.shape else q.shape
        q = jax.ShapeDtypeStruct(rows, q.dtype)
        return q, _abstract_pages(self.layout, pages.num_pages // self.shares.sequences)

    def _shards(self, batch: RaggedBatch) -> list[RaggedBatch]:
        """The batch of each shard of sequences."""
        if self.axes.sequences is None:
            return [batch]
        return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(self.shares.sequences)]


def on_mesh(
    lower_one: "Callable[[AttentionSpec, PageLayout], Attend]",
    spec: AttentionSpec,
    layout: PageLayout,
    mesh: Mesh,
    axes: Axes | None,
    specs: tuple[Mapping[str, P] | None, P | None],
    check: bool,
) -> ShardedAttend:
    """The attention on a mesh, with ``lower_one`` to lower one device's share; ``specs`` are the caller's own, of
    inputs and of the output. See `paged.lower`."""
    require_layout(spec, layout)
    in_specs, out_specs = specs
    if axes is None:
        axes = axes_of(in_specs or {}, out_specs, layout)
    if not isinstance(axes, Axes):
        raise TypeError(f'axes must be paged.Axes, such as Axes(kv_heads="model"); got {axes!r}.')
    shares = Shares.of(axes, mesh).kv_heads
    whole = dataclasses.replace(layout, num_kv_heads=layout.num_kv_heads * repeats_of(spec, shares))
    local = lower_one(*share_of(spec, whole, shares, None))
    own, _ = share_of(spec, whole, shares, axes.kv_heads)
    every = dataclasses.replace(local, spec=own, program=Program.from_spec(own))
    sharded = ShardedAttend(spec, whole, mesh, axes, local, every, check)
    require_agreement(sharded.specs, in_specs or {}, out_specs)
    return sharded


@functools.partial(jax.jit, static_argnums=0)
def _state(attend: ShardedAttend, q: Array, pages: Pages, batch: RaggedBatch, sinks: Array | None) -> AttentionState:
    specs = attend.specs
    run = on_devices(
        functools.partial(_state_of_share, attend),
        attend.mesh,
        (specs.q, specs.pages, specs.batch, specs.sinks),
        AttentionState(specs.out, specs.lse),
    )
    return run(q, pages, batch, _per_head(attend, sinks))


@functools.partial(jax.jit, static_argnums=0)
def _update(
    attend: ShardedAttend, q: Array, k: Array, v: Array, pages: Pages, batch: RaggedBatch, sinks: Array | None
) -> tuple[Array, Pages]:
    specs = attend.specs
    run = on_devices(
        functools.partial(_update_of_share, attend),
        attend.mesh,
        (specs.q, specs.k, specs.v, specs.pages, specs.batch, specs.sinks),
        (specs.out, specs.pages),
    )
    return run(q, k, v, pages, batch, _per_head(attend, sinks))


def _state_of_share(
    attend: ShardedAttend, q: Array, pages: Pages, batch: RaggedBatch, sinks: Array | None
) -> AttentionState:
    """What one device computes, of its own shares of the arrays."""
    pages, batch = _of_share(attend, q, pages, batch)
    lowering, schedule, _ = attend.local.choice(Call.of(q, pages, batch))
    state = lowering.state(attend.every.program, schedule, q, pages, batch)
    return _whole(attend, state, q, batch, sinks)


def _update_of_share(
    attend: ShardedAttend, q: Array, k: Array, v: Array, pages: Pages, batch: RaggedBatch, sinks: Array | None
) -> tuple[Array, Pages]:
    """The same with a write before; a device writes what belongs into its own pages."""
    pages, batch = _of_share(attend, q, pages, batch)
    kv_heads = attend.local.layout.num_kv_heads
    k, v = (own_new_heads(x, kv_heads, attend._repeats, attend.axes.kv_heads) for x in (k, v))
    lowering, schedule, _ = attend.local.choice(Call.of(q, pages, batch))
    state, pages = lowering.update(attend.every.program, schedule, q, k, v, pages, batch)
    out = _whole(attend, state, q, batch, sinks).out
    return out, dataclasses.replace(pages, layout=attend.layout)


def _of_share(attend: ShardedAttend, q: Array, pages: Pages, batch: RaggedBatch) -> tuple[Pages, RaggedBatch]:
    """One device's arrays as its own attention takes them."""
    pages = dataclasses.replace(pages, layout=attend.local.layout)
    if attend.axes.sequences is not None:
        batch = jax.tree.map(lambda x: x[0], batch)
    if attend.check:
        batch = _checked(attend, batch, q.shape[0], pages.num_pages * attend.shares.context)
    if attend.axes.context is not None:
        batch = with_own_pages(batch, pages.num_pages, attend.axes.context)
    return pages, batch


def _checked(attend: ShardedAttend, batch: RaggedBatch, tokens: int, num_pages: int) -> RaggedBatch:
    """One shard's batch, with its values checked over the pages of all devices that share its contexts."""
    size = attend.layout.page_size
    return check_values(batch, page_size=size, num_pages=num_pages, tokens=tokens, mask=attend.spec.visibility)


def _whole(
    attend: ShardedAttend, state: AttentionState, q: Array, batch: RaggedBatch, sinks: Array | None
) -> AttentionState:
    """The state over all of the context, with sinks, which enter once."""
    if attend.axes.context is not None:
        state = merge_over(state, attend.axes.context)
    return finish(attend.every.spec, state, q, attend.layout.page_size, batch, sinks)


def _per_head(attend: ShardedAttend, sinks: Array | None) -> Array | None:
    """Sinks in the one shape that heads can be shared in."""
    if sinks is None or jnp.shape(sinks) == (attend.spec.num_q_heads,):
        return sinks
    return sinks_per_head(attend.spec, sinks)


def _abstract_pages(layout: PageLayout, num_pages: int) -> Pages:
    arrays = tuple(jax.ShapeDtypeStruct(shape, layout.dtype) for shape in layout.array_shapes(num_pages))
    return Pages(arrays, None, None, layout)  # pyright: ignore
