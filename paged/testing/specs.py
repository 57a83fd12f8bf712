"""A few specs that hold every feature of an attention, for properties to be tried on."""

import jax.numpy as jnp

from paged.spec import ALiBi, AttentionSpec, Bias, Chunk, Prefix, Where

from .cases import Case

SLOPE_TABLE = jnp.array([0.5, -0.25, 0.125, 1.0, -1.5, 0.75, 0.3, -0.6])


def not_fifth(p, j):
    """An opaque predicate, which also hides some keys that every other mask shows."""
    return (p + 2 * j) % 5 != 0


def real(x):
    """An integer, or an array of integers, as floats: where dtypes are strict, the two do not mix."""
    return float(x) if isinstance(x, int) else x.astype(jnp.float32)


def table_bias(p, j, h):
    """An opaque bias over a table."""
    return SLOPE_TABLE[h] * real(jnp.abs(p - j)) ** 0.5


PLAIN = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
RICH = PLAIN.replace(window=5, soft_cap=20.0, sinks=True, scores=(ALiBi(),))
ODD = PLAIN.replace(causal=False, mask=(Prefix(3) | Chunk(6)) & Where(not_fifth), scores=(Bias(table_bias),), scale=0.2)

SPECS = {"plain": PLAIN, "rich": RICH, "odd": ODD}
# phase: what else the case says of it. Every property is crossed with these.
PHASES = {"decode": {"rows": 1}, "ragged": {}, "prefill": {"rows": 6}}


def case_of(spec: str, phase: str, **facts) -> Case:
    """The case of a named spec in a named phase."""
    sinks = (SPECS[spec].num_q_heads,) if SPECS[spec].sinks else None
    return Case(spec=SPECS[spec], phase=phase, sink_shape=sinks, **{**PHASES[phase], **facts})  # pyright: ignore
