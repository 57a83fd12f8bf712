"""`lower` and `write`: from a spec and a page layout to a function of arrays."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from paged.spec import AttentionSpec, Flag, PageLayout, Pages, RaggedBatch, as_bool

from .attend import Attend
from .base import Lowering, Schedule
from .mesh import Axes, ShardedAttend, lower_on_mesh, require_mesh
from .program import PageCopies, Program, Sequences
from .registry import select, select_write
from .require import require_batch, require_layout, require_new_tokens, require_pages
from .run import copied
from .schedule import Advice


@overload
def lower(
    spec: AttentionSpec,
    layout: PageLayout,
    target: str = "auto",
    *,
    schedule: Schedule | None = None,
    check: Flag = False,
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
    check: Flag = False,
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
    check: Flag = False,
    interpret: Any = False,
) -> Attend | ShardedAttend:
    """Lower a spec over a page layout to a target: make a declaration a function of arrays.

    **Arguments:**

    - `spec`: what the attention means.
    - `layout`: how the pages lie in memory.
    - `target`: ``"xla"``; ``"tpu"``; ``"gpu"``, a decode kernel for Hopper GPUs that was never timed and runs by this
      name only; or ``"auto"``, which uses for each call the best lowering that runs on this process's devices and
      accepts the call.
    - `mesh`: many devices. The result is then a `ShardedAttend`.
    - `axes`: which axes of the mesh divide KV heads, sequences and contexts. Where each array lies follows from them.
    - `in_specs`, `out_specs`: instead of `axes`, from which the axes follow: a dict of a ``PartitionSpec`` by argument
      (for ``pages``, the one of their first array), and the output's. Where both are given they must agree.
    - `schedule`: a schedule, which goes before a context's (see `schedules`), before a tuned one (see `tune`), and
      before the lowering's heuristic.
    - `check`: whether every call checks the values of its batch with `paged.check`. False by default, since the check
      under ``jax.jit`` calls the host; the layers of `paged.runtime` check by default. Without it, faults of the caller
      give the results that `docs/semantics.md` lists under "Edges", and never a crash.
    - `interpret`: True runs kernels on any machine, slowly, in Pallas's interpreter of TPU or of GPU kernels. A
      ``jax.experimental.pallas.tpu.InterpretParams`` has its settings; True is ``InterpretParams()``. For GPU kernels
      it is a ``jax.experimental.pallas.mosaic_gpu.InterpretGPUParams``, of JAX 0.12 or later.

    **Returns:** the attention, a pure function of arrays.

    Raises ``ValueError`` where layout and spec do not fit together, and where no lowering of the target accepts the
    spec, with every lowering's reason.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=4)
    >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> attend = lower(spec, layout)
    >>> batch = RaggedBatch.decode(lengths=[3, 0], block_tables=[[5, 1], [-1, -1]])
    >>> q, kv = jnp.ones((2, 4, 8)), jnp.ones((2, 2, 8))
    >>> out, pages = attend.update(q, kv, kv, layout.init(num_pages=8), batch)
    >>> out.shape, float(out[1].sum())
    ((2, 4, 8), 0.0)
    """
    check = as_bool("check", check)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a schedule, such as paged.XlaSchedule(pages_per_block=8); got {schedule!r}.")
    require_mesh(mesh, axes, in_specs, out_specs)
    if mesh is not None:
        one = functools.partial(lower, target=target, schedule=schedule, interpret=interpret)
        return lower_on_mesh(one, spec, layout, mesh, axes, (in_specs, out_specs), check)
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
    """Write this step's keys and values into the pages, without attending.

    Row ``i`` of a sequence with ``n`` rows is written as its token ``lengths - n + i``. Rows of no sequence, tokens
    before the first or past the table, and tokens whose table entry is no page of the pool are dropped. Gradients flow
    to ``k``, ``v`` and float ``pages``. Pages that the batch's ``copy_from`` names are copied first.

    **Arguments:**

    - `k`, `v`: new keys and values, one row per query token of the batch. Float pages store them rounded to their
      dtype. Quantised pages store ``k / scale``, rounded and saturated; per-token scales are computed here.
    - `pages`: the pages. Donate them to ``jax.jit``, and they are updated in place.
    - `batch`: whose rows these are, and where the tokens of their sequences lie.
    - `target`: ``"xla"``, ``"tpu"``, ``"gpu"`` or ``"auto"``: a kernel on TPUs, and XLA elsewhere.
    - `interpret`: see `lower`.

    **Returns:** the new pages. Raises ``ValueError`` or ``TypeError`` for wrong shapes and dtypes, and ``ValueError``
    where nothing on the target writes pages of this layout.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=1, dtype=jnp.float32)
    >>> batch = RaggedBatch.prefill(length=3, block_table=[2, 0], query_rows=2)
    >>> k = jnp.array([[[7.0]], [[8.0]]])
    >>> write(k, -k, layout.init(num_pages=3), batch).keys()[:, 0, :, 0].tolist()
    [[8.0, 0.0], [0.0, 0.0], [0.0, 7.0]]
    """
    require_pages(None, pages)
    require_batch(batch)
    require_new_tokens(pages.layout, k, v)
    lowering = select_write(pages.layout, target)
    return _write(lowering.interpreted(interpret) if interpret else lowering, k, v, pages, batch)


@functools.partial(jax.jit, static_argnums=0)
def _write(lowering: Lowering, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
    if not batch.has_rows(k.shape[0]):
        return pages
    seqs = Sequences.of(batch, k.shape[0], pages.layout.page_size)
    if batch.copy_from is not None:
        pages = copied(lowering, pages, batch.copy_from, seqs)
    return lowering.write(k, v, pages, seqs, batch.query_rows)


def copy_pages(
    pages: Pages,
    source: Int[Array | np.ndarray, " copies"] | Sequence[int],
    target_page: Int[Array | np.ndarray, " copies"] | Sequence[int],
    target: str = "auto",
    *,
    interpret: Any = False,
) -> Pages:
    """Copy pages of a pool to other pages of the same pool, in place, without a pass over the pool.

    A step does this by itself for the pages that its batch's ``copy_from`` names. This function is for other moves, one
    layer at a time. Per-token scales are copied along. The gradient of a page goes to the page that it was copied from.

    **Arguments:**

    - `pages`: the pages of one layer. Donate them to ``jax.jit``, and they are updated in place.
    - `source`: the pages that are copied.
    - `target_page`: the page that each is copied to. No page may be copied to twice, nor be a source too.
    - `target`, `interpret`: see `write`. A TPU copies by a kernel from memory to memory, or by XLA where no kernel can
      read the pages.

    **Returns:** the new pages. A copy from or to a number that is no page of the pool, such as -1, is left out. Raises
    ``ValueError`` or ``TypeError`` for wrong shapes and dtypes.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=1, dtype=jnp.float32)
    >>> k = jnp.arange(6.0).reshape(6, 1, 1)
    >>> pages = write(k, k, layout.init(num_pages=4), RaggedBatch.prefill(6, [0, 1, 2], 6))
    >>> copy_pages(pages, [1, -1], [3, 0]).keys()[:, 0, :, 0].tolist()
    [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [2.0, 3.0]]
    """
    require_pages(None, pages)
    ids = [x if isinstance(x, jax.Array) else np.asarray(x) for x in (source, target_page)]
    for name, x in zip(("source", "target_page"), ids, strict=True):
        if x.ndim != 1 or x.shape != ids[0].shape or (x.size and not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(
                f"{name} must be integers [copies], as many as source has; got {x.dtype.name}{list(x.shape)}."
            )
    lowering = select_write(pages.layout, target)
    lowering = lowering.interpreted(interpret) if interpret else lowering
    return _copy_pages(lowering, pages, *(jnp.asarray(x, jnp.int32) for x in ids))


@functools.partial(jax.jit, static_argnums=0)
def _copy_pages(lowering: Lowering, pages: Pages, source: Array, target: Array) -> Pages:
    return lowering.copy(pages, PageCopies.between(source, target, pages.num_pages)) if source.shape[0] else pages
