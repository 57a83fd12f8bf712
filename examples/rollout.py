"""Reinforcement learning with one set of parameters: rollouts by an `Engine`, a policy gradient by dense attention.

A byte-sized model learns to count: an answer earns one point for each token that is the one before it plus one. Every
round draws several samples of each prompt, which the engine computes once and shares by `fork`; compares the
log-probabilities that serving gave with those of training; takes a step of REINFORCE, the mean of a prompt's samples as
its baseline; and gives the engine the new weights. Nothing is traced after the first round.

Run it with `python -m examples.rollout` where `paged[examples]` is installed.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import paged
from paged.runtime import Engine, Handle, Sampler

from .language_model import LanguageModel

VOCABULARY, WIDTH, DEPTH = 12, 32, 2
PROMPT, ANSWER = 4, 6
SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


class Rollouts(NamedTuple):
    """Samples of one round.

    * ``tokens`` i32[samples, tokens]: prompt and answer.
    * ``log_probs`` f32[samples, answer]: of the answer's tokens, as served.
    * ``advantages`` f32[samples]: points above the mean of the prompt's samples.
    * ``points``: the mean of all samples, of ``ANSWER`` at most.
    """

    tokens: Int[Array, "samples tokens"]
    log_probs: Float[Array, "samples answer"]
    advantages: Float[Array, " samples"]
    points: Float[Array, ""]


def main(arguments: list[str] | None = None) -> int:
    """Learn to count, and say how training and serving agreed. The exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=60, help="of rollouts, each with one step")
    options.add_argument("--prompts", type=int, default=8, help="in a round")
    options.add_argument("--samples", type=int, default=8, help="of each prompt")
    given = options.parse_args(arguments)

    model, engine = made(slots=given.prompts * given.samples // 2)
    optimiser = optax.adam(1e-2)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    draw, points, difference, compiled = np.random.default_rng(0), [], 0.0, []
    with programs() as count, tqdm(range(given.rounds), desc="learning", unit="round") as bar:
        for number in bar:
            rollouts = rolled_out(engine, draw, given.prompts, given.samples, jax.random.key(number))
            trained = log_probs_of(model, rollouts.tokens)
            difference = max(difference, float(jnp.max(jnp.abs(trained - rollouts.log_probs))))
            model, state = learn(optimiser, model, state, rollouts)
            engine.update_model(model)
            points.append(float(rollouts.points))
            compiled.append(count[0])
            bar.set_postfix(points=f"{points[-1]:.2f}")
    first, last = np.mean(points[:5]), np.mean(points[-5:])
    print(f"points of {ANSWER}: {first:.2f} -> {last:.2f}")
    print(f"log-probabilities of serving and training differ by at most {difference:.1e} (measured)")
    print(f"programs compiled: {compiled[0]} in the first round, {compiled[-1] - compiled[1]} after the second")
    is_good = last > first + 1 and difference < 1e-4 and compiled[-1] == compiled[1]
    print("PASSED" if is_good else "FAILED")
    return 0 if is_good else 1


def made(slots: int) -> tuple[LanguageModel, Engine]:
    """A new model, and an engine that serves it with log-probabilities."""
    tokens = PROMPT + ANSWER
    model, state = eqx.nn.make_with_state(LanguageModel)(
        (SPEC,), LAYOUT, slots * -(-tokens // LAYOUT.page_size), vocabulary=VOCABULARY, width=WIDTH, depth=DEPTH,
        key=jax.random.key(0),
    )  # fmt: skip
    return model, Engine(model, state, num_slots=slots, max_tokens=tokens, chunk_size=slots, log_probs=0)


def rolled_out(engine: Engine, draw: np.random.Generator, prompts: int, samples: int, key: Any) -> Rollouts:
    """Samples of random prompts, drawn from the model as it is."""
    keys = jax.random.split(key, prompts)
    drawn = draw.integers(0, VOCABULARY, (prompts, PROMPT))
    rule = {"n": samples, "sampler": Sampler(temperature=1.0), "log_probs": 0}
    groups = [engine.submit(prompt, ANSWER, key=own, **rule) for prompt, own in zip(drawn.tolist(), keys, strict=True)]
    for _ in engine.stream():
        pass
    handles: list[Handle] = [handle for group in groups for handle in group]
    tokens = np.array([[*handle.prompt, *handle.tokens] for handle in handles])
    points = np.sum(tokens[:, PROMPT:] == (tokens[:, PROMPT - 1 : -1] + 1) % VOCABULARY, axis=1)
    grouped = points.reshape(prompts, samples)
    advantages = (grouped - grouped.mean(1, keepdims=True)).reshape(-1)
    log_probs = np.array([handle.log_probs for handle in handles])
    return Rollouts(jnp.asarray(tokens), jnp.asarray(log_probs), jnp.asarray(advantages), jnp.asarray(points.mean()))


@eqx.filter_jit
def log_probs_of(model: LanguageModel, tokens: Int[Array, "samples tokens"]) -> Float[Array, "samples answer"]:
    """Log-probabilities of the answers' tokens, by dense attention."""
    logits = jax.nn.log_softmax(model.dense(tokens[:, :-1])[:, PROMPT - 1 :])
    return jnp.take_along_axis(logits, tokens[:, PROMPT:, None], axis=2)[..., 0]


@eqx.filter_jit
def learn(
    optimiser: optax.GradientTransformation, model: LanguageModel, state: Any, rollouts: Rollouts
) -> tuple[LanguageModel, Any]:
    """One step of the policy gradient (Williams 1992): log-probabilities weighted by advantages."""

    def loss(model: LanguageModel) -> Float[Array, ""]:
        return -jnp.mean(rollouts.advantages[:, None] * log_probs_of(model, rollouts.tokens))

    gradient = eqx.filter_grad(loss)(model)
    updates, state = optimiser.update(gradient, state)
    return eqx.apply_updates(model, updates), state


@contextlib.contextmanager
def programs() -> Iterator[list[int]]:
    """Counts the programs that JAX compiles meanwhile."""
    count = [0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


if __name__ == "__main__":
    sys.exit(main())
