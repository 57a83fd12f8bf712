"""Which masks a model's attentions have, and whether its prompts may be served in chunks under them."""

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from paged.lower import Attend, ShardedAttend
from paged.spec import AttentionSpec, Mask

from ._asked import Asked
from ._cuts import AheadMasks
from .cache import PagedCache


def specs_of(model: Any) -> list[AttentionSpec]:
    """The specs of all lowered attentions that a model holds.

    Looks into fields, static ones too, into containers, partial functions, bound methods, closures and what a
    decorator has wrapped. It does not look into global variables of functions.
    """
    return list(dict.fromkeys(attend.spec for attend in _found(model, Attend | ShardedAttend)))


def caches_of(model: Any) -> list[PagedCache]:
    """The `PagedCache`s that a model holds, found as `specs_of` finds attentions."""
    return list(_found(model, PagedCache))


def _found(model: Any, kinds: Any) -> Iterator[Any]:
    seen: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, kinds):
            yield part
        else:
            waiting.extend(_parts(part))


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


def set_cuts(masks: Sequence[Mask], requests: Sequence[Asked], chunk_size: int) -> None:
    """Set each request's ``cuts``: where its tokens may be cut, so that no row sees what a later step writes.

    Then every row sees in its step all that it would see if the whole sequence were computed at once; so chunks and
    preemption change nothing. Raises ``ValueError`` where a mask needs a larger chunk, or sees from before a token that
    is generated.
    """
    ahead = AheadMasks.of(masks, max((request.most_cached for request in requests), default=0))
    found = [ahead.cuts(f"prompts[{r.index}]", len(r.prompt), r.most_cached, r.values) for r in requests]
    # The prompt with the longest piece goes first: its error names a chunk that is enough for all.
    for request, cuts in sorted(zip(requests, found, strict=True), key=lambda pair: -pair[1].longest):
        request.cuts = cuts.within(chunk_size, f"Pass chunk_size={cuts.longest}.")
