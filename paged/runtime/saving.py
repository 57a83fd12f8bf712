"""`save` and `load`: pages, pools and caches to a file and back, into another page order too."""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from paged.files import Weights, open_safetensors, write_safetensors
from paged.spec import PageLayout, Pages

from ._page_order import in_order

_FORMAT = "paged.runtime 1"
Tree = TypeVar("Tree")


def save(path: str | os.PathLike, tree: Any, *, tag: str = "") -> None:
    """Write what serving keeps to one file: a model's state with its pages, page pools, a prefix cache.

    The file is in the safetensors format, and appears whole or not at all. Pages that are free are written too.

    **Arguments:**

    - `path`: the file. One that exists is replaced when the new one is complete.
    - `tree`: a pytree of arrays, such as ``(state, pool)``: what belongs together goes into one file.
    - `tag`: text that says what the pages were computed by, such as a name and version of the weights. `load` asks for
      it.

    Raises ``TypeError`` for a leaf that is no array, and for a dtype that the format does not have. Arrays whose parts
    lie on devices of other processes raise what JAX raises.

    >>> import tempfile
    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4)
    >>> pool, _ = PagePool.init(4, num_slots=1, pages_per_seq=4, page_size=2).extend(jnp.array([3]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paged.runtime.save(folder + "/serving.safetensors", (layout.init(4), pool), tag="weights 1")
    ...     like = layout.replace(order="split").init(4), pool
    ...     pages, again = paged.runtime.load(folder + "/serving.safetensors", like, tag="weights 1")
    >>> pages.layout.order, again.block_tables.tolist()
    ('split', [[0, 1, -1, -1]])
    """
    arrays, facts = {}, []
    for part in _parts(tree):
        facts.append(part.facts)
        for name, array in part.arrays.items():
            if not isinstance(array, jax.Array | np.ndarray):
                raise TypeError(f"{name} must be an array; got {type(array).__name__}.")
            arrays[name] = array
    metadata = {"format": _FORMAT, "tag": tag, "parts": json.dumps(facts)}
    write_safetensors(path, arrays, metadata)


def load(path: str | os.PathLike, like: Tree, *, tag: str = "") -> Tree:
    """Read what `save` has written. Everything is checked before an array is read, and nothing is changed.

    **Arguments:**

    - `path`: the file.
    - `like`: a pytree of the structure that was saved, with arrays or ``jax.ShapeDtypeStruct`` of the same shapes and
      dtypes, such as a new state and a new pool of the same sizes. Its `Pages` may have another order. The arrays of
      the result lie where those of ``like`` do: where a sharding divides them, each device's part is read alone.
    - `tag`: what was given to `save`.

    **Returns:** a pytree like ``like``, with the arrays of the file. ``like`` itself is not changed.

    Raises ``FileNotFoundError`` for no file, and ``ValueError`` that names the file for one that is cut off or damaged,
    that `save` has not written, that has another tag, and for a structure, shape, dtype or layout that differs.

    >>> import tempfile
    >>> pool, _ = PagePool.init(4, num_slots=1, pages_per_seq=4, page_size=2).extend(jnp.array([3]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paged.runtime.save(folder + "/pool.safetensors", pool)
    ...     new = PagePool.init(4, num_slots=1, pages_per_seq=4, page_size=2)
    ...     print(paged.runtime.load(folder + "/pool.safetensors", new).lengths)
    ...     try:
    ...         paged.runtime.load(folder + "/pool.safetensors", PagePool.init(5, 1, 4, 2))
    ...     except ValueError as error:
    ...         print(str(error).rpartition(": ")[2])
    [3]
    tree.ref_counts must be int32[5], and is int32[4].
    """
    weights = open_safetensors(path)
    if weights.metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by paged.runtime.save, or by a version that this one cannot read.")
    if weights.metadata.get("tag") != tag:
        raise ValueError(
            f"{path} has the tag {weights.metadata.get('tag')!r}, and tag={tag!r} was asked for. Pages are of use only "
            "to the weights that computed them."
        )
    parts, kept = list(_parts(like)), _parsed(path, weights)
    if len(parts) != len(kept):
        raise ValueError(f"{path} holds {len(kept)} parts, and `like` has {len(parts)}: another structure.")
    found = set()
    for part, facts in zip(parts, kept, strict=True):
        _require_alike(path, part, facts)
        for name, shape, dtype in _stored(part, facts):
            found.add(name)
            own = weights.get(name)
            if own is None or (own.shape, own.dtype) != (tuple(shape), np.dtype(dtype)):
                got = "is missing" if own is None else f"is {own.dtype.name}{list(own.shape)}"
                raise ValueError(f"{path}: {name} must be {np.dtype(dtype).name}{list(shape)}, and {got}.")
    if left := sorted(weights.keys() - found):
        raise ValueError(f"{path}: {left[0]} is of no part of `like`.")
    leaves = [_read(part, facts, weights) for part, facts in zip(parts, kept, strict=True) if part.is_leaf]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=_is_pages), leaves)


class _Part(NamedTuple):
    """One array, one pool of pages, or one module with static fields.

    ``facts`` are what must be equal, in the form of JSON; ``arrays`` are by the names of the file.
    """

    facts: dict[str, Any]
    arrays: dict[str, Any]
    value: Any
    is_leaf: bool


