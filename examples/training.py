"""Train the language model on bytes: next-token cross entropy, AdamW with warm-up and cosine decay."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from .language_model import LanguageModel


def loss(model: LanguageModel, tokens: Int[Array, "batch tokens_plus_1"]) -> Float[Array, ""]:
    """Mean nats per token of predicting each token from those before it."""
    logits = model.dense(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(model: LanguageModel, batches: np.ndarray, learning_rate: float) -> tuple[LanguageModel, list[float]]:
    """The model after one step per batch (integers[steps, batch, tokens + 1]), and the loss of every step."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, len(batches) // 10, len(batches))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    # The cache's index is part of the model but not of what is learnt: only inexact arrays are.
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(tokens, model, state):
        value, gradient = eqx.filter_value_and_grad(loss)(model, tokens)
        updates, state = optimiser.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    losses = []
    with tqdm(batches, desc="training", unit="step") as bar:
        for tokens in bar:
            model, state, value = step(jnp.asarray(tokens, jnp.int32), model, state)
            losses.append(float(value))
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    return model, losses


def evaluate(model: LanguageModel, text: np.ndarray, length: int) -> float:
    """Mean nats per byte over the text, in windows of ``length`` bytes without overlap."""
    count = (len(text) - 1) // length
    windows = text[np.arange(count)[:, None] * length + np.arange(length + 1)]
    evaluated = eqx.filter_jit(loss)
    return float(np.mean([evaluated(model, jnp.asarray(w[None], jnp.int32)) for w in windows]))
