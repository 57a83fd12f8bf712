"""`Samplers`: the rules of many rows, as arrays."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .sampler import Sampler

_ALL = np.iinfo(np.int32).max


class Samplers(eqx.Module):
    """One `Sampler` for each row of logits, as arrays: another rule traces nothing anew.

    * ``temperature``, ``top_p``, ``min_p``, ``repetition_penalty``, ``presence_penalty`` f32[rows].
    * ``top_k`` i32[rows]: 1 for a greedy row.
    * ``bias_tokens`` i32[rows, biases], ``biases`` f32[rows, biases]: the logit biases; -1 where a row has fewer.

    >>> rules = Samplers.of([Sampler(), Sampler(temperature=0.5, top_p=0.9)])
    >>> rules.top_k[0].item(), rules.temperature[1].item(), rules.biases.shape
    (1, 0.5, (2, 0))
    """

    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    repetition_penalty: Float[Array, " rows"]
    presence_penalty: Float[Array, " rows"]
    bias_tokens: Int[Array, "rows biases"]
    biases: Float[Array, "rows biases"]

    @classmethod
    def of(cls, samplers: Sequence[Sampler], num_biases: int | None = None) -> "Samplers":
        """The arrays of these rules.

        **Arguments:**

        - `samplers`: one for each row.
        - `num_biases`: for how many logit biases a row has room; None for as many as the row with most has.

        Raises ``ValueError`` where a rule has more biases than that.
        """
        return cls(**{name: jnp.asarray(x) for name, x in cls.columns(samplers, num_biases).items()})

    @classmethod
    def columns(cls, samplers: Sequence[Sampler], num_biases: int | None = None) -> dict[str, np.ndarray]:
        """What `of` makes, by name and on the host."""
        most = max((len(sampler.logit_bias) for sampler in samplers), default=0)
        num_biases = most if num_biases is None else num_biases
        if most > num_biases:
            raise ValueError(f"logit_bias of {most} tokens does not fit: a row has room for {num_biases}.")
        biases = np.full((len(samplers), num_biases), 0.0, np.float32)
        tokens = np.full((len(samplers), num_biases), -1, np.int32)
        for row, sampler in enumerate(samplers):
            for place, (token, bias) in enumerate(sampler.logit_bias):
                tokens[row, place], biases[row, place] = token, bias
        one = lambda sampler: 1 if sampler.is_greedy else _ALL if sampler.top_k is None else sampler.top_k
        floats = lambda name, default: np.asarray(
            [default if getattr(s, name) is None else getattr(s, name) for s in samplers], np.float32
        )
        return dict(
            # It and its reciprocal, by which a compiler may multiply instead, are normal numbers in float32.
            temperature=np.asarray([min(max(s.temperature, 2.0**-126), 2.0**126) for s in samplers], np.float32),
            top_k=np.asarray([one(sampler) for sampler in samplers], np.int32),
            top_p=floats("top_p", 1.0),
            min_p=floats("min_p", 0.0),
            repetition_penalty=floats("repetition_penalty", 1.0),
            presence_penalty=floats("presence_penalty", 0.0),
            bias_tokens=tokens,
            biases=biases,
        )

    @property
    def is_greedy(self) -> Bool[Array, " rows"]:
        """Which rows take the likeliest token, bool[rows]."""
        return self.top_k == 1

    @property
    def needs_history(self) -> Bool[Array, " rows"]:
        """Which rows ask what tokens the prompt and the answer have, bool[rows]."""
        return (self.repetition_penalty != 1) | (self.presence_penalty != 0)

    def changed(
        self,
        logits: Float[Array, "rows vocab"],
        seen: Bool[Array, "rows vocab"] | None = None,
        drawn: Bool[Array, "rows vocab"] | None = None,
    ) -> Float[Array, "rows vocab"]:
        """Logits with biases and penalties.

        **Arguments:**

        - `logits`: float32.
        - `seen`, `drawn`: which tokens the prompt or the answer of a row has, and which the answer alone; None for
          none.
        """
        if self.biases.shape[1]:
            rows, past = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
            tokens = jnp.where(self.bias_tokens < 0, past, self.bias_tokens)
            is_forbidden = self.biases == -jnp.inf  # also where the logit is inf
            logits = logits.at[rows, tokens].add(jnp.where(is_forbidden, 0.0, self.biases), mode="drop")
            logits = logits.at[rows, tokens].min(jnp.where(is_forbidden, -jnp.inf, jnp.inf), mode="drop")
        if seen is not None:
            penalty = self.repetition_penalty[:, None]
            logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        return logits if drawn is None else jnp.where(drawn, logits - self.presence_penalty[:, None], logits)
