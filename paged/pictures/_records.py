"""What pictures of serving are drawn from: records of steps, wherever they come from."""

from collections.abc import Sequence
from typing import Any

from paged.runtime import Engine, StepRecord, StepReport

# What `pool` and `steps` accept.
Source = Engine | Sequence[StepRecord] | Sequence[StepReport]


def records_of(source: Any) -> list[StepRecord]:
    """The records of an engine that records, or of a list of records or reports.

    **Raises:** ``ValueError`` for an engine that does not record and for no step, and ``TypeError`` for anything else.
    """
    found = source.records if isinstance(source, Engine) else list(source)
    if not found:
        raise ValueError("There is no step to draw. An engine records the steps that run after it was made.")
    records = [_record_of(one, before) for before, one in zip([None, *found], found, strict=False)]
    wrong = [one for one in records if not isinstance(one, StepRecord)]
    if wrong:
        raise TypeError(f"Steps are paged.runtime.StepRecord or StepReport, or an Engine; got {wrong[0]!r}.")
    return records


def _record_of(one: Any, before: Any) -> Any:
    """A record as it is; or what a report of `generate` says, after the report ``before`` it.

    Of a pool in groups a report has the shared and the cached pages of all groups together.
    """
    if not isinstance(one, StepReport):
        return one
    groups = one.groups
    shared, cached = [0] * len(groups), [0] * len(groups)
    if len(groups) == 1:
        shared, cached = [one.pages_shared], [one.pages_cached]
    # Of those that ran and have not ended, who has no slot has given it up.
    stays = before.rows.keys() - set(before.ended) if isinstance(before, StepReport) else set()
    return StepRecord(
        rows=one.rows,
        prompts=one.prompts,
        drawn={place: len(tokens) for place, tokens in one.drawn.items()},
        ended=one.ended,
        preempted=tuple(sorted(stays - one.rows.keys())),
        waiting=one.waiting,
        pages=tuple(group.num_pages for group in groups),
        used=tuple(group.pages_in_use for group in groups),
        shared=tuple(shared),
        cached=tuple(cached),
    )
