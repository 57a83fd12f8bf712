"""The samples of one prompt: a handle and a request for each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .handles import Handle
from .requests import NewRequest
from .texts import AnswerText


def samples_of(
    new: NewRequest, strings: Sequence[str], keys: Sequence[Any], folds_samples: bool, prompt_log_probs: bool,
    number: int, decode: Callable[[Sequence[int]], str] | None, **handle: Any,
) -> list[tuple[Handle, NewRequest]]:  # fmt: skip
    """A handle and a request for each sample.

    **Arguments:**

    - `new`, `strings`: the request, and its stop strings.
    - `keys`: of each sample; None for the engine's, in which ``number`` is folded.
    - `folds_samples`: whether the number of the sample is folded into its key.
    - `prompt_log_probs`: whether the handles get those of the prompt's tokens: all have the list of the first one.
    - `number`: of the first sample among the requests. - `decode`: the text of tokens, if there is text.
    - `handle`: more of every `Handle`.
    """
    of_prompt: Any = [None] * len(new.prompt) if prompt_log_probs else None
    pairs = []
    for i, key in enumerate(keys):
        reader = None if decode is None else AnswerText(decode, strings)
        own = Handle(new.prompt, sample=i, reader=reader, prompt_log_probs=of_prompt, **handle)
        own.num_log_probs = new.log_probs
        request = dataclasses.replace(
            new,
            prompt_log_probs=prompt_log_probs and i == 0,
            key=key,
            arrival=number + i,
            family=number if len(keys) > 1 else -1,
            folds=(number if key is None else -1, i if folds_samples else -1),
        )
        pairs.append((own, request))
    return pairs
