"""Which requests arrive when: drawn from stated distributions."""

import dataclasses
from typing import Any

import numpy as np

_IDS = (1000, 40_000)  # of drawn tokens: no special ones


@dataclasses.dataclass(frozen=True)
class Load:
    """A load, drawn from a seed.

    * ``requests``: how many. * ``rate``: arrivals per second, a Poisson process; 0 for all at once.
    * ``system``: tokens with which every prompt begins.
    * ``prompt``, ``new``: medians of the tokens after them and of the answers, log-normal.
    * ``spread``: the standard deviation of their logarithms. * ``most``: of each, which is cut there.
    * ``seed``: of all draws.
    """

    requests: int
    rate: float
    system: int
    prompt: int
    new: int
    spread: float
    most: int
    seed: int

    def draw(self) -> dict[str, Any]:
        """The requests: ``arrivals`` in seconds from the start, ``prompts`` as token ids, and ``new_tokens``."""
        rng = np.random.default_rng(self.seed)
        gaps = rng.exponential(1 / self.rate, self.requests) if self.rate else np.zeros(self.requests)
        system = rng.integers(*_IDS, self.system).tolist()
        lengths, answers = (self._lengths(rng, median) for median in (self.prompt, self.new))
        return {
            "arrivals": np.cumsum(gaps).tolist(),
            "prompts": [system + rng.integers(*_IDS, n).tolist() for n in lengths],
            "new_tokens": answers.tolist(),
        }

    def _lengths(self, rng: np.random.Generator, median: int) -> np.ndarray:
        drawn = np.exp(rng.normal(np.log(median), self.spread, self.requests))
        return np.clip(drawn.round().astype(int), 1, self.most)
