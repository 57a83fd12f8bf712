"""`Axes`: which axes of a mesh share what of an attention."""

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

Names = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Axes:
    """What the devices of a mesh share among them; each field is a mesh axis, a tuple of them, or None.

    * ``kv_heads``: tensor parallelism. Each device has some of the KV heads, and the query heads that read them. Where
      there are fewer KV heads than devices each is repeated, and its query heads are split.
    * ``sequences``: data parallelism. Each shard has sequences and pages of its own, and its tables count those pages
      alone. Batches come from `RaggedBatch.stack`.
    * ``context``: context parallelism. The pages of one sequence lie on many devices; each attends to what it has, and
      one collective brings the states together.

    Mesh axes that are in no field hold copies. Raises ``ValueError`` or ``TypeError`` for a name that is given twice,
    or that is none.

    >>> Axes(kv_heads="model", sequences=("replica", "data"))
    Axes(kv_heads='model', sequences=('replica', 'data'), context=None)
    """

    kv_heads: Names = None
    sequences: Names = None
    context: Names = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _canonical(field.name, getattr(self, field.name)))
        names = [name for field in dataclasses.fields(self) for name in names_of(getattr(self, field.name))]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Each mesh axis shares one thing; {name!r} is given more than once in {self}.")

    @property
    def pages(self) -> Names:
        """The mesh axes that share pages: those of ``sequences``, then those of ``context``."""
        return joined(self.sequences, self.context)


@dataclasses.dataclass(frozen=True)
class Shares:
    """Into how many parts a mesh cuts KV heads, sequences and contexts."""

    kv_heads: int
    sequences: int
    context: int

    @classmethod
    def of(cls, axes: Axes, mesh: Mesh) -> "Shares":
        """Raises ``TypeError`` for something else than a mesh, ``ValueError`` for an axis that it does not have."""
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh gives; got {mesh!r}.")
        sizes = {}
        for field in dataclasses.fields(axes):
            names = names_of(getattr(axes, field.name))
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
        """Into how many parts the pages are cut."""
        return self.sequences * self.context


def names_of(names: Any) -> tuple[str, ...]:
    """The mesh axes of a field, or of an entry of a ``PartitionSpec``."""
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def joined(*fields: Names) -> Names:
    """Several fields' mesh axes, the first the slowest."""
    return _shortest(tuple(name for names in fields for name in names_of(names)))


def _shortest(names: tuple[str, ...]) -> Names:
    return names if len(names) > 1 else names[0] if names else None


def _canonical(field: str, names: Any) -> Names:
    is_names = names is None or isinstance(names, str | tuple | list)
    if not is_names or not all(isinstance(name, str) and name for name in names_of(names)):
        raise TypeError(f"{field} must be a mesh axis's name, a tuple of them, or None; got {names!r}.")
    return _shortest(names_of(names))
