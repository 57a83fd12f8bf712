"""Which tensors of a checkpoint make each array of a `Decoder`: one list for all architectures."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

from .config import Config

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of one tensor of a checkpoint, as a part of an array of a layer or of the model.

    - `name`: of the tensor. ``{}`` in it stands for the number of the layer.
    - `stored`: the shape of the tensor.
    - `first`: the first of the rows.
    - `leading`: into which axes the rows are folded.
    """

    name: str
    stored: Shape
    first: int
    leading: Shape

    @property
    def rows(self) -> int:
        return math.prod(self.leading)

    @property
    def shape(self) -> Shape:
        return (*self.leading, *self.stored[1:])

    def rows_of(self, index: tuple[slice, ...]) -> slice:
        """The rows of the tensor that hold a part of `shape`, of which one leading axis at most is not the whole."""
        axis = next((i for i, size in enumerate(self.leading) if size > 1), 0)
        inner = math.prod(self.leading[axis + 1 :])
        return slice(self.first + index[axis].start * inner, self.first + index[axis].stop * inner)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a layer or of the model, made of pieces that are joined along an axis."""

    pieces: tuple[Piece, ...]
    axis: int = 0

    @property
    def shape(self) -> Shape:
        first = self.pieces[0].shape
        joined = sum(piece.shape[self.axis] for piece in self.pieces)
        return (*first[: self.axis], joined, *first[self.axis + 1 :])

    def parts(self) -> Iterator[tuple[Piece, slice]]:
        """Each piece, and its part of the joined axis."""
        start = 0
        for piece in self.pieces:
            size = piece.shape[self.axis]
            yield piece, slice(start, start + size)
            start += size


def leaves_of_model(config: Config) -> Mapping[str, Leaf]:
    """The arrays outside of layers, by attribute."""
    size = config.hidden_size
    leaves = {
        "embed_tokens.weight": _whole("model.embed_tokens.weight", (config.vocab_size, size)),
        "norm.weight": _whole("model.norm.weight", (size,)),
    }
    if not config.is_tied:
        leaves["lm_head.weight"] = _whole("lm_head.weight", (config.vocab_size, size))
    return leaves


def leaves_of_layer(config: Config) -> Mapping[str, Leaf]:
    """The arrays of one layer, by attribute."""
    size = config.hidden_size
    leaves: dict[str, Leaf] = {}
    for name in ("input_layernorm", "post_attention_layernorm", *(_AFTER if config.has_four_norms else ())):
        leaves[f"{name}.weight"] = _whole(f"{_LAYER}{name}.weight", (size,))
    leaves |= _attention(config)
    leaves |= _perceptron(config) if config.experts is None else _experts(config, config.experts.num_experts)
    return leaves


_LAYER = "model.layers.{}."
_AFTER = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _attention(config: Config) -> dict[str, Leaf]:
    prefix, size = f"{_LAYER}self_attn.", config.hidden_size
    kv, dim, q_heads = config.num_kv_heads, config.head_dim, config.num_q_heads
    group = q_heads // kv
    parts = [("q_proj", (kv, group, dim)), ("k_proj", (kv, 1, dim)), ("v_proj", (kv, 1, dim))]
    leaves = {"qkv_proj.weight": _fused(prefix, "qkv_proj.weight", parts, (size,), 1, config.is_fused)}
    if config.has_qkv_bias:
        leaves["qkv_proj.bias"] = _fused(prefix, "qkv_proj.bias", parts, (), 1, config.is_fused)
    leaves["o_proj.weight"] = _whole(f"{prefix}o_proj.weight", (size, q_heads * dim))
    if config.has_output_bias:
        leaves["o_proj.bias"] = _whole(f"{prefix}o_proj.bias", (size,))
    if config.has_qk_norm:
        leaves |= {f"{name}.weight": _whole(f"{prefix}{name}.weight", (dim,)) for name in ("q_norm", "k_norm")}
    if config.has_sinks:
        leaves["sinks"] = _whole(f"{prefix}sinks", (q_heads,))
    return {f"self_attn.{name}": leaf for name, leaf in leaves.items()}


def _perceptron(config: Config) -> dict[str, Leaf]:
    prefix, size, inner = f"{_LAYER}mlp.", config.hidden_size, config.intermediate_size
    parts = [("gate_proj", (1, inner)), ("up_proj", (1, inner))]
    leaves = {
        "gate_up_proj.weight": _fused(prefix, "gate_up_proj.weight", parts, (size,), 0, config.is_fused),
        "down_proj.weight": _whole(f"{prefix}down_proj.weight", (size, inner)),
    }
    if config.has_mlp_bias:
        leaves["gate_up_proj.bias"] = _fused(prefix, "gate_up_proj.bias", parts, (), 0, config.is_fused)
        leaves["down_proj.bias"] = _whole(f"{prefix}down_proj.bias", (size,))
    return {f"mlp.{name}": leaf for name, leaf in leaves.items()}


def _experts(config: Config, count: int) -> dict[str, Leaf]:
    size, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "router.weight": (count, size),
        "router.bias": (count,),
        "experts.gate_up_proj": (count, size, 2 * inner),
        "experts.gate_up_proj_bias": (count, 2 * inner),
        "experts.down_proj": (count, inner, size),
        "experts.down_proj_bias": (count, size),
    }
    attribute = lambda name: f"mlp.{name.removeprefix('experts.')}"
    return {attribute(name): _whole(f"{_LAYER}mlp.{name}", shape) for name, shape in shapes.items()}


def _whole(name: str, shape: Shape) -> Leaf:
    return Leaf((Piece(name, shape, 0, shape[:1]),))


def _fused(
    prefix: str, attribute: str, parts: list[tuple[str, Shape]], tail: Shape, axis: int, is_stored_so: bool
) -> Leaf:
    """One array of several projections, which a checkpoint holds apart, or as one tensor under the array's own name."""
    kind = attribute.partition(".")[2]
    total, first, pieces = sum(math.prod(leading) for _, leading in parts), 0, []
    for name, leading in parts:
        rows = math.prod(leading)
        if is_stored_so:
            pieces.append(Piece(f"{prefix}{attribute}", (total, *tail), first, leading))
        else:
            pieces.append(Piece(f"{prefix}{name}.{kind}", (rows, *tail), 0, leading))
        first += rows
    return Leaf(tuple(pieces), axis)
