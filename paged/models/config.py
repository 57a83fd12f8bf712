"""`Config`: a config.json of Hugging Face's form, read strictly into what a `Decoder` is."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from paged.runtime import Rotary
from paged.spec import AttentionSpec, PageLayout

from .architectures import ARCHITECTURES, COMMON, FIXED, FULL, INERT, SIZES, SLIDING, Architecture, Keys
from .rope import rotaries_of

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
_SAME_ACTIVATION = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What differs among the layers of a model: how far a row looks back, and how it is turned.

    **Arguments:**

    - `window`: how many tokens of the past a query sees, its own included. None for all.
    - `rotary`: the rotary embedding, or None.
    """

    window: int | None
    rotary: Rotary | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A perceptron of experts, of which each token uses a few.

    **Arguments:**

    - `num_experts`, `per_token`: how many there are, and how many a token uses.
    - `alpha`, `limit`: the gain of the sigmoid, and the bound of what enters the gate.
    - `how`: ``"ragged"`` or ``"dense"``, see `Experts`.
    """

    num_experts: int
    per_token: int
    alpha: float
    limit: float
    how: str = "ragged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a decoder is: its sizes, and what its layers have. Frozen and hashable.

    `from_keys` makes one from a config.json. All fields are resolved: nothing in them depends on an architecture's
    defaults any more.

    - ``architecture``: the ``model_type`` of config.json.
    - ``vocab_size``, ``hidden_size``, ``intermediate_size``, ``num_q_heads``, ``num_kv_heads``, ``head_dim``: sizes.
    - ``layers``: one `LayerConfig` for each layer.
    - ``scale``, ``soft_cap``: as in `AttentionSpec`. ``logit_cap``: a bound of the logits, or None.
    - ``norm_eps``, ``norm_offset``: of every norm: what is added to the mean square, and to the stored weights.
    - ``activation``: of the perceptron. ``embedding_scale``: the factor of embeddings.
    - ``has_qkv_bias``, ``has_output_bias``, ``has_mlp_bias``, ``has_qk_norm``, ``has_four_norms``, ``has_sinks``.
    - ``experts``: an `ExpertsConfig`, or None for a perceptron that all tokens use.
    - ``is_tied``: whether the head is the embedding. ``is_fused``: whether checkpoints hold fused projections.
    - ``max_length``: the longest sequence of training, or None.
    - ``source``: the config.json that it was read from, as text.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    scale: float | None = None
    soft_cap: float | None = None
    logit_cap: float | None = None
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: str = "silu"
    embedding_scale: float = 1.0
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_four_norms: bool = False
    has_sinks: bool = False
    experts: ExpertsConfig | None = None
    is_tied: bool = False
    is_fused: bool = False
    max_length: int | None = None
    source: str = dataclasses.field(default="{}", repr=False)

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any], max_length: int | None = None) -> "Config":
        """Read the keys of a config.json.

        **Arguments:**

        - `keys`: of config.json. The rotary keys may have the older form (``rope_theta`` and ``rope_scaling``) or the
          newer one (``rope_parameters``).
        - `max_length`: the longest sequence that will be served. Only the rotary scalings ``longrope`` and ``dynamic``
          depend on it.

        **Returns:** the config.

        Raises ``ValueError``, which names the key, for a key that is not known and not null, for a value that stands
        for something that is not computed here, and for a key that is missing.

        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
        >>> counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> config = Config.from_keys({"model_type": "mistral", **sizes, **counts, "sliding_window": 8})
        >>> config.head_dim, [layer.window for layer in config.layers]
        (8, [8, 8])
        >>> Config.from_keys({"model_type": "mistral", **sizes, **counts, "sparsity": 0.5})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: config.json has sparsity = 0.5, which is not known of a 'mistral' model: ...
        """
        name = keys.get("model_type")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise ValueError(f"config.json has model_type = {name!r}; known are {', '.join(map(repr, ARCHITECTURES))}.")
        row = ARCHITECTURES[name]
        full = _filled(name, row, keys)
        heads = full["num_attention_heads"]
        head_dim = full["head_dim"] or full["hidden_size"] // heads
        return cls(
            architecture=name,
            vocab_size=full["vocab_size"],
            hidden_size=full["hidden_size"],
            intermediate_size=full["intermediate_size"],
            num_q_heads=heads,
            num_kv_heads=full["num_key_value_heads"] or heads,
            head_dim=head_dim,
            layers=_layers(row, full, head_dim, max_length),
            scale=_scale(full),
            soft_cap=full.get("attn_logit_softcapping"),
            logit_cap=full.get("final_logit_softcapping"),
            norm_eps=float(full["rms_norm_eps"]),
            norm_offset=row.norm_offset,
            activation="silu" if row.has_experts else _activation(row.activation, full[row.activation]),
            embedding_scale=full["hidden_size"] ** 0.5 if row.is_embedding_scaled else 1.0,
            has_qkv_bias=_flag(row.qkv_bias, full),
            has_output_bias=_flag(row.output_bias, full),
            has_mlp_bias=_flag("mlp_bias", full) if "mlp_bias" in full else False,
            has_qk_norm=row.has_qk_norm,
            has_four_norms=row.has_four_norms,
            has_sinks=row.has_sinks,
            experts=_experts(full) if row.has_experts else None,
            is_tied=_flag("tie_word_embeddings", full),
            is_fused=row.is_fused,
            max_length=full["max_position_embeddings"],
            source=json.dumps(dict(keys), sort_keys=True),
        )

    def spec(self, layer: LayerConfig) -> AttentionSpec:
        """What the attention of a layer means."""
        return AttentionSpec(
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=layer.window,
            soft_cap=self.soft_cap,
            sinks=self.has_sinks,
            scale=self.scale,
        )

    def layout(self, page_size: int, dtype: Any, **options: Any) -> PageLayout:
        """A `PageLayout` for this model's heads. ``options`` are those of `PageLayout`."""
        sizes = {"num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        return PageLayout(page_size=page_size, **sizes, dtype=dtype, **options)


def _filled(name: str, row: Architecture, keys: Keys) -> dict[str, Any]:
    """The keys that are read, with defaults. Every other key has been looked at when this returns."""
    read, fixed = {**COMMON, **row.keys}, {**FIXED, **row.fixed}
    for key, value in keys.items():
        if key in read or key in INERT or value is None:
            continue
        if key not in fixed:
            raise ValueError(
                f"config.json has {key} = {value!r}, which is not known of a {name!r} model: it would be left out of "
                "what the model computes. Remove the key if it means nothing."
            )
        if value != fixed[key]:
            raise ValueError(
                f"config.json has {key} = {value!r}; of a {name!r} model only {key} = {fixed[key]!r} can be served."
            )
    full = {key: keys[key] if keys.get(key) is not None or key in _MAY_BE_NULL & keys.keys() else default
            for key, default in read.items()}  # fmt: skip
    for key in SIZES:
        _require_count(key, full[key])
    for key in _COUNTS:
        if full.get(key) is not None:
            _require_count(key, full[key])
    for key in _NUMBERS:
        if full.get(key) is not None and (isinstance(full[key], bool) or not isinstance(full[key], int | float)):
            raise ValueError(f"{key} of config.json must be a number; got {full[key]!r}.")
    for key in ("layer_types", "no_rope_layers"):
        if full.get(key) is not None and not isinstance(full[key], list):
            raise ValueError(f"{key} of config.json must be a list, one entry for each layer; got {full[key]!r}.")
    for key in ("rope_scaling", "rope_parameters"):
        if full[key] is not None and not isinstance(full[key], Mapping):
            raise ValueError(f"{key} of config.json must be an object, {{...}}; got {full[key]!r}.")
    for key, other in _SAME.items():
        if full.get(key) is not None and full[key] != full[other]:
            raise ValueError(f"config.json has {key} = {full[key]!r} and {other} = {full[other]!r}, which must agree.")
    _require_readable_weights(name, full["quantization_config"])
    return full


# Keys whose null says something: there is none.
_MAY_BE_NULL = frozenset({"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"})
# Keys that count something, and keys that are numbers, where they are there.
_COUNTS = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "no_rope_layer_interval",
    "num_local_experts",
    "num_experts_per_tok",
)
_NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "max_window_layers",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "swiglu_alpha",
    "swiglu_limit",
)
# Keys that repeat another one.
_SAME = {"experts_per_token": "num_experts_per_tok", "sliding_window_size": "sliding_window"}


