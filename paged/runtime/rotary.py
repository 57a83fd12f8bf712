"""`Rotary`: rotary position embedding of queries and keys."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paged.spec import as_bool, as_float, require_int

from .rotary_angles import cos_sin
from .rotary_scaling import RotaryScaling, plain_frequencies


class Rotary(eqx.Module):
    """Rotary position embedding (Su et al., RoFormer, arXiv:2104.09864).

    Each pair of a head's features is turned by an angle proportional to the position, so that ``<q, k>`` depends on the
    distance between query and key only. There are no parameters: all fields are static, and equal ones are the same
    value under ``jax.jit``.

    >>> rotary = Rotary(head_dim=2)
    >>> east = jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]])
    >>> np.round(rotary(east, jnp.array([0, 1]))[:, 0], 4).tolist() == np.float32([[1, 0], [0.5403, 0.8415]]).tolist()
    True
    """

    head_dim: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)
    rotary_dim: int = eqx.field(static=True)
    scaling: RotaryScaling | None = eqx.field(static=True)
    is_interleaved: bool = eqx.field(static=True)

    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        scaling: RotaryScaling | None = None,
        is_interleaved: bool = False,
    ):
        """**Arguments:**

        - `head_dim`: features of a head.
        - `theta`: the base. Pair ``i`` turns by ``theta ** (-2 i / rotary_dim)`` radians per position.
        - `rotary_dim`: how many of the first features are turned, an even number. The others pass unchanged. None: all.
        - `scaling`: a `RotaryScaling` for contexts longer than those of training (`LinearScaling`, `NtkScaling`,
          `Llama3Scaling`, `YarnScaling`, `LongRopeScaling`), or None.
        - `is_interleaved`: True pairs feature ``2 i`` with ``2 i + 1`` (the paper, GPT-J). False pairs feature ``i``
          with ``i + rotary_dim // 2`` (GPT-NeoX, Llama and most released weights).

        Raises ``ValueError`` or ``TypeError`` for dimensions that cannot be paired, a ``theta`` that is not above 1,
        and a ``scaling`` of another type.
        """
        self.head_dim = head_dim
        self.theta = as_float("theta", theta)
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        self.scaling = scaling
        self.is_interleaved = as_bool("is_interleaved", is_interleaved)
        for name in ("head_dim", "rotary_dim"):
            require_int(name, getattr(self, name))
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= head_dim:
            raise ValueError(
                "rotary_dim must be even, because features are turned in pairs, and in [2, head_dim]; got "
                f"rotary_dim={self.rotary_dim}, head_dim={head_dim}. To turn a part of the head, pass rotary_dim."
            )
        if not self.theta > 1:
            raise ValueError(f"theta must be finite and greater than 1, so that frequencies fall; got {theta}.")
        if scaling is not None and not isinstance(scaling, RotaryScaling):
            raise TypeError(f"scaling must be a RotaryScaling, such as LinearScaling(4.0), or None; got {scaling!r}.")

    @property
    def frequencies(self) -> np.ndarray:
        """float64[rotary_dim // 2]: radians per position of each pair, with the scaling."""
        if self.scaling is None:
            return plain_frequencies(self.theta, self.rotary_dim)
        return self.scaling.frequencies(self.theta, self.rotary_dim)

    def __call__(
        self, x: Float[Array, "tokens heads head_dim"], positions: Int[Array, " tokens"]
    ) -> Float[Array, "tokens heads head_dim"]:
        """Turn each row of queries or keys by its position.

        **Arguments:**

        - `x`: queries or keys.
        - `positions`: the absolute position of each row, in the range of int32 whatever its dtype. A negative one,
          which rows of no sequence have, turns the other way and does no harm.

        **Returns:** the turned rows in ``x``'s dtype, computed in float32. Cosines and sines are right to 1e-6 at every
        position, the last one of int32 included.

        Raises ``ValueError`` for shapes that do not fit, and ``TypeError`` for positions that are no integers.
        """
        if x.ndim != 3 or x.shape[-1] != self.head_dim or positions.shape != x.shape[:1]:
            raise ValueError(
                f"x must be [tokens, heads, head_dim] = [*, *, {self.head_dim}] and positions [tokens]; got {x.shape} "
                f"and {positions.shape}."
            )
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise TypeError(f"positions must be integers; got {positions.dtype.name}. For fractions use LinearScaling.")
        factor = 1.0 if self.scaling is None else self.scaling.magnitude
        cos, sin = (factor * part[:, None] for part in cos_sin(positions, self.frequencies))
        a, b = self._pairs(x[..., : self.rotary_dim].astype(jnp.float32))
        turned = self._unpair(a * cos - b * sin, b * cos + a * sin).astype(x.dtype)
        return jnp.concatenate([turned, x[..., self.rotary_dim :]], axis=-1)

    def _pairs(self, x: Array) -> tuple[Array, Array]:
        if self.is_interleaved:
            return x[..., 0::2], x[..., 1::2]
        return x[..., : self.rotary_dim // 2], x[..., self.rotary_dim // 2 :]

    def _unpair(self, a: Array, b: Array) -> Array:
        if self.is_interleaved:
            return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], self.rotary_dim)
        return jnp.concatenate([a, b], axis=-1)
