"""What the engine accepts: every argument of a request, checked before anything of it reaches the device."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from paged.spec import AttentionSpec

from .._arguments import end_ids, integer, token_ids, values_of_prompts
from .._cuts import AheadMasks
from .._groups import Masks, mask_of, most_pages
from ..sampling import Sampler
from .requests import NewRequest, Sizes


class PagesOfValues(NamedTuple):
    """Groups of layers whose pages may not suffice, by the numbers of a request.

    * ``groups``: masks, and how many pages the group has. * ``page_size``, ``budget``: tokens, and rows of a step.
    """

    groups: tuple[tuple[Masks, int], ...]
    page_size: int
    budget: int

    def require(self, tokens: int, values: Mapping[str, Any]) -> None:
        """``ValueError`` if one sequence of so many tokens holds more pages at once than there are."""
        for masks, num_pages in self.groups:
            if -(-tokens // self.page_size) > num_pages:
                needed = most_pages(mask_of(masks), tokens, self.page_size, self.budget, values)
                if needed > num_pages:
                    raise ValueError(
                        f"prompt and max_new_tokens need {needed} pages of {self.page_size} tokens at once in layers "
                        f"with the mask {masks[0]}, and there are {num_pages}. Ask for fewer, or give these layers "
                        "more pages."
                    )


@dataclasses.dataclass(frozen=True)
class Intake:
    """The facts that requests are checked against.

    * ``sizes``: of the table of requests.
    * ``vocab``: how many tokens the model knows.
    * ``capacity``: the most tokens of a sequence that the pool can ever hold.
    * ``specs``: of the model's attentions. * ``ahead``: those of its masks that may see ahead.
    * ``chunk_size``: the most rows of a prompt for which a step always has room.
    * ``pages``: what the numbers of a request may ask for.
    """

    sizes: Sizes
    vocab: int
    capacity: int
    specs: tuple[AttentionSpec, ...]
    ahead: AheadMasks
    chunk_size: int
    pages: PagesOfValues

    def checked(
        self, prompt: Any, max_new_tokens: Any, *, sampler: Any, key: Any, eos: Any, stop: Any, priority: Any,
        salt: Any, arrival: int, values: Any,
    ) -> NewRequest:  # fmt: skip
        """The request, or ``ValueError`` or ``TypeError`` that names the argument."""
        ids, limit = token_ids("prompt", prompt), integer("max_new_tokens", max_new_tokens, least=1)
        if not ids:
            raise ValueError("prompt is empty: a model needs a token to begin with.")
        self._require_in_vocabulary("prompt", ids)
        most = min(self.sizes.tokens, self.capacity + 1)  # the last token drawn is in no page
        if len(ids) + limit > most:
            raise ValueError(
                f"prompt has {len(ids)} tokens, and max_new_tokens is {limit}: this engine holds {most} tokens of a "
                "request. Ask for fewer, or make it with more pages and max_tokens."
            )
        sampler = Sampler() if sampler is None else sampler
        if not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler; got {sampler!r}.")
        self._require_in_vocabulary("logit_bias", [token for token, _ in sampler.logit_bias])
        self._require_room("logit_bias", len(sampler.logit_bias), self.sizes.biases)
        ends = tuple(sorted(end_ids(eos)))
        self._require_in_vocabulary("eos", ends)
        self._require_room("eos", len(ends), self.sizes.ends)
        numbers, cached = self._values(values), len(ids) + limit - 1
        self.pages.require(cached, numbers)
        return NewRequest(
            ids,
            len(ids) + limit,
            sampler,
            require_key(key),
            ends,
            self._stops(stop),
            integer("priority", priority),
            arrival,
            integer("salt", salt),
            numbers,
            self.ahead.cuts(len(ids), cached, numbers, self.chunk_size),
        )

    def _stops(self, stop: Any) -> tuple[tuple[int, ...], ...]:
        if isinstance(stop, str | bytes) or not isinstance(stop, Sequence):
            raise TypeError(f"stop must be a list of sequences of token ids; got {stop!r}.")
        stops = tuple(token_ids(f"stop[{i}]", each) for i, each in enumerate(stop))
        self._require_room("stop", len(stops), self.sizes.stops)
        for i, each in enumerate(stops):
            if not 1 <= len(each) <= self.sizes.stop_tokens:
                raise ValueError(
                    f"stop[{i}] must have 1 to {self.sizes.stop_tokens} tokens; got {len(each)}. The engine's "
                    "stop_tokens says how many."
                )
            self._require_in_vocabulary(f"stop[{i}]", each)
        return stops

    def _values(self, values: Any) -> Mapping[str, np.ndarray]:
        rows = None if values is None else {name: np.asarray(x)[None] for name, x in dict(values).items()}
        return {name: x[0] for name, x in values_of_prompts(rows, self.specs, 1).items()}

    def _require_in_vocabulary(self, name: str, ids: Sequence[int]) -> None:
        outside = next((token for token in ids if token >= self.vocab), None)
        if outside is not None:
            raise ValueError(f"{name} has the token {outside}, and the model knows {self.vocab}.")

    def _require_room(self, name: str, count: int, room: int) -> None:
        if count > room:
            raise ValueError(f"{name} has {count} entries, and this engine's requests have room for {room}.")


def require_key(key: Any) -> Any:
    """A typed PRNG key, or ``TypeError``."""
    if not isinstance(key, jax.Array) or not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise TypeError(f"key must be one typed PRNG key, such as jax.random.key(0); got {key!r}.")
    return key


def keys_of_samples(key: Any, n: Any) -> list[Any]:
    """The key of each sample, or ``ValueError`` or ``TypeError`` that names the argument."""
    samples = 1 if n is None else integer("n", n, 1)
    if n is not None and isinstance(key, jax.Array) and key.ndim == 1:
        if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) or len(key) != samples:
            raise ValueError(
                f"key must be one typed PRNG key, or n = {samples} of them; got {key.dtype} of shape {key.shape}."
            )
        return list(key)
    require_key(key)
    return [key] if n is None else [jax.random.fold_in(key, i) for i in range(samples)]
