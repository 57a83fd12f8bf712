"""From what a launch gives back to handles and events: tokens in order, text up to a stop string, times."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .handles import Event, FinishReason, Handle
from .requests import Reason
from .texts import AnswerText

_NAMES: dict[int, FinishReason] = {
    Reason.EOS: "eos",
    Reason.STOP: "stop",
    Reason.LENGTH: "length",
    Reason.NO_TOKEN: "no_token",
}


@dataclasses.dataclass
class Answer:
    """What one launch has drawn for one request.

    * ``tokens``: in order. * ``reason``: why the device is done with it; None where it is not.
    * ``log_probs``, ``tops``: of the tokens, if the launch tells them.
    * ``drafted``, ``accepted``: drafts that were verified, and how many of the tokens they were.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: FinishReason | None = None
    log_probs: list[float] = dataclasses.field(default_factory=list)
    tops: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


def answers_of(events: Any, steps: int) -> dict[int, Answer]:
    """The answers of a launch by the row of their request."""
    found: dict[int, Answer] = {}
    for step, slot in np.argwhere(events.request[:steps] >= 0):
        own = found.setdefault(int(events.request[step, slot]), Answer())
        count = int(events.count[step, slot])
        own.tokens += events.token[step, slot, :count].tolist()
        own.reason = _NAMES.get(int(events.reason[step, slot]))
        if events.drawn is not None:
            own.log_probs += events.drawn.log_prob[step, slot, :count].tolist()
            own.tops += zip(events.drawn.ids[step, slot, :count], events.drawn.top[step, slot, :count], strict=True)
        if events.drafted is not None:
            own.drafted += int(events.drafted[step, slot])
            own.accepted += max(count - 1, 0)
    return found


def tell_prompts(events: Any, steps: int, handles: Mapping[int, Handle]) -> None:
    """Give requests the log-probabilities of their prompts' tokens that a launch has computed."""
    told = events.of_prompts
    if told is not None:
        for step, row in np.argwhere(told.request[:steps] >= 0):
            found = handles[int(told.request[step, row])].prompt_log_probs
            if found is not None:
                found[int(told.place[step, row])] = float(told.log_prob[step, row])


def take(handle: Handle, answer: Answer, now: float) -> Event:
    """Give a request what was drawn for it, at a time: the event that tells it.

    Tokens after the one that completes a stop string are dropped. An exception of the tokenizer ends this request
    before the token for which it came.
    """
    handle.drafted, handle.accepted = handle.drafted + answer.drafted, handle.accepted + answer.accepted
    tokens, text, reason = answer.tokens, "", answer.reason
    if handle.reader is not None:
        tokens, text, reason = _read(handle, handle.reader, answer)
    if handle.first_token is None and tokens:
        handle.first_token = now
    count = len(tokens) if handle.num_log_probs >= 0 else 0
    log_probs, most = answer.log_probs[:count], handle.num_log_probs
    tops = [dict(zip(ids[:most].tolist(), top[:most].tolist(), strict=True)) for ids, top in answer.tops[:count]]
    handle.tokens += tokens
    handle.text += text
    handle.log_probs += log_probs
    handle.top_log_probs += tops
    if reason is not None:
        handle.finish_reason, handle.finished = reason, now
    return Event(handle, tuple(tokens), reason, text, tuple(log_probs), tuple(tops))


def _read(handle: Handle, reader: AnswerText, answer: Answer) -> tuple[list[int], str, FinishReason | None]:
    text, count = "", 0
    try:
        for token in answer.tokens:
            text += reader.push(token)
            count += 1
            if reader.is_stopped:
                return answer.tokens[:count], text, "stop"
        text += reader.finish() if answer.reason is not None else ""
    except Exception as error:
        handle.error = error
        return answer.tokens[:count], text, "error"
    return answer.tokens, text, "stop" if reader.is_stopped else answer.reason


def rest(reader: AnswerText | None) -> str:
    """The text that was held back, of a request that the host ends; none without a reader."""
    try:
        return "" if reader is None else reader.finish()
    except Exception:  # of the tokenizer: the request is over, and others must not end with it
        return ""