def _parts(tree: Any) -> Iterator[_Part]:
    for name, value in _modules(tree, "tree"):
        static = [field.name for field in dataclasses.fields(value) if field.metadata.get("static")]
        facts = {field: _text(getattr(value, field)) for field in static}
        yield _Part({"name": name, "kind": type(value).__name__, **facts}, {}, value, is_leaf=False)
    for path, value in tree_flatten_with_path(tree, is_leaf=_is_pages)[0]:
        name = f"tree{keystr(path)}"
        if isinstance(value, Pages):
            arrays = {f"{name}.arrays[{i}]": x for i, x in enumerate(value.arrays)}
            scales = {"k_scale": value.k_scale, "v_scale": value.v_scale}
            arrays |= {f"{name}.{key}": x for key, x in scales.items() if x is not None}
            layout = {**dataclasses.asdict(value.layout), "dtype": value.layout.dtype.name}
            facts = {"name": name, "kind": "Pages", "layout": layout, "has_scales": value.k_scale is not None}
            yield _Part(facts, arrays, value, is_leaf=True)
        else:
            yield _Part({"name": name, "kind": "array"}, {name: value}, value, is_leaf=True)


def _modules(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The modules of this package in a tree, but for pages: their static fields say what the arrays mean."""
    is_module = lambda x: isinstance(x, eqx.Module) and x is not tree
    if type(tree).__module__.startswith(__package__ or "") and isinstance(tree, eqx.Module):
        yield name, tree
    for path, value in tree_flatten_with_path(tree, is_leaf=is_module)[0]:
        if isinstance(value, eqx.Module) and not isinstance(value, Pages):
            yield from _modules(value, name + keystr(path))


def _text(value: Any) -> Any:
    """A static field in the form of JSON: numbers as they are, masks as they are printed."""
    if isinstance(value, tuple | list):
        return [_text(x) for x in value]
    return value if value is None or isinstance(value, int | float) else str(value)


def _parsed(path: Any, weights: Weights) -> list[dict[str, Any]]:
    try:
        parts = json.loads(weights.metadata["parts"])
    except (KeyError, ValueError, RecursionError):
        parts = None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path}: what it says of its parts cannot be read. It is damaged.")
    return parts


def _require_alike(path: Any, part: _Part, facts: dict[str, Any]) -> None:
    """What the file says of a part must be what `like` has, but for the order of pages."""
    want = part.facts
    if facts.keys() == want.keys() and isinstance(facts.get("layout"), dict) and "layout" in want:
        facts = {**facts, "layout": {**facts["layout"], "order": want["layout"]["order"]}}
    for key in (*want, *facts):
        if want.get(key, ...) != facts.get(key, ...):
            raise ValueError(
                f"{path}: {want['name']} has {key} = {facts.get(key)!r} in the file, and {want.get(key)!r} in `like`."
            )


def _stored(part: _Part, facts: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The name, shape and dtype of each array of a part, as the file must have it."""
    if not isinstance(part.value, Pages):
        return [(name, x.shape, x.dtype) for name, x in part.arrays.items()]
    layout, name = _layout_of(part, facts), facts["name"]
    shapes = layout.array_shapes(part.value.num_pages)
    lead = part.value.arrays[0].shape[: -len(part.value.layout.array_axes[0])]
    pages = [(f"{name}.arrays[{i}]", (*lead, *shape), layout.dtype) for i, shape in enumerate(shapes)]
    return pages + [(key, x.shape, x.dtype) for key, x in part.arrays.items() if key.endswith("_scale")]


def _layout_of(part: _Part, facts: dict[str, Any]) -> PageLayout:
    order = facts["layout"]["order"]
    try:
        return part.value.layout.replace(order=order)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{facts['name']} is in the file in order {order!r}: {error}") from None


def _read(part: _Part, facts: dict[str, Any], weights: Weights) -> Any:
    """The part with the arrays of the file."""
    if not isinstance(part.value, Pages):
        ((name, like),) = part.arrays.items()
        return _placed(lambda index: weights[name].read(index), like)
    pages, stored = part.value, _layout_of(part, facts)
    names = [name for name, *_ in _stored(part, facts) if ".arrays[" in name]
    if stored.order == pages.layout.order:
        read = [lambda index, name=name: weights[name].read(index) for name in names]
    else:
        whole = in_order(pages.layout, stored, [weights[name].read() for name in names])
        read = [lambda index, array=array: array[index] for array in whole]
    arrays = tuple(_placed(one, like) for one, like in zip(read, pages.arrays, strict=True))
    scales = []
    for key in ("k_scale", "v_scale"):
        like, name = getattr(pages, key), f"{facts['name']}.{key}"
        scales.append(None if like is None else _placed(lambda index, name=name: weights[name].read(index), like))
    return Pages(arrays, *scales, layout=pages.layout)


def _placed(read: Any, like: Any) -> jax.Array:
    """An array in the place of ``like``: of each device's part only that part is read."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jax.numpy.asarray(np.array(read(())))  # a copy: the file may go away
    return jax.make_array_from_callback(like.shape, sharding, lambda index: np.array(read(tuple(index or ()))))


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages)
