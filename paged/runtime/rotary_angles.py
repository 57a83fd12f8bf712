"""Cosines and sines of rotary angles, right to 1e-6 at every int32 position, without 64-bit arithmetic."""

import functools
import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# 1 / (2 pi), as an integer multiple of 2 ** -128. A product of float64 numbers would be off by a part of a turn.
_TURNS_PER_RADIAN = 0x28BE60DB9391054A7F09D5F47D4D3770
_TURN = 1 << 32


def cos_sin(
    positions: Int[Array, " tokens"], frequencies: np.ndarray
) -> tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]:
    """``cos(p * f)`` and ``sin(p * f)`` of every position ``p`` and frequency ``f``, in float32.

    A product in float32 loses the angle of a late position: its error is about ``p * 6e-8``. Here angles are counted in
    units of ``2 ** -32`` turn, so that int32 arithmetic, which wraps, drops whole turns and nothing else. A frequency
    is an int32 number of units and a rest of at most half a unit. The rest times the position is a float32 number of at
    most ``2 ** 30`` units, whose rounding is below 3e-7 radians.

    **Arguments:**

    - `positions`: integers in the range of int32, negative ones included. Others wrap.
    - `frequencies`: float64[pairs], radians per position.

    **Returns:** both, float32. The error is below 1e-6, where the frequencies are taken as exact.
    """
    whole, rest = _units(np.asarray(frequencies, np.float64).tobytes())
    p = positions.astype(jnp.int32)[:, None]
    units = p * whole[None] + (p.astype(jnp.float32) * rest[None]).astype(jnp.int32)
    # Without its half turn an angle is at most pi / 2: float32 rounds it by half as much. A half turn changes signs.
    within = (units << 1) >> 1
    sign = jnp.where(within == units, jnp.float32(1), jnp.float32(-1))
    angle = within.astype(jnp.float32) * np.float32(2 * math.pi / _TURN)
    return sign * jnp.cos(angle), sign * jnp.sin(angle)


@functools.lru_cache(maxsize=256)
def _units(frequencies: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Float64 frequencies as units of ``2 ** -32`` turn per position: int32, modulo a turn, and a float32 rest."""
    whole, rest = [], []
    for frequency in np.frombuffer(frequencies):
        units = Fraction(float(frequency)) * _TURNS_PER_RADIAN * _TURN / (1 << 128)
        nearest = round(units)
        whole.append((nearest + _TURN // 2) % _TURN - _TURN // 2)
        rest.append(float(units - nearest))
    return np.array(whole, np.int32), np.array(rest, np.float32)