def _require_count(key: str, value: Any) -> None:
    if value is None:
        raise ValueError(f"config.json has no {key}, which every model needs.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} of config.json must be a whole number of at least 1; got {value!r}.")


def _require_readable_weights(name: str, quantization: Any) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if name != "gpt_oss" or method != "mxfp4":
        raise ValueError(
            f"config.json has quantization_config with quant_method = {method!r}, whose weights cannot be read: use a "
            "checkpoint of float weights, or a GGUF file."
        )


def _layers(row: Architecture, full: Keys, head_dim: int, max_length: int | None) -> tuple[LayerConfig, ...]:
    count, kinds, turns = full["num_hidden_layers"], row.layer_types(full), row.has_rope(full)
    for key, found in (("layer_types", kinds), ("no_rope_layers", turns)):
        if len(found) != count:
            raise ValueError(f"{key} of config.json must have num_hidden_layers = {count} entries; got {len(found)}.")
    unknown = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if unknown:
        raise ValueError(f"layer_types of config.json has {unknown[0]!r}; known are {FULL!r} and {SLIDING!r}.")
    has_windows = full.get("use_sliding_window", True)
    windows = {FULL: None, SLIDING: full.get("sliding_window") if has_windows else None}
    rotaries = rotaries_of(full, row, head_dim, max_length)
    return tuple(
        LayerConfig(windows[kind], rotaries[kind] if turn else None) for kind, turn in zip(kinds, turns, strict=True)
    )


def _scale(full: Keys) -> float | None:
    scalar = full.get("query_pre_attn_scalar")
    return None if scalar is None else float(scalar) ** -0.5


def _activation(key: str, value: Any) -> str:
    value = _SAME_ACTIVATION.get(value, value)
    if value not in ACTIVATIONS:
        raise ValueError(f"{key} of config.json must be one of {', '.join(ACTIVATIONS)}; got {value!r}.")
    return value


def _flag(said: bool | str, full: Keys) -> bool:
    if isinstance(said, bool):
        return said
    if not isinstance(full[said], bool):
        raise ValueError(f"{said} of config.json must be true or false; got {full[said]!r}.")
    return full[said]


def _experts(full: Keys) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=full["num_local_experts"],
        per_token=full["num_experts_per_tok"],
        alpha=float(full["swiglu_alpha"]),
        limit=float(full["swiglu_limit"]),
    )
