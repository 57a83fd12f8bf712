"""`Axes`: which axes of a mesh divide the KV heads, the sequences and the contexts of an attention."""

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

Names = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a mesh divide what among devices. Devices along any other axis hold copies.

    **Arguments:** each is the name of a mesh axis, a tuple of names, or None.

    - `kv_heads`: tensor parallelism. Each device has some of the KV heads, and the query heads that read them. With
      fewer KV heads than devices each KV head is on several devices, and its query heads are divided among these.
    - `sequences`: data parallelism. Each shard has sequences and pages of its own, and its block tables number its
      own pages from 0. Batches come from `RaggedBatch.stack`.
    - `context`: context parallelism. The pages of a sequence lie on many devices. Each device attends to its own pages,
      and one collective merges the states.

    Raises ``TypeError`` for what is no name, and ``ValueError`` for a name that is given twice.

    >>> Axes(kv_heads="model", sequences=("replica", "data"))
    Axes(kv_heads='model', sequences=('replica', 'data'), context=None)
    """

    kv_heads: Names = None
    sequences: Names = None
    context: Names = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _canonical(field.name, getattr(self, field.name)))
        names = [name for field in dataclasses.fields(self) for name in mesh_axes(getattr(self, field.name))]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"A mesh axis divides one thing only; {name!r} is given more than once in {self}.")

    @property
    def pages(self) -> Names:
        """The mesh axes that divide the pages: the axes of ``sequences``, then the axes of ``context``."""
        return joined(self.sequences, self.context)


@dataclasses.dataclass(frozen=True)
class Shares:
    """Among how many devices the KV heads, the sequences and the contexts are divided."""

    kv_heads: int
    sequences: int
    context: int

    @classmethod
    def of(cls, axes: Axes, mesh: Mesh) -> "Shares":
        """Raises ``TypeError`` unless ``mesh`` is a mesh, and ``ValueError`` for an axis that it does not have."""
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh gives; got {mesh!r}.")
        sizes = {}
        for field in dataclasses.fields(axes):
            names = mesh_axes(getattr(axes, field.name))
            for name in names:
                if name not in mesh.shape:
                    raise ValueError(
                        f"axes.{field.name} names {name!r}, which the mesh does not have: it has "
                        f"{tuple(mesh.axis_names)}."
                    )
            sizes[field.name] = math.prod(mesh.shape[name] for name in names)
        return cls(**sizes)

    @property
    def pages(self) -> int:
        """Among how many devices the pages are divided."""
        return self.sequences * self.context


def require_mesh(mesh: Mesh | None, axes: Axes | None, in_specs: Any, out_specs: Any) -> None:
    """``ValueError`` for arguments that divide arrays among devices, without a mesh of devices."""
    if mesh is None and not (axes is None and in_specs is None and out_specs is None):
        raise ValueError("axes, in_specs and out_specs divide arrays among the devices of a mesh: they need mesh=.")


def mesh_axes(names: Any) -> tuple[str, ...]:
    """The names of mesh axes in a field of `Axes`, or in an entry of a ``PartitionSpec``."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def joined(*fields: Names) -> Names:
    """The mesh axes of several fields, in order: neighbours along the last axis have neighbouring parts."""
    return _shortest(tuple(name for names in fields for name in mesh_axes(names)))


def _shortest(names: tuple[str, ...]) -> Names:
    return names if len(names) > 1 else names[0] if names else None


def _canonical(field: str, names: Any) -> Names:
    is_names = names is None or isinstance(names, str | tuple | list)
    if not is_names or not all(isinstance(name, str) and name for name in mesh_axes(names)):
        raise TypeError(f"{field} must be a mesh axis's name, a tuple of them, or None; got {names!r}.")
    return _shortest(mesh_axes(names))
