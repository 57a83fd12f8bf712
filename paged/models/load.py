"""`load` and `save`: from a checkpoint to a `Decoder` with its pages, and back."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from paged.lower import Axes
from paged.runtime import StackedState
from paged.spec import PageLayout, PageOrder, Pages

from .config import Config
from .decoder import Decoder
from .files import Tokenizer, open_checkpoint, open_tokenizer, write_safetensors
from .filling import Place, computed_dtype, filled, places_of, require_weights
from .names import Leaf, Piece, leaves_of_layer, leaves_of_model
from .placing import automatic, require_shares
from .unpacking import unpacked


def load(
    path: str | os.PathLike,
    *,
    num_pages: int,
    page_size: int = 16,
    num_slots: int | None = None,
    chunk_size: int = 64,
    dtype: Any = None,
    target: str = "auto",
    mesh: Mesh | None = None,
    axis: str | None = "model",
    sequences: str | None = None,
    layout: PageLayout | None = None,
    max_length: int | None = None,
    experts: str | None = None,
    check: bool = True,
) -> tuple[Decoder, eqx.nn.State, Tokenizer | None]:
    """A model of a checkpoint, ready to serve.

    **Arguments:**

    - `path`: a folder in Hugging Face's form: config.json, and one or many safetensors files. Or a GGUF file.
    - `num_pages`: how many pages each layer has.
    - `page_size`: tokens per page.
    - `num_slots`, `chunk_size`: what `generate` will be called with, see `Decoder`. Layers with a window then have only
      the pages that so many sequences need.
    - `dtype`: of the parameters, of what is computed, and of the pages: float32, bfloat16 or float16. None: parameters
      are as they are stored, and the rest follows the embedding.
    - `target`, `check`: see `paged.runtime.PagedCache`.
    - `mesh`: devices that share the KV heads, and the inner features of perceptrons or the experts. Each device's part
      is read from the files by itself, so that no process holds an array twice.
    - `axis`: the axis of the mesh that shares them; None for none. Arrays are whole along other axes.
    - `sequences`: the axis of the mesh whose devices serve sequences of their own, with pages of their own, see
      `Axes`; None for none. ``num_pages`` and ``num_slots`` are those of all of them together.
    - `layout`: how pages lie in memory, where the default does not do; its page size counts. By default they have the
      dtype of what is computed, and an order that the target reads without a copy, see `PageLayout`.
    - `max_length`: the most tokens of a sequence. Only the rotary scalings ``longrope`` and ``dynamic`` need it, and
      only where the pages hold sequences longer than those of training.
    - `experts`: ``"ragged"`` or ``"dense"``: how experts are computed, see `Experts`. None: dense on a mesh, which can
      do no other, and ragged without one.

    **Returns:** the `Decoder`, its state with pages of zeros, and the `Tokenizer`: None if the checkpoint has none.

    Raises ``FileNotFoundError`` for what is not there, ``ModuleNotFoundError`` where the extra ``models`` is needed and
    missing, and ``ValueError`` for a file that cannot be read, see `open_checkpoint`, for a key of config.json that is
    not known, see `Config.from_keys`, and for weights that are missing, left over, or of another shape: the error names
    them.

    >>> import tempfile
    >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    >>> counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    >>> config = Config.from_keys({"model_type": "llama", **sizes, **counts})
    >>> made, _ = eqx.nn.make_with_state(Decoder)(config, config.layout(4, "float32"), 8, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(made, folder)
    ...     model, state, tokenizer = load(folder, num_pages=8, page_size=4)
    >>> bool((model.dense(jnp.arange(5)) == made.dense(jnp.arange(5))).all())
    True
    """
    checkpoint = open_checkpoint(path)
    keys = checkpoint.config
    if max_length is None:
        size = page_size if layout is None else layout.page_size
        max_length = _within_training(keys, num_pages * size)
    config = Config.from_keys(keys, max_length)
    config = _with_experts(config, experts, mesh)
    weights = unpacked(config, checkpoint.weights)
    require_weights(config, weights)
    computed = computed_dtype(dtype, weights)
    if layout is None:
        layout = config.layout(page_size, computed, order=_order(config, target))
    axes = None
    if mesh is not None:
        mesh, axes = automatic(mesh), Axes(kv_heads=axis, sequences=sequences)
        require_shares(config, mesh, axis, sequences, num_pages)
    how = {"target": target, "check": check, "mesh": mesh, "axes": axes, "dtype": computed}
    how |= {"num_slots": num_slots, "chunk_size": chunk_size}
    make = eqx.nn.make_with_state(lambda key: Decoder(config, layout, num_pages, **how, key=key))
    shapes, _ = eqx.filter_eval_shape(make, jax.random.key(0))
    model = filled(shapes, config, weights, dtype, mesh, axis)
    return model, _state(make, mesh, shapes), open_tokenizer(checkpoint)


def _order(config: Config, target: str) -> PageOrder:
    """The order of pages that no target copies: on TPUs only one has other head dimensions than multiples of 128."""
    is_tpu = target == "tpu" or (target == "auto" and jax.default_backend() == "tpu")
    return "joined" if is_tpu and config.head_dim % 128 else "packed"


def _with_experts(config: Config, how: str | None, mesh: Mesh | None) -> Config:
    """The config with the way in which experts are computed."""
    allowed = ("ragged", "dense") if mesh is None else ("dense",)
    if how is not None and how not in allowed:
        where = "" if mesh is None else " on a mesh"
        raise ValueError(f"experts must be one of {', '.join(map(repr, allowed))}{where}, or None; got {how!r}.")
    if config.experts is None:
        return config
    facts = dataclasses.replace(config.experts, how=allowed[0] if how is None else how)
    return dataclasses.replace(config, experts=facts)


def _within_training(keys: Mapping[str, Any], most: int) -> int | None:
    """``most``, if no sequence can become longer than those of training. None otherwise: only the caller knows."""
    inner = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    named = [of.get("original_max_position_embeddings") for of in (keys, inner) if isinstance(of, Mapping)]
    named.append(keys.get("max_position_embeddings"))
    trained = next((length for length in named if isinstance(length, int)), None)
    return most if trained is not None and most <= trained else None


def _state(make: Any, mesh: Mesh | None, shapes: Decoder) -> eqx.nn.State:
    """The state of the model that ``make`` makes, with its pages where they stay. Its parameters are never drawn."""
    if mesh is None:
        return eqx.filter_jit(lambda key: make(key)[1])(jax.random.key(0))
    arrays = eqx.filter_eval_shape(lambda key: make(key)[1], jax.random.key(0))
    whole = NamedSharding(mesh, P())
    caches = [run.self_attn.cache.attend for run in shapes.layers.runs]
    of_pages = caches[0].shardings.pages

    def placed(x: Any) -> Any:
        if isinstance(x, Pages):
            return dataclasses.replace(of_pages, layout=x.layout)
        if isinstance(x, StackedState):
            return StackedState(jax.tree.map(placed, x.value, is_leaf=_is_pages), x.num_layers, x.parts)
        return whole

    placements = jax.tree.map(placed, arrays, is_leaf=lambda x: _is_pages(x) or isinstance(x, StackedState))
    return jax.jit(lambda key: make(key)[1], out_shardings=placements)(jax.random.key(0))


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages)


@dataclasses.dataclass(frozen=True)
class _Later:
    """A tensor to be written, which is put together when it is: memory holds one at a time."""

    parts: tuple[tuple[Piece, Leaf, slice, Any, int | None], ...]  # each with its array, and its place in a stack

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][0].stored

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.parts[0][3].dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        for piece, leaf, place, array, i in self.parts:
            own = np.asarray(array if i is None else array[i])
            own = own[(slice(None),) * leaf.axis + (place,)] if len(leaf.pieces) > 1 else own
            out[piece.first : piece.first + piece.rows] = own.reshape(piece.rows, *self.shape[1:])
        return out


def save(model: Decoder, path: str | os.PathLike) -> None:
    """Write a model as a folder that `load` and ``transformers`` read: config.json and model.safetensors.

    **Arguments:**

    - `model`: a `Decoder` whose config was read by `Config.from_keys`, trained further or not. Arrays on a mesh are
      gathered, one tensor at a time. Weights that were unpacked from MXFP4 are written in the dtype that they have.
    - `path`: the folder. It is made if it is not there; its config.json and model.safetensors are replaced.

    Tokenizer files are not written: copy them from the folder that the model was loaded from.

    >>> import tempfile
    >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    >>> config = Config.from_keys({"model_type": "llama", **sizes, "num_hidden_layers": 2, "num_attention_heads": 4})
    >>> model, _ = eqx.nn.make_with_state(Decoder)(config, config.layout(4, "float32"), 8, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder)
    ...     sorted(name.name for name in pathlib.Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    model = model.together()
    folder, config = pathlib.Path(path), model.config
    folder.mkdir(parents=True, exist_ok=True)
    in_layers, in_model = leaves_of_layer(config), leaves_of_model(config)
    places, arrays = places_of(model), eqx.filter(model, eqx.is_array)
    is_place = lambda x: isinstance(x, Place)
    parts: dict[str, list[Any]] = {}
    for place, array in zip(jax.tree.leaves(places, is_leaf=is_place), jax.tree.leaves(arrays), strict=True):
        leaf = (in_model if place.layers is None else in_layers)[place.attribute]
        for i, layer in enumerate(place.layers or (None,)):
            for piece, own in leaf.parts():
                name = piece.name if layer is None else piece.name.format(layer)
                parts.setdefault(name, []).append((piece, leaf, own, array, None if layer is None else i))
    keys = {**json.loads(config.source), "dtype": str(model.embed_tokens.weight.dtype)}
    keys = {key: value for key, value in keys.items() if key not in ("torch_dtype", "quantization_config")}
    write_safetensors(folder / "model.safetensors", {name: _Later(tuple(own)) for name, own in parts.items()})
    (folder / "config.json").write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")
