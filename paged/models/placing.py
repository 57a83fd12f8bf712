"""Where the arrays of a `Decoder` lie on a mesh: KV heads and the inner features of perceptrons are shared out."""

from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .config import Config

# For each array that is shared out, the axis that is, counted without the axis of layers. All others are whole on
# every device.
_SHARED = {
    "self_attn.qkv_proj.weight": 0,
    "self_attn.qkv_proj.bias": 0,
    "self_attn.o_proj.weight": 1,
    "self_attn.sinks": 0,
    "mlp.gate_up_proj.weight": 1,
    "mlp.gate_up_proj.bias": 1,
    "mlp.down_proj.weight": 1,
}
# Experts, by their first axis.
_SHARED_EXPERTS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with axes whose placement XLA infers: the products of a model name no placements."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def require_shares(config: Config, mesh: Mesh, axis: str | None, sequences: str | None, num_pages: int) -> None:
    """Raise unless devices share KV heads and inner features evenly by one axis, and pages by the other."""
    for name, own in {"axis": axis, "sequences": sequences}.items():
        if own is not None and own not in mesh.shape:
            raise ValueError(f"{name} must be one of the mesh's {', '.join(map(repr, mesh.axis_names))}; got {own!r}.")
    if sequences is not None and num_pages % mesh.shape[sequences]:
        raise ValueError(
            f"num_pages must be a multiple of the {mesh.shape[sequences]} devices of the mesh's axis {sequences!r}, "
            f"which have as many each; got {num_pages}."
        )
    if axis is None:
        return
    devices = mesh.shape[axis]
    counts = {"num_key_value_heads": config.num_kv_heads}
    if config.experts is None:
        counts["intermediate_size"] = config.intermediate_size
    else:
        counts["num_local_experts"] = config.experts.num_experts
    for name, count in counts.items():
        if count % devices:
            raise ValueError(
                f"The {devices} devices of the mesh's axis {axis!r} cannot share the {count} of {name} evenly: use a "
                "mesh whose axis divides it."
            )


def sharding_of(attribute: str, rank: int, has_layers: bool, mesh: Mesh, axis: str | None) -> NamedSharding:
    """How an array lies.

    **Arguments:**

    - `attribute`: its name in a layer, or in the model.
    - `rank`: of the array.
    - `has_layers`: whether its first axis counts layers.
    - `mesh`, `axis`: the mesh, and its axis over which arrays are shared out.
    """
    shared = _SHARED.get(attribute)
    if attribute.removeprefix("mlp.") in _SHARED_EXPERTS:
        shared = 0
    spec: list[str | None] = [None] * rank
    if shared is not None and has_layers:
        spec[shared + 1] = axis
    return NamedSharding(mesh, P(*spec))
