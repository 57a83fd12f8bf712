"""`paged.lower` on a mesh: the attention of one device, and what all devices together are."""

from collections.abc import Callable, Mapping

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from paged.spec import AttentionSpec, PageLayout

from ..attend import Attend
from ..program import Program
from ..require import require_layout
from .axes import Axes, Shares
from .heads import repeats_of, share_of
from .sharded import ShardedAttend
from .specs import axes_of, require_agreement, require_names


def lower_on_mesh(
    lower_one: Callable[[AttentionSpec, PageLayout], Attend],
    spec: AttentionSpec,
    layout: PageLayout,
    mesh: Mesh,
    axes: Axes | None,
    specs: tuple[Mapping[str, P] | None, P | None],
    check: bool,
) -> ShardedAttend:
    """`paged.lower` on a mesh. ``lower_one`` lowers one device's share; ``specs`` are in_specs and out_specs."""
    require_layout(spec, layout)
    in_specs, out_specs = specs
    if in_specs is not None:
        require_names(in_specs)
    if out_specs is not None and not isinstance(out_specs, P):
        raise TypeError(f"out_specs must be a PartitionSpec, the output's; got {out_specs!r}.")
    if axes is None:
        axes = axes_of(in_specs or {}, out_specs, layout)
    if not isinstance(axes, Axes):
        raise TypeError(f'axes must be paged.Axes, such as Axes(kv_heads="model"); got {axes!r}.')
    shares = Shares.of(axes, mesh).kv_heads
    whole = layout.replace(num_kv_heads=layout.num_kv_heads * repeats_of(spec, shares))
    first_device = lower_one(*share_of(spec, whole, shares, None))
    own_spec, _ = share_of(spec, whole, shares, axes.kv_heads)
    sharded = ShardedAttend(spec, whole, mesh, axes, first_device, Program.from_spec(own_spec), check)
    require_agreement(sharded.specs, in_specs or {}, out_specs)
    return sharded
