"""`lower` and `write`: from a spec and a page layout to a function of arrays."""

import functools
from collections.abc import Mapping
from typing import Any, overload

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from paged.spec import AttentionSpec, PageLayout, Pages, RaggedBatch

from .attend import Attend
from .base import Lowering, Schedule
from .mesh import Axes, ShardedAttend, lower_on_mesh, require_mesh
from .program import Program, Sequences
from .registry import select, select_write
from .require import require_layout, require_new_tokens, require_pages
from .schedule import Advice


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
    of the caller give the results that `docs/semantics.md` lists under "Edges", and never a crash.
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
def _write(lowering: Lowering, k: Array, v: Array, pages: Pages, batch: RaggedBatch) -> Pages:
    if not batch.has_rows(k.shape[0]):
        return pages
    seqs = Sequences.of(batch, k.shape[0], pages.layout.page_size)
    return lowering.write(k, v, pages, seqs, batch.query_rows)
