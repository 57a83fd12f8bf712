"""`Devices`: the mesh of a call, and how its arguments lie on it, in the words of `paged.lower`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from paged.lower import Axes, ShardedAttend, entries_of, lower, mesh_axes, require_mesh
from paged.spec import AttentionSpec, PageLayout

from .names import ARRAYS

# The arguments that are divided among devices, by their name in `paged.lower`. Every device has all of the others.
_NATIVE = {"query": "q", "queries": "q", "keys": "k", "values": "v", "softmax_aux": "sinks"}
_NATIVE |= {"key_cache": "pages", "value_cache": "pages", "kv_pages": "pages"}


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh, and how its axes divide the arrays of a call. Hashable, so that JAX traces once per value."""

    mesh: Mesh
    axes: Axes | None
    in_specs: tuple[tuple[str, P], ...]
    out_specs: P | None

    @classmethod
    def of(cls, mesh: Any, axes: Any, in_specs: Any, out_specs: Any, **arguments: Any) -> "Devices | None":
        """The devices of a call, or None without a mesh. ``arguments`` are its arrays in order, queries first."""
        require_mesh(mesh, axes, in_specs, out_specs)
        if mesh is None or (axes is None and in_specs is None and out_specs is None and isinstance(mesh, Mesh)):
            return None
        out, given = _outputs(out_specs, arguments), list(_by_name(in_specs, arguments).items())
        given += [("kv_pages", spec) for spec in out[1:]]
        native: dict[str, P] = {}
        for name, spec in given:
            if not isinstance(spec, P):
                raise TypeError(f"The spec of {name} must be a PartitionSpec; got {spec!r}.")
            own = _NATIVE.get(name)
            spec = spec if axes is not None else _without_axes_of_one(spec, mesh)
            if own == "sinks" and not entries_of(spec):
                continue  # a few numbers, which may lie anywhere: each device takes those of its heads
            if own is None and any(entry is not None for entry in spec):
                raise ValueError(f"The spec of {name} must be P(): every device needs all of it; got {spec}.")
            if own is not None:
                spec = _of_rows(spec, arguments[name]) if own in ("q", "k", "v") else spec
                if entries_of(native.setdefault(own, spec)) != entries_of(spec):
                    raise ValueError(
                        f"All caches, given and returned, need the same spec; got {native[own]}, and {spec} for {name}."
                    )
        rows = _of_rows(out[0], next(iter(arguments.values()))) if out else None
        rows = rows if rows is None or axes is not None else _without_axes_of_one(rows, mesh)
        return cls(mesh, axes, tuple(native.items()), rows)

    def repeats(self, kv_heads: int) -> int:
        """How many copies of each KV head the cache needs, so that every device has at least one."""
        q = dict(self.in_specs).get("q", self.out_specs)
        names = self.axes.kv_heads if isinstance(self.axes, Axes) else (*(q or ()), None, None)[1]
        shares = math.prod(self.mesh.shape.get(name, 1) for name in mesh_axes(names))
        return shares // kv_heads if shares > kv_heads and shares % kv_heads == 0 else 1

    def lowered(self, spec: AttentionSpec, layout: PageLayout, target: str, interpret: Any) -> ShardedAttend:
        """The attention on the mesh. Raises ``ValueError`` for axes that divide sequences."""
        in_specs = dict(self.in_specs)
        if "pages" in in_specs and "q" in in_specs and self.repeats(layout.num_kv_heads) > 1:
            # Too few KV heads to divide: the cache with repeated heads is divided as the queries are.
            entries = [*in_specs["pages"], *[None] * 4]
            entries[layout.head_axis] = (*in_specs["q"], None, None)[1]
            in_specs["pages"] = P(*entries)
        given = {"in_specs": in_specs, "out_specs": self.out_specs}
        attend = lower(spec, layout, target, mesh=self.mesh, axes=self.axes, interpret=interpret, **given)
        if attend.axes.sequences is not None:
            raise ValueError(
                f"Sequences cannot be divided here, over {attend.axes.sequences!r}: these signatures have one batch, "
                "and each shard of sequences needs its own. Use paged.lower with RaggedBatch.stack."
            )
        return attend


def _by_name(in_specs: Any, arguments: Mapping[str, Any]) -> dict[str, P]:
    """Specs by argument, from a dict or from a tuple in the order of the arguments that are arrays. None is ``P()``.

    A tuple may have an entry for sinks in calls that have none.
    """
    if in_specs is None:
        return {}
    if not isinstance(in_specs, Mapping):
        names = [name for name, value in arguments.items() if value is not None]
        if isinstance(in_specs, tuple | list) and len(in_specs) > len(names):
            names = list(arguments)
        if not isinstance(in_specs, tuple | list) or isinstance(in_specs, P) or len(in_specs) != len(names):
            raise ValueError(
                f"in_specs must be a dict of PartitionSpecs by argument, or a tuple of one for each of {names}; got "
                f"{in_specs!r}."
            )
        given: list[tuple[str, Any]] = list(zip(names, in_specs, strict=True))
    else:
        given = [
            (str(name) if name in arguments else ARRAYS.get(str(name), str(name)), spec)
            for name, spec in in_specs.items()
        ]
        unknown = [name for name, _ in given if name not in arguments]
        if unknown:
            raise ValueError(f"in_specs must be of {list(arguments)}; got {unknown}.")
    return {name: P() if spec is None else spec for name, spec in given if arguments[name] is not None}


def _without_axes_of_one(spec: P, mesh: Mesh) -> P:
    """The spec without axes of the mesh that have one device, which divide nothing."""
    names = [[name for name in mesh_axes(entry) if mesh.shape.get(name) != 1] for entry in spec]
    return P(*(tuple(entry) if len(entry) > 1 else entry[0] if entry else None for entry in names))


def _outputs(out_specs: Any, arguments: Mapping[str, Any]) -> list[P]:
    """The given specs of the results: of the output, and of the cache where the call returns it."""
    out = [] if out_specs is None else [out_specs] if isinstance(out_specs, P) else list(out_specs)
    most = 2 if "keys" in arguments else 1
    if len(out) > most or not all(isinstance(spec, P) for spec in out):
        also = ", or a pair, for the output and for kv_pages" if most == 2 else ""
        raise ValueError(f"out_specs must be a PartitionSpec{also}; got {out_specs!r}.")
    return out


def _of_rows(spec: P, array: Any) -> P:
    """The spec of rows [tokens, heads, dim], from the spec of an array that may be [batch, seq, heads, dim]."""
    if getattr(array, "ndim", 3) != 4:
        return spec
    batch, seq, *others = (*spec, None, None)[: max(len(spec), 2)]
    if batch is not None and seq is not None:
        raise ValueError(f"Sequences cannot be divided here; got {spec}.")
    return P(batch if seq is None else seq, *others)
