"""What the engine accepts: every argument of a request, checked before anything of it reaches the device."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
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
    * ``tokenizer``: of the model, or None. * ``log_probs``: how many a request may ask for; None for none at all.
    """

    sizes: Sizes
    vocab: int
    capacity: int
    specs: tuple[AttentionSpec, ...]
    ahead: AheadMasks
    chunk_size: int
    pages: PagesOfValues
    tokenizer: Any = None
    log_probs: int | None = None

    def checked(
        self, prompt: Any, max_new_tokens: Any, *, sampler: Any, eos: Any, stop: Any, priority: Any, salt: Any,
        values: Any, log_probs: Any, prompt_log_probs: Any,
    ) -> tuple[NewRequest, tuple[str, ...]]:  # fmt: skip
        """The request and its stop strings, or ``ValueError`` or ``TypeError`` that names the argument."""
        if isinstance(prompt, str):
            prompt = self._encoded("prompt", prompt)
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
        eos = getattr(self.tokenizer, "eos_ids", None) if eos is None else eos
        ends = tuple(sorted(end_ids(eos)))
        self._require_in_vocabulary("eos", ends)
        self._require_room("eos", len(ends), self.sizes.ends)
        numbers, cached = self._values(values), len(ids) + limit - 1
        self.pages.require(cached, numbers)
        stops, strings = self._stops(stop)
        cuts = self.ahead.cuts("prompt", len(ids), cached, numbers)
        new = NewRequest(
            ids,
            len(ids) + limit,
            sampler,
            None,
            ends,
            stops,
            integer("priority", priority),
            salt=integer("salt", salt),
            values=numbers,
            log_probs=self._num_log_probs(log_probs, prompt_log_probs),
            cuts=cuts.within(self.chunk_size, f"Make the engine with chunk_size={cuts.longest}."),
        )
        return new, strings

    def _stops(self, stop: Any) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """Stop sequences of ids, and stop strings."""
        stop = (stop,) if isinstance(stop, str) else stop
        if isinstance(stop, bytes) or not isinstance(stop, Sequence):
            raise TypeError(f"stop must be a list of strings and sequences of token ids; got {stop!r}.")
        strings = tuple(each for each in stop if isinstance(each, str))
        if strings and self.tokenizer is None:
            raise TypeError(
                f"stop has the string {strings[0]!r}, and this engine has no tokenizer: make it with tokenizer=, or "
                "pass token ids."
            )
        if "" in strings:
            raise ValueError("stop has an empty string, which every text begins with.")
        named = [(f"stop[{i}]", each) for i, each in enumerate(stop) if not isinstance(each, str)]
        stops = tuple(token_ids(name, each) for name, each in named)
        self._require_room("stop", len(stops), self.sizes.stops)
        for (name, _), each in zip(named, stops, strict=True):
            if not 1 <= len(each) <= self.sizes.stop_tokens:
                raise ValueError(
                    f"{name} must have 1 to {self.sizes.stop_tokens} tokens; got {len(each)}. The engine's "
                    "max_stop_tokens says how many."
                )
            self._require_in_vocabulary(name, each)
        return stops, strings

    def _num_log_probs(self, log_probs: Any, prompt_log_probs: Any) -> int:
        """Of how many tokens beside its own; -1 for none."""
        if not isinstance(prompt_log_probs, bool):
            raise TypeError(f"prompt_log_probs must be True or False; got {prompt_log_probs!r}.")
        asked = -1 if log_probs is None else integer("log_probs", log_probs, 0)
        name = f"prompt_log_probs={prompt_log_probs}" if prompt_log_probs else f"log_probs={asked}"
        if self.log_probs is None and (prompt_log_probs or asked >= 0):
            raise ValueError(
                f"{name} needs an engine that tells log-probabilities: make it with log_probs={max(asked, 0)}."
            )
        if self.log_probs is not None and asked > self.log_probs:
            raise ValueError(f"log_probs={asked} is more than this engine tells: make it with log_probs={asked}.")
        return asked

    def _encoded(self, name: str, text: str) -> Sequence[int]:
        if self.tokenizer is None:
            raise TypeError(
                f"{name} must be token ids; got {text!r}, and this engine has no tokenizer. Make it with tokenizer=, "
                "or encode the text."
            )
        return self.tokenizer.encode(text)

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


def keys_of_samples(key: Any, n: Any, of_engine: Any) -> list[Any]:
    """The key of each sample, None for the engine's; or ``ValueError`` or ``TypeError`` that names the argument."""
    samples = 1 if n is None else integer("n", n, 1)
    if key is None:
        return [None] * samples
    if n is not None and isinstance(key, jax.Array) and key.ndim == 1:
        if key.dtype != of_engine.dtype or len(key) != samples:
            raise ValueError(
                f"key must be one typed PRNG key, or n = {samples} of them, of the engine's kind {of_engine.dtype}; "
                f"got {key.dtype} of shape {key.shape}."
            )
        return list(key)
    if require_key(key).dtype != of_engine.dtype:
        raise ValueError(f"key must be of the kind of the engine's key, {of_engine.dtype}; got {key.dtype}.")
    return [key] * samples


def is_alike(old: Any, new: Any) -> bool:
    """Whether two models have the same structure, shapes and dtypes."""
    kind = lambda x: (x.shape, str(x.dtype)) if eqx.is_array(x) else x
    return bool(eqx.tree_equal(*(jax.tree.map(kind, model) for model in (old, new))))
