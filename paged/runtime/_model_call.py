"""How a served model is called: whole, or in two parts, with its plans made once."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._step_plans import StepPlans

Model = Callable[[Int[Array, " tokens"], Any, eqx.nn.State], tuple[Float[Array, "tokens vocab"], eqx.nn.State]]


@runtime_checkable
class TwoPartModel(Protocol):
    """A model that is called in two parts, so that logits are made of those rows only from which a token is drawn.

    ``model(tokens, batch, state)`` must be the one after the other: logits of all rows.
    """

    def features(self, tokens: Any, batch: Any, state: eqx.nn.State) -> tuple[Any, eqx.nn.State]:
        """What the layers give for each row, rows first, and the new state."""
        ...

    def logits(self, x: Any) -> Any:
        """Logits of rows of `features`."""
        ...


@eqx.filter_jit
def apply(model: Any, tokens: Any, batch: Any, state: eqx.nn.State) -> Any:
    """The model, or its first part, with a jit of its own: what was traced to learn shapes is not traced again."""
    with StepPlans.of(batch).shared():  # by several stacks, and by layers in a list
        return (model.features if _has_two_parts(model) else model)(tokens, batch, state)


def logits_of_rows(model: Any, x: Any, rows: Any) -> Any:
    """The logits of some rows of what `apply` gave."""
    return model.logits(x[rows]) if _has_two_parts(model) else x[rows]


def vocabulary_of(model: Any, tokens: Any, batch: Any, state: eqx.nn.State) -> int:
    """How many columns the logits of a step have. The model is traced for it, and nothing runs.

    ``tokens`` and ``batch`` may be arrays, or their shapes.

    Raises ``TypeError`` unless the model returns logits float[rows, vocab] and a state.
    """
    result, rows = eqx.filter_eval_shape(_shapes, model, tokens, batch, state), tokens.shape[0]
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"The model must return a pair (logits, state); got {type(result).__name__}.")
    logits = result[0]
    is_float = isinstance(logits, jax.ShapeDtypeStruct) and jnp.issubdtype(logits.dtype, jnp.floating)
    if not is_float or len(logits.shape) != 2 or logits.shape[0] != rows or logits.shape[1] < 1:
        got = f"{logits.dtype.name}{list(logits.shape)}" if isinstance(logits, jax.ShapeDtypeStruct) else logits
        raise TypeError(f"The model must return logits float[rows, vocab], here [{rows}, vocab]; got {got}.")
    return logits.shape[1]


def _shapes(model: Any, *step: Any) -> Any:
    """What the whole model gives for a step."""
    result = apply(model, *step)
    return (model.logits(result[0]), result[1]) if _has_two_parts(model) else result


def _has_two_parts(model: Any) -> bool:
    return isinstance(model, TwoPartModel)
