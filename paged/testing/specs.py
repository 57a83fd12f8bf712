"""A few specs that hold every feature of an attention, for properties to be tried on."""

import jax.numpy as jnp

from paged.spec import (
    ALiBi,
    AttentionSpec,
    Bias,
    Causal,
    Chunk,
    PerHead,
    Prefix,
    Spans,
    Tree,
    Value,
    Where,
    Window,
)

from .cases import Case

SLOPE_TABLE = jnp.array([0.5, -0.25, 0.125, 1.0, -1.5, 0.75, 0.3, -0.6])


def not_fifth(p, j):
    """An opaque predicate, which also hides some keys that every other mask shows."""
    return (p + 2 * j) % 5 != 0


def not_every_head(p, j, h):
    """An opaque predicate that differs by head."""
    return (p + j) % (h + 1) == 0


def real(x):
    """An integer, or an array of integers, as floats: where dtypes are strict, the two do not mix."""
    return float(x) if isinstance(x, int) else x.astype(jnp.float32)


def table_bias(p, j, h):
    """An opaque bias over a table."""
    return SLOPE_TABLE[h] * real(jnp.abs(p - j)) ** 0.5


PLAIN = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
RICH = PLAIN.replace(window=5, soft_cap=20.0, sinks=True, scores=(ALiBi(),))
ODD = PLAIN.replace(causal=False, mask=(Prefix(3) | Chunk(6)) & Where(not_fifth), scores=(Bias(table_bias),), scale=0.2)

# What a batch brings: numbers of sequences, one and several, in masks and in scores; masks by head; a tree.
VALUES = PLAIN.replace(
    causal=False,
    mask=(Causal() & Window(Value("window"))) | Prefix(Value("prefix")) | Spans(Value("starts", 2), Value("ends", 2)),
    scores=(ALiBi(Value("slopes", 4, "float32")),),
    soft_cap=Value("cap", dtype="float32"),
)
BY_HEAD = PLAIN.replace(mask=PerHead((Window(Value("window")), Where(not_every_head))), sinks=True)
TREE = PLAIN.replace(mask=Tree() & (Window(6) | Prefix(2)), scores=(ALiBi(),))

SPECS = {"plain": PLAIN, "rich": RICH, "odd": ODD}
"""Specs that `check_lowering` checks a lowering with, by name: few terms, many, and those that nothing is known of."""
BROUGHT = {"values": VALUES, "by head": BY_HEAD, "tree": TREE}
# phase: what else the case says of it. Every property is crossed with these.
PHASES = {"decode": {"rows": 1}, "ragged": {}, "prefill": {"rows": 6}}


def case_of(spec: str, phase: str, **facts) -> Case:
    """The case of a named spec in a named phase."""
    own = {**SPECS, **BROUGHT}[spec]
    sinks = (own.num_q_heads,) if own.sinks else None
    return Case(spec=own, phase=phase, sink_shape=sinks, **{**PHASES[phase], **facts})  # pyright: ignore
