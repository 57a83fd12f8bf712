"""Which masks a model's attentions have, and whether its prompts may be served in chunks under them."""

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from paged.lower import Attend, ShardedAttend, first_rows, may_cut, seen_ahead
from paged.spec import Mask

from ._scheduler import Request


def masks_of(model: Any) -> list[Mask]:
    """The masks of all lowered attentions that a model holds.

    Looks into fields, static ones too, into containers, partial functions, bound methods, closures and what a
    decorator has wrapped. It does not look into global variables of functions.
    """
    masks: dict[Mask, None] = {}
    seen: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, Attend | ShardedAttend):
            masks[part.spec.visibility] = None
        else:
            waiting.extend(_parts(part))
    return list(masks)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, type):
        return ()
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)]
    if not callable(value):
        return ()
    parts = [getattr(value, name, None) for name in ("__self__", "__wrapped__")]
    parts += inspect.getclosurevars(value).nonlocals.values() if inspect.isfunction(value) else []
    parts += [value.func, *value.args, *value.keywords.values()] if isinstance(value, functools.partial) else []
    return [*parts, *getattr(value, "__dict__", {}).values()]


def require_chunks(masks: Sequence[Mask], requests: Sequence[Request], chunk_size: int) -> None:
    """Raise ``ValueError`` where a mask sees past a chunk of a prompt, or from before sees a token that is generated.

    Then every row sees in its step all that it would see if the whole sequence were computed at once; so chunks and
    preemption change nothing.
    """
    longest = max((request.most_cached for request in requests), default=0)
    for mask in masks:
        first = first_rows(mask, longest)
        if np.array_equal(first, np.arange(longest)):
            continue
        cuts = [may_cut(first[: request.most_cached]) for request in requests]
        for request, may in zip(requests, cuts, strict=True):
            prompt, end = len(request.prompt), request.most_cached
            steps = [*range(chunk_size, prompt, chunk_size), *range(prompt, end)]
            cut = next((step for step in steps if not may[step]), None)
            if cut is not None:
                row, key = seen_ahead(first[:end], cut)
                raise ValueError(_sees_ahead(mask, request, requests, cuts, chunk_size, cut, row, key))


def _sees_ahead(
    mask: Mask,
    request: Request,
    requests: Sequence[Request],
    cuts: Sequence[np.ndarray],
    chunk_size: int,
    cut: int,
    row: int,
    key: int,
) -> str:
    prompt = f"prompts[{request.index}]"
    if key >= len(request.prompt):
        return (
            f"{prompt} has {len(request.prompt)} tokens, and the mask {mask} of a layer sees ahead: token {row} sees "
            f"token {key}, which is generated when token {row} has been computed already. Let the mask hide generated "
            "tokens from those before them, shorten a prefix to the prompt, or pass max_new_tokens=1."
        )
    is_bad = np.zeros(max(len(other.prompt) for other in requests), bool)
    for other, may in zip(requests, cuts, strict=True):
        is_bad[: len(other.prompt)] |= ~may[: len(other.prompt)]
    enough = next(size for size in range(chunk_size + 1, len(is_bad) + 1) if not is_bad[size::size].any())
    return (
        f"chunk_size={chunk_size} cuts {prompt} after {cut} tokens, and the mask {mask} of a layer sees ahead: token "
        f"{row} sees token {key}, which a later chunk writes. Pass chunk_size={enough}."
    )
