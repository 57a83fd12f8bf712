"""The arrays of a `Decoder` from the tensors of a checkpoint: each part is read once, into the place where it stays."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from paged.runtime import LayerStack

from .config import Config
from .decoder import Decoder
from .files import Tensor, Weights
from .names import Leaf, leaves_of_layer, leaves_of_model
from .placing import sharding_of

_FLOATS = tuple(jnp.dtype(name) for name in ("float32", "bfloat16", "float16"))
_TIED_HEAD = "lm_head.weight"


class Place(NamedTuple):
    """An array of a model: its attribute in a layer or in the model, and the layers that are stacked in it, if any."""

    attribute: str
    layers: tuple[int, ...] | None


def places_of(model: Decoder) -> Any:
    """The model with a `Place` for each of its arrays."""
    numbers: dict[int, list[int]] = {}
    for layer, run in enumerate(_runs_of(model.layers)):
        numbers.setdefault(run, []).append(layer)

    def place_of(path: Any, leaf: Any) -> Place:
        names = [str(getattr(part, "name", getattr(part, "idx", ""))) for part in path]
        if names[0] != "layers":
            return Place(".".join(names), None)
        return Place(".".join(names[3:]), tuple(numbers[int(names[2])]))

    return jax.tree_util.tree_map_with_path(place_of, eqx.filter(model, _is_array))


def _runs_of(stack: LayerStack) -> Iterator[int]:
    """The run of each layer, in order."""
    for segment in stack.segments:
        for _ in range(segment.repeats):
            for run, length in segment.runs:
                yield from [run] * length


def _is_array(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def filled(
    shapes: Decoder, config: Config, weights: Weights, dtype: Any, mesh: Mesh | None, axis: str | None
) -> Decoder:
    """A model of shapes with the arrays of a checkpoint.

    **Arguments:**

    - `shapes`: a `Decoder` with ``jax.ShapeDtypeStruct`` in place of arrays.
    - `config`, `weights`: of the checkpoint. The names in ``weights`` have been checked.
    - `dtype`: of the arrays. None: as they are stored.
    - `mesh`, `axis`: where arrays lie. Without a mesh they are on the default device.
    """
    in_layers, in_model = leaves_of_layer(config), leaves_of_model(config)

    def array_of(place: Place, shape: Any) -> jax.Array:
        leaf = (in_model if place.layers is None else in_layers)[place.attribute]
        stored = _widest([weights[name].dtype for name in _names(leaf, place.layers)])
        own = stored if dtype is None else jnp.dtype(dtype)

        def read(index: Any) -> np.ndarray:
            return _read(leaf, weights, place.layers, index, shape.shape, own)

        if mesh is None:
            return jax.device_put(read((slice(None),) * len(shape.shape)))
        sharding = sharding_of(place.attribute, len(shape.shape), place.layers is not None, mesh, axis)
        return jax.make_array_from_callback(shape.shape, sharding, read)

    places, arrays = places_of(shapes), eqx.filter(shapes, _is_array)
    read = jax.tree.map(array_of, places, arrays, is_leaf=lambda x: isinstance(x, Place))
    return eqx.combine(read, eqx.filter(shapes, _is_array, inverse=True))


def _names(leaf: Leaf, layers: tuple[int, ...] | None) -> list[str]:
    return [piece.name.format(layer) for layer in layers or (0,) for piece in leaf.pieces]


def _widest(dtypes: list[np.dtype]) -> np.dtype:
    """The dtype of an array whose parts may be stored in several."""
    return dtypes[0] if len(set(dtypes)) == 1 else jnp.dtype(jnp.float32)


def _read(
    leaf: Leaf,
    weights: Mapping[str, Tensor],
    layers: tuple[int, ...] | None,
    index: tuple[slice, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """A part of an array: of some layers that are stacked, or of one that is not in a layer."""
    parts = [slice(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    out = np.empty([part.stop - part.start for part in parts], dtype)
    if layers is None:
        _read_one(leaf, weights, 0, parts, out)
    else:
        for i, layer in enumerate(layers[parts[0]]):
            _read_one(leaf, weights, layer, parts[1:], out[i])
    return out


def _read_one(leaf: Leaf, weights: Mapping[str, Tensor], layer: int, parts: list[slice], out: np.ndarray) -> None:
    """The part of one layer's array, whose joined axis is never cut."""
    for piece, place in leaf.parts():
        wanted = list(parts)
        if len(leaf.pieces) > 1:
            wanted[leaf.axis] = slice(0, place.stop - place.start)
        rows = piece.rows_of(tuple(wanted))
        tensor, rest = weights[piece.name.format(layer)], tuple(wanted[len(piece.leading) :])
        read = tensor.read((rows, *rest))
        target = out[(slice(None),) * leaf.axis + (place,)] if len(leaf.pieces) > 1 else out
        target[...] = read.reshape(target.shape)


def require_weights(config: Config, weights: Weights) -> None:
    """Raise ``ValueError``, which names the tensors, unless a checkpoint has exactly those of a model."""
    wanted = dict(_wanted(config))
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ValueError(f"The checkpoint lacks {_listed(missing)}, which a {config.architecture!r} model needs.")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{weights[name].file}: tensor {name!r} has shape {weights[name].shape}; config.json says {shape}."
            )
    left = [name for name in weights if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if config.is_tied and _TIED_HEAD in left:
        _require_same(weights[_TIED_HEAD], weights["model.embed_tokens.weight"])
        left.remove(_TIED_HEAD)
    if left:
        raise ValueError(
            f"The checkpoint has {_listed(left)}, which no part of a {config.architecture!r} model of its config.json "
            "uses: it is another model."
        )


def _wanted(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    for leaf in leaves_of_model(config).values():
        yield from ((piece.name, piece.stored) for piece in leaf.pieces)
    for layer in range(len(config.layers)):
        for leaf in leaves_of_layer(config).values():
            yield from ((piece.name.format(layer), piece.stored) for piece in leaf.pieces)


def _require_same(head: Tensor, embedding: Tensor) -> None:
    if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
        raise ValueError(
            f"{head.file}: tensor {head.name!r} differs from {embedding.name!r}, and config.json says that they are "
            "one: tie_word_embeddings."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return f"{len(names)} tensors, such as {shown}" if len(names) > 4 else f"the tensors {shown}"


def computed_dtype(dtype: Any, weights: Weights) -> np.dtype:
    """The dtype of what is computed: the one that was asked for, or that of the embedding."""
    if dtype is not None and jnp.dtype(dtype) not in _FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _FLOATS))}, or None; got {dtype!r}.")
    found = weights["model.embed_tokens.weight"].dtype if dtype is None else jnp.dtype(dtype)
    if found not in _FLOATS:
        raise ValueError(f"Its embedding is stored in {found}, in which nothing is computed: pass dtype=jnp.bfloat16.")
    return found
