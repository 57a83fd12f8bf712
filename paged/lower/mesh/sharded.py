"""`ShardedAttend`: a lowered attention on every device of a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

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

from .._check import demands_of, require_checked
from .._explain import Explanation, explain
from ..attend import Attend
from ..base import Schedule
from ..jax_version import manual_axes
from ..plan import Plan, Step, batch_of
from ..program import Call, Program, Results
from ..require import require_new_tokens, require_pages, require_queries, require_whole_call
from ..schedule import Choice
from ..tpu import Chip
from . import devices
from .axes import Axes, Shares, mesh_axes
from .context import copy_over, merge_over, spread
from .heads import repeated, with_one_head, with_own_head
from .specs import ArraySpecs


@dataclasses.dataclass(frozen=True)
class ShardedAttend:
    """A lowered attention on a mesh, made by ``lower(..., mesh=, axes=)``. Called like `Attend`; hashable.

    Arguments and results are arrays of all devices: all sequences, all heads, all pages. `specs` say how each array
    lies on the mesh; an array that lies otherwise is moved there at every call. With ``axes.sequences`` the batch comes
    from `RaggedBatch.stack`; rows and pages of the shards come one after the other, in the same order.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
    >>> mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
    >>> attend = lower(spec, layout, mesh=mesh, axes=Axes(kv_heads="model"))
    >>> pages = jax.device_put(attend.layout.init(num_pages=4), attend.shardings.pages)
    >>> batch = RaggedBatch.decode(lengths=[3, 0], block_tables=[[3, 1], [-1, -1]])
    >>> attend(jnp.ones((2, 4, 8)), pages, batch).shape
    (2, 4, 8)
    """

    spec: AttentionSpec
    layout: PageLayout  # of the whole cache, with KV heads repeated where devices outnumber them
    mesh: Mesh
    axes: Axes
    # The first device's attention: every device runs the lowering and the schedule that are chosen for it.
    first_device: Attend
    # The program that runs on each device under `jax.shard_map`. Its score operations find out there which heads of
    # all they see; in all else it is the first device's.
    program_per_device: Program
    check: bool

    @property
    def program(self) -> Program:
        """What all devices together compute."""
        return Program.from_spec(self.spec)

    @property
    def schedule(self) -> Schedule:
        """The schedule of each device for a common call."""
        return self.first_device.schedule

    @property
    def shares(self) -> Shares:
        """Among how many devices the heads, the sequences and the contexts are divided."""
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
    def here(self) -> "Attend | ShardedAttend":
        """The attention that a call on these devices runs.

        Inside of a ``jax.shard_map`` over its axes of sequences each shard calls it with its own rows, batch and pages.
        It is one shard's attention there, over the other axes, if there are any.
        """
        if self.axes.sequences is None or not set(mesh_axes(self.axes.sequences)) <= manual_axes():
            return self
        axes = dataclasses.replace(self.axes, sequences=None)
        if axes == Axes():
            return dataclasses.replace(self.first_device, check=self.check)
        return dataclasses.replace(self, axes=axes)

    @property
    def _repeats(self) -> int:
        return self.layout.num_kv_heads // self.spec.num_kv_heads

    def on_chip(self, generation: str | Chip) -> "ShardedAttend":
        """This attention as it would be lowered for a chip, whatever this process has. See `Attend.on_chip`."""
        return dataclasses.replace(self, first_device=self.first_device.on_chip(generation))

    def adopt(self, pages: Pages) -> Pages:
        """A pool for this attention from a pool of the spec's KV heads.

        **Arguments:**

        - `pages`: a pool with each KV head once.

        **Returns:** the same pool, or a copy with KV heads repeated where `layout` has them so. One KV head that all
        devices need is not copied where the pool is whole on every device already.
        """
        if self._has_one_head_on_all:
            return with_own_head(pages, self.mesh, self.axes, self.layout)
        return repeated(pages, self.layout)

    def with_each_head_once(self, pages: Pages) -> Pages:
        """A pool of the spec's one KV head, whole on every device, from a pool of this attention's, without a copy.

        **Arguments:**

        - `pages`: a pool from `adopt` or `update`, whose copies of the KV head are equal.

        Raises ``ValueError`` where devices have different KV heads.
        """
        if not self._has_one_head_on_all:
            raise ValueError(f"The {self.spec.num_kv_heads} KV heads are not all on every device.")
        return with_one_head(pages, self.mesh, self.axes)

    @property
    def _has_one_head_on_all(self) -> bool:
        """Whether every device has the pages of one and the same KV head."""
        return self._repeats > 1 and self._repeats == self.shares.kv_heads

    def deal(self, ids: Int[Array | np.ndarray, "..."], num_pages: int) -> Int[Array, "..."]:
        """Rename page ids so that consecutive ids lie on the devices of a context in turn.

        Allocators that hand out the lowest free id, such as `paged.runtime.PagePool`, would otherwise put a sequence on
        one device. Any block tables give right results; tables of renamed ids divide the work evenly.

        **Arguments:**

        - `ids`: page ids, such as a block table.
        - `num_pages`: the number of pages of the pool; with ``axes.sequences``, of one shard's pool.

        **Returns:** the new ids. Entries that are no page's id are kept.

        Raises ``ValueError`` unless the devices of the context divide ``num_pages``.
        """
        if num_pages % self.shares.context:
            raise ValueError(f"num_pages must be a multiple of {self.shares.context} devices; got {num_pages}.")
        return spread(ids, num_pages, self.shares.context)

    def __call__(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> Float[Array, "tokens q_heads value_dim"]:
        """Attend over the pages as they are. See `Attend.__call__`."""
        return self._checked(False, q, pages, batch, sinks).out

    def state(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> AttentionState:
        """The output and its log-sum-exp, merged over all devices of a context. See `Attend.state`."""
        return self._checked(True, q, pages, batch, sinks).state

    def _checked(self, has_lse: bool, q: Array, pages: Pages, batch: Step, sinks: Sinks | None) -> Results:
        own: Any = self.here
        if own is not self:
            return own._checked(has_lse, q, pages, batch, sinks)
        batch = self._require(q, pages, batch)
        require_sinks(self.spec, sinks)
        return devices.state(self, has_lse, q, pages, batch, sinks)

    def update(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        pages: Pages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], Pages]:
        """Write this step's keys and values into the pages, then attend. See `Attend.update`.

        Each device writes to its own pages. ``k`` and ``v`` have the spec's KV heads, each once.
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
        """`update`, with the log-sum-exp beside the output. See `Attend.update_state`."""
        results, pages = self._updated(True, q, k, v, pages, batch, sinks)
        return results.state, pages

    def plan(
        self,
        q: Float[Array | jax.ShapeDtypeStruct, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch | GroupedBatch,
    ) -> Plan:
        """Compute once what all calls of a step compute from its batch alone. See `Attend.plan`.

        Each device makes its own plan: every array of the result has a leading axis of devices.
        """
        if isinstance(batch, Plan):
            raise TypeError("batch must be a paged.RaggedBatch; got a Plan, which a call accepts as it is.")
        if (own := self.here) is not self:
            return own.plan(q, pages, batch)
        checked: Any = self._require(q, pages, batch)
        return devices.plan(self, self.call_of(q, pages, checked), checked)

    def call_of(self, q: Any, pages: Pages, batch: RaggedBatch) -> Call:
        """The static facts of what each device runs in a call: of its own rows, over its own pages."""
        call = Call.of(q, pages, batch, has_holes=self._merge is not None)
        tokens, num_pages = call.tokens // self.shares.sequences, call.num_pages // self.shares.pages
        return dataclasses.replace(call, tokens=tokens, num_pages=num_pages)

    def choice(self, call: Call | None = None) -> Choice:
        """What runs such a call on each device. See `Attend.choice`."""
        return self.first_device.choice(call)

    @property
    def placement(self) -> tuple[Mesh, Axes]:
        """The devices, and how they share the work: what a plan is for."""
        return self.mesh, self.axes

    def _updated(
        self, has_lse: bool, q: Array, k: Array, v: Array, pages: Pages, batch: Step, sinks: Sinks | None
    ) -> tuple[Results, Pages]:
        own: Any = self.here
        if own is not self:
            return own._updated(has_lse, q, k, v, pages, batch, sinks)
        batch = self._require(q, pages, batch)
        require_sinks(self.spec, sinks)
        require_new_tokens(self.layout.replace(num_kv_heads=self.spec.num_kv_heads), k, v, q.shape[0])
        return devices.update(self, has_lse, q, k, v, pages, batch, sinks)

    def explain(
        self,
        q: Float[Array, "tokens q_heads head_dim"] | None = None,
        pages: Pages | None = None,
        batch: RaggedBatch | GroupedBatch | None = None,
    ) -> Explanation:
        """What each device will run, who picked its schedule, and what devices exchange. See `Attend.explain`.

        **Arguments:**

        - `q`, `pages`, `batch`: arrays of a call, of which the batch must be concrete; or none of them.

        **Returns:** the explanation. With a batch it counts the pages and bytes that all devices touch together.
        """
        require_whole_call(q=q, pages=pages, batch=batch)
        if isinstance(batch, Plan):
            raise TypeError("explain needs the batch itself; got its plan, in which each device has its own page ids.")
        if q is None or pages is None or batch is None:
            one = self.first_device.explain()
            return dataclasses.replace(one, program=self.program, layout=self.layout, notes=self._notes())
        step: RaggedBatch = batch_for(self.spec, batch)
        self._require_shapes(q, pages, step)
        parts = []
        for part in self._shards(step):
            call = self._call(q, pages, part)
            own = dataclasses.replace(call, num_pages=pages.num_pages // self.shares.pages)
            choice = self.first_device.choice(own)
            parts.append(explain(self.first_device.program, self.first_device.layout, choice, call, part))
        return dataclasses.replace(
            parts[0],
            program=self.program,
            layout=self.layout,
            pages_visited=sum(part.pages_visited for part in parts),
            pages_held=sum(part.pages_held for part in parts),
            pages_freed=sum(part.pages_freed for part in parts),
            notes=(*parts[0].notes, *self._notes()),
            lowering=None,
            call=None,
            batch=None,
        )

    def _notes(self) -> tuple[str, ...]:
        shares, spec = self.shares, self.first_device.spec
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

    def _require(self, q: Any, pages: Any, batch: Step) -> RaggedBatch | Plan:
        """Check shapes, and with ``check`` concrete values.

        Traced values are checked on each device: one callback for all devices would deadlock, because those that do not
        run it wait for the one that does.
        """
        step: RaggedBatch | Plan = batch_for(self.spec, batch)
        self._require_shapes(q, pages, step)
        tokens, num_pages = (n // self.shares.sequences for n in (q.shape[0], pages.num_pages))
        if isinstance(step, Plan):
            step.require_mesh(self.placement)
            if self.check:
                sizes = {"page_size": self.layout.page_size, "num_pages": num_pages, "tokens": tokens}
                require_checked(step.batch, **sizes, **demands_of(self.spec))
            return step
        if not self.check or any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(step)):
            return step
        parts = [devices.check_shard(self, part, tokens, num_pages) for part in self._shards(step)]
        return parts[0] if self.axes.sequences is None else RaggedBatch.stack(parts)

    def _require_shapes(self, q: Any, pages: Any, step: RaggedBatch | Plan) -> None:
        """Raise unless shapes and dtypes are right, and all devices get shares of one size."""
        require_pages(self.layout, pages)
        batch, shares = batch_of(step), self.shares
        stacked, is_divided = batch.lengths.ndim == 2, self.axes.sequences is not None
        if step is batch and (stacked != is_divided or (stacked and batch.lengths.shape[0] != shares.sequences)):
            need = "a plain RaggedBatch: these axes do not divide sequences"
            if self.axes.sequences is not None:
                need = f"RaggedBatch.stack of {shares.sequences} batches, one for each shard of sequences"
            raise ValueError(f"batch must be {need}; got lengths of shape {batch.lengths.shape}.")
        if pages.num_pages % shares.pages:
            raise ValueError(f"The pool has {pages.num_pages} pages, which {shares.pages} devices cannot share evenly.")
        if getattr(q, "ndim", 0) == 3 and q.shape[0] % shares.sequences:
            raise ValueError(f"q has {q.shape[0]} rows, which {shares.sequences} shards cannot share evenly.")
        if getattr(q, "shape", ()) and hasattr(q, "dtype"):
            q = jax.ShapeDtypeStruct((q.shape[0] // shares.sequences, *q.shape[1:]), q.dtype)
        shard = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[stacked:], x.dtype), batch)
        require_queries(self.spec, q, shard)

    def _call(self, q: Array, pages: Pages, shard: RaggedBatch) -> Call:
        """The call of one shard of sequences, over the pages of all devices that share its contexts."""
        call = Call.of(q, pages, shard, has_holes=self._merge is not None)
        tokens, num_pages = (n // self.shares.sequences for n in (call.tokens, call.num_pages))
        return dataclasses.replace(call, tokens=tokens, num_pages=num_pages)

    @property
    def _merge(self) -> Callable[[AttentionState], AttentionState] | None:
        """What makes the state over all of a context from each device's; None where a device has it all."""
        context = self.axes.context
        return None if context is None else lambda state: merge_over(state, context)

    @property
    def _copy(self) -> Any:
        """What copies pages between the devices that share contexts; None where a device has all of a context."""
        context = self.axes.context
        return None if context is None else lambda pages, copy_from, seqs: copy_over(pages, copy_from, seqs, context)

    def _shards(self, batch: RaggedBatch) -> list[RaggedBatch]:
        """The batch of each shard of sequences."""
        if self.axes.sequences is None:
            return [batch]
        return [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(self.shares.sequences)]
