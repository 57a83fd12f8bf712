"""How `jax.export` stores the pytrees of this package in an exported function: their static fields as JSON.

The package imports this module, which registers `Pages`, `RaggedBatch`, `GroupedBatch` and `AttentionState`. To
serialise an exported function, JAX needs the package ``flatbuffers``.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import export

from .batch import RaggedBatch
from .given import Value
from .grouped_batch import GroupedBatch
from .layout import PageLayout, Pages
from .mask import And, Mask, Not, Or
from .masks import Causal, Chunk, Everything, Nothing, Prefix, Window
from .spans import Segments, Spans
from .state import AttentionState
from .tree_mask import Tree

# The masks that can be written down, and what they are made of; others hold functions.
_TERMS = (And, Or, Not, Causal, Chunk, Everything, Nothing, Prefix, Window, Segments, Spans, Tree, Value)
_BY_NAME = {term.__name__: term for term in _TERMS}


def register_module(example: eqx.Module, *static: str) -> None:
    """Register the class of a module with `jax.export`.

    **Arguments:**

    - `example`: an instance, for the structure of its pytree.
    - `static`: the names of its static fields, which must be its last fields. Their values are numbers, strings, None,
      a `PageLayout`, the masks of this package but for `Where`, and tuples of these; for any other value
      ``Exported.serialize`` raises ``ValueError``.
    """
    cls, tree = type(example), jax.tree.structure(example, is_leaf=lambda part: part is not example)

    def write(aux_data: Any) -> bytes:
        values = zip(static, _static_values(aux_data, static), strict=True)
        return json.dumps([_written(cls, name, value) for name, value in values]).encode()

    def build(aux_data: list[Any], children: Sequence[Any]) -> Any:
        module = jax.tree.unflatten(tree, children)
        for name, value in zip(static, aux_data, strict=True):
            object.__setattr__(module, name, _read(value))
        return module

    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"paged.{cls.__name__}",
        serialize_auxdata=write,
        deserialize_auxdata=lambda data: json.loads(bytes(data)),
        from_children=build,
    )


def _static_values(aux_data: Any, names: Sequence[str]) -> list[Any]:
    """The values of static fields in what Equinox keeps of a module beside its arrays.

    Equinox 0.13.2 keeps an object with pairs of a name and a value. Later versions keep the values alone, these last.
    """
    pairs = getattr(aux_data, "static_fields", None)
    if pairs is not None:
        return [dict(pairs)[name] for name in names]
    return list(aux_data[len(aux_data) - len(names) :])


def _written(cls: type, name: str, value: Any) -> Any:
    if isinstance(value, PageLayout):
        return {**dataclasses.asdict(value), "dtype": value.dtype.name}
    if value is None or isinstance(value, int | float | str):
        return value
    if type(value) is tuple:
        return [_written(cls, name, part) for part in value]
    if type(value) in _TERMS:
        fields = [_written(cls, name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {"term": type(value).__name__, "fields": fields}
    if isinstance(value, Mask):
        raise ValueError(f"{cls.__name__}.{name} cannot be written down: the mask {value} may be any function.")
    raise ValueError(
        f"{cls.__name__}.{name} cannot be written down; got {value!r}. A batch that `paged.check` has marked is sound "
        "for a mask, which may be any function: export with a batch of the same arrays that is not marked."
    )


def _read(value: Any) -> Any:
    """What `_written` wrote."""
    if isinstance(value, list):
        return tuple(map(_read, value))
    if not isinstance(value, dict):
        return value
    return _BY_NAME[value["term"]](*map(_read, value["fields"])) if "term" in value else PageLayout(**value)


def _shapes(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


register_module(Pages((), None, None, PageLayout(page_size=1, num_kv_heads=1, head_dim=1)), "layout")
register_module(RaggedBatch(*_shapes((1,), (1, 1), (2,), ())), "query_rows", "checked_for", "has_even_starts")
register_module(GroupedBatch([RaggedBatch(*_shapes((1,), (1, 1), (2,), ()))], [[Everything()]]), "checked_for", "masks")
export.register_namedtuple_serialization(AttentionState, serialized_name="paged.AttentionState")
