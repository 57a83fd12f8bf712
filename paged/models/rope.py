"""From the rotary keys of a config.json, in their older form and their newer one, to `Rotary`."""

import math
from collections.abc import Mapping
from typing import Any

from paged.runtime import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    Rotary,
    RotaryScaling,
    YarnScaling,
)

from .architectures import FULL, SLIDING, Architecture

Parameters = dict[str, Any]

# For each rule, the keys that it reads besides `_OF_ALL`.
_RULES: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"factor", "attention_factor", "short_factor", "long_factor"}),
}
_OF_ALL = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})


def rotaries_of(
    keys: Mapping[str, Any], row: Architecture, head_dim: int, max_length: int | None
) -> Mapping[str, Rotary]:
    """The rotary embedding of each kind of layer.

    **Arguments:**

    - `keys`: of config.json, with defaults filled in.
    - `row`: the architecture.
    - `head_dim`: features of a head.
    - `max_length`: the longest sequence that will be served, for rules that depend on it. None: not known.
    """
    parameters = _by_layer_type(keys, row)
    return {kind: _rotary(own, keys, head_dim, max_length) for kind, own in parameters.items()}


def _by_layer_type(keys: Mapping[str, Any], row: Architecture) -> dict[str, Parameters]:
    """For each kind of layer its parameters, in the newer form."""
    older, newer = _older(keys, row), keys["rope_parameters"]
    if not newer:
        return older
    if keys["rope_scaling"]:
        raise ValueError("config.json has rope_parameters and rope_scaling, which say the same: keep rope_parameters.")
    is_nested = any(isinstance(newer.get(kind), Mapping) for kind in (FULL, SLIDING))
    unknown = sorted(set(newer) - {FULL, SLIDING}) if is_nested else []
    if unknown:
        raise ValueError(
            f"rope_parameters of config.json has {unknown[0]!r} beside {FULL!r} and {SLIDING!r}, which is not known."
        )
    found = {}
    for kind in (FULL, SLIDING):
        own = dict(newer.get(kind) or {}) if is_nested else dict(newer)
        for name in ("rope_theta", "partial_rotary_factor"):
            outer, inner = keys.get(name), own.get(name)
            if None not in (outer, inner) and outer != inner:
                raise ValueError(f"config.json has {name} = {outer!r}, and {inner!r} in rope_parameters: keep one.")
            own[name] = inner if inner is not None else older[kind].get(name)
        found[kind] = own
    return found


def _older(keys: Mapping[str, Any], row: Architecture) -> dict[str, Parameters]:
    """The older form: ``rope_theta`` and ``rope_scaling``, and ``rope_local_base_freq`` of sliding layers."""
    theta = row.theta if keys["rope_theta"] is None else keys["rope_theta"]
    own = {"partial_rotary_factor": keys.get("partial_rotary_factor"), "rope_theta": theta}
    full = {**(row.rope if keys["rope_scaling"] is None else keys["rope_scaling"]), **own}
    if row.local_theta is None:
        return {FULL: full, SLIDING: full}
    local = keys["rope_local_base_freq"]
    return {FULL: full, SLIDING: {**own, "rope_theta": row.local_theta if local is None else local}}


def _rotary(own: Parameters, keys: Mapping[str, Any], head_dim: int, max_length: int | None) -> Rotary:
    rule = own.get("rope_type") or own.get("type") or "default"
    rule = "longrope" if rule == "su" else rule  # its older name
    if not isinstance(rule, str) or rule not in _RULES:
        raise ValueError(f"config.json has the rotary scaling {rule!r}; known are {', '.join(_RULES)}.")
    _require_known(rule, own)
    part = own.get("partial_rotary_factor")
    rotary_dim = head_dim if part is None else int(head_dim * _number(rule, "partial_rotary_factor", own))
    scaling = None if rule == "default" else _scaling(rule, own, keys, max_length)
    return Rotary(head_dim, _number(rule, "rope_theta", own), rotary_dim=rotary_dim, scaling=scaling)


def _require_known(rule: str, own: Parameters) -> None:
    for name, value in own.items():
        if name not in _RULES[rule] | _OF_ALL and value is not None:
            raise ValueError(
                f"The rotary scaling {rule!r} of config.json has the key {name} = {value!r}, which is not known: it "
                f"would be left out of the model. Known are {', '.join(sorted(_RULES[rule]))}."
            )


def _scaling(rule: str, own: Parameters, keys: Mapping[str, Any], max_length: int | None) -> RotaryScaling:
    longest = keys[_LONGEST]
    original = keys.get(_ORIGINAL) or own.get(_ORIGINAL) or longest
    if rule == "linear":
        return LinearScaling(_number(rule, "factor", own))
    if rule == "dynamic":
        factor, most = _number(rule, "factor", own), _given_length(rule, max_length)
        return NtkScaling.at_length(factor, most, _count(rule, _LONGEST, longest))
    original = _count(rule, _ORIGINAL, original)
    if rule == "llama3":
        named = {name: _number(rule, name, own) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        return Llama3Scaling(original_context=original, **named)
    if own.get("factor") is not None:
        factor = _number(rule, "factor", own)
    else:
        factor = _count(rule, _LONGEST, longest) / original
    if rule == "longrope":
        return _long_rope(own, factor, original, max_length)
    return _yarn(own, factor, original)


_LONGEST, _ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"


def _yarn(own: Parameters, factor: float, original: int) -> RotaryScaling:
    # A 0 stands for a key left out, and one of the last two without the other has no effect.
    names = [name for name in ("beta_fast", "beta_slow") if own.get(name)]
    if own.get("attention_factor") is not None:
        names.append("attention_factor")
    elif own.get("mscale") and own.get("mscale_all_dim"):
        names += ["mscale", "mscale_all_dim"]
    is_rounded = own.get("truncate") is not False
    named = {name: _number("yarn", name, own) for name in names}
    return YarnScaling(factor=factor, original_context=original, is_rounded=is_rounded, **named)


def _long_rope(own: Parameters, factor: float, original: int, max_length: int | None) -> RotaryScaling:
    short, long = (_numbers("longrope", name, own) for name in ("short_factor", "long_factor"))
    if own.get("attention_factor") is not None:
        magnitude = _number("longrope", "attention_factor", own)
    else:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if short == long:
        return LongRopeScaling(factors=short, attention_factor=magnitude)
    is_long = _given_length("longrope", max_length) > original
    return LongRopeScaling(factors=long if is_long else short, attention_factor=magnitude)


def _number(rule: str, name: str, own: Parameters) -> float:
    value = own.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"The rotary scaling {rule!r} of config.json needs a number for {name}; got {value!r}.")
    return float(value)


def _numbers(rule: str, name: str, own: Parameters) -> tuple[float, ...]:
    values = own.get(name)
    if not isinstance(values, list | tuple):
        raise ValueError(f"The rotary scaling {rule!r} of config.json needs a list for {name}; got {values!r}.")
    return tuple(_number(rule, f"{name}[{i}]", {f"{name}[{i}]": value}) for i, value in enumerate(values))


def _count(rule: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ValueError(f"The rotary scaling {rule!r} of config.json needs {name}, a whole number; got {value!r}.")
    return value


def _given_length(rule: str, max_length: int | None) -> int:
    if max_length is None:
        raise ValueError(
            f"The rotary scaling {rule!r} depends on how long sequences become, and keys in pages are turned already, "
            "so that it must be chosen when the model is loaded. Pass max_length, the most tokens of a sequence."
        )
    return max_length
