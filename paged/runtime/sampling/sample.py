"""`sample`: token ids from logits by one rule."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from paged.lower import whole_rows

from .draw import draw, take_largest
from .sampler import Sampler
from .samplers import Samplers


def sample(
    logits: Float[Array, "*batch vocab"],
    sampler: Sampler,
    keys: Key[Array, "*batch"] | None = None,
    *,
    seen: Bool[Array, "*batch vocab"] | None = None,
    drawn: Bool[Array, "*batch vocab"] | None = None,
) -> Int[Array, "*batch"]:
    """Draw one token for each row of logits, in float32.

    **Arguments:**

    - `logits`: any number of leading axes. A logit of ``-inf`` is never drawn. Of several logits of ``inf`` each is as
      likely.
    - `sampler`: the rule.
    - `keys`: a typed PRNG key (``jax.random.key``) per row. A row's draw depends on its own key and logits only. A
      greedy sampler needs no keys.
    - `seen`, `drawn`: which tokens the prompt or the answer of a row has, and which the answer alone. A sampler with
      penalties needs both.

    **Returns:** token ids, int32. -1 for a row that holds NaN, or nothing but ``-inf``: no token can be drawn from it.

    Raises ``TypeError`` or ``ValueError`` for logits that are no floats, for an empty vocabulary, for keys that are
    missing, untyped or of another shape, and for penalties without ``seen`` and ``drawn``.

    What it costs is said at `draw`, which takes a rule for each row.

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2]]))
    >>> sample(logits, Sampler()).tolist()
    [1, 0]
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> sample(logits, Sampler(temperature=1.0, top_p=0.3), keys).tolist()
    [1, 0]
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a Sampler; got {sampler!r}.")
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floats; got {logits.dtype.name}.")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be [..., vocab] with at least one token; got {logits.shape}.")
    if sampler.needs_history and (seen is None or drawn is None):
        raise ValueError("seen and drawn must be bool[..., vocab]: the sampler's penalties ask for them.")
    rows = logits.shape[:-1]
    rules, history = Samplers.of([sampler]), (seen, drawn) if sampler.needs_history else (None, None)
    if sampler.is_greedy:
        return _take_largest(logits, *history, rules)
    is_array = isinstance(keys, jax.Array)
    if not is_array or not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != rows:
        got = f"{keys.dtype} of shape {keys.shape}" if is_array else repr(keys)
        raise ValueError(
            f"keys must be one typed PRNG key per row, shape {rows}, because the sampler draws at random; "
            f"got {got}. Use jax.random.split(jax.random.key(seed), rows)."
        )
    return _draw(logits, keys, *history, rules)


# Outside of a jit one program each, as `draw` is. By plain `jax.jit`, so that a test can clear what was traced.
@jax.jit
def _draw(logits: Array, keys: Array, seen: Any, drawn: Any, rules: Samplers) -> Array:
    logits, keys = whole_rows(logits, keys)
    rules = jax.tree.map(lambda x: jnp.broadcast_to(x, (keys.size, *x.shape[1:])), rules)
    tokens = draw(_flat(logits), rules, keys.reshape(-1), _flat(seen), _flat(drawn))
    return tokens.reshape(logits.shape[:-1])


@jax.jit
def _take_largest(logits: Array, seen: Any, drawn: Any, rules: Samplers) -> Array:
    (logits,) = whole_rows(logits)
    tokens = take_largest(rules.changed(_flat(logits.astype(jnp.float32)), _flat(seen), _flat(drawn)))
    return tokens.reshape(logits.shape[:-1])


def _flat(x: Any) -> Any:
    return None if x is None else x.reshape(-1, x.shape[-1])
