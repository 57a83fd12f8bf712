"""`StepReport`: what ``on_step`` is told of each step of `generate`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ._groups import GroupUsage


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step of the model, as ``on_step`` sees it.

    * ``kind``: ``"prefill"`` where the step has rows of prompts; or ``"decode"``, where every sequence has one row or
      none.
    * ``tokens``: how many tokens the step put into pages.
    * ``new_tokens``: how many generated tokens it added to sequences.
    * ``pages_in_use``: the pages of sequences while it ran, in the group of layers that has most of them.
    * ``running``, ``waiting``: running sequences and waiting ones while it ran.
    * ``drawn``: the tokens that it added to sequences, by the place of their result: the index of their prompt, where
      each has one sample. So text can be shown as it comes.
    * ``ended``: the places of the results whose sequences it ended.
    * ``pages_freed``: pages that masks hide from every later query of their sequence, which gave them up before it, in
      all groups. The prefix cache may keep them.
    * ``groups``: what each group of layers holds, see `GroupUsage`.
    * ``tokens_reused``: tokens of sequences that began with it and that were found in the prefix cache, so that no step
      computes them.
    * ``pages_shared``: pages that several sequences held while it ran, in all groups.
    * ``pages_copied``: pages that it copied because several held them.
    * ``pages_cached``, ``pages_evicted``: pages that only the prefix cache held while it ran, and those that the cache
      gave up for it, in all groups.
    * ``prompt_tokens``: those of ``tokens`` that are prompts', or of sequences that are prefilled again.
    * ``rows``: how many of ``tokens`` each running sequence had, by the place of its result; 0 where it had to wait.
    * ``prompts``: the places whose rows were of a prompt, or of a sequence that is prefilled again.

    ``paged.pictures.pool`` and ``paged.pictures.steps`` draw a list of reports.
    """

    kind: Literal["prefill", "decode"]
    tokens: int
    new_tokens: int
    pages_in_use: int
    running: int
    waiting: int
    drawn: Mapping[int, tuple[int, ...]]
    ended: tuple[int, ...]
    pages_freed: int = 0
    groups: tuple[GroupUsage, ...] = ()
    tokens_reused: int = 0
    pages_shared: int = 0
    pages_copied: int = 0
    pages_cached: int = 0
    pages_evicted: int = 0
    prompt_tokens: int = 0
    rows: Mapping[int, int] = dataclasses.field(default_factory=dict)
    prompts: tuple[int, ...] = ()


def report_of(
    figures: Any,
    step: int,
    drawn: Mapping[int, tuple[int, ...]],
    ended: Sequence[int],
    idle: Sequence[GroupUsage],
    out_of_use: Sequence[int],
    places: Mapping[int, int],
) -> StepReport:
    """The report of one step of a launch.

    **Arguments:**

    - `figures`: the `StepFigures` of all its steps, on the host.
    - `step`: which step.
    - `drawn`, `ended`: as in the report.
    - `idle`: each group with no page in use.
    - `out_of_use`: how many pages of each group nobody may use.
    - `places`: of the results, by the rows of their requests in the table.
    """
    held, shared, cached, trimmed = figures.pages[step].tolist()
    held = [own - other for own, other in zip(held, out_of_use, strict=True)]
    slots = np.flatnonzero(figures.request[step] >= 0)
    running = [places[row] for row in figures.request[step, slots].tolist()]
    is_prompt = figures.is_prompt[step, slots]
    groups = tuple(
        dataclasses.replace(group, pages_in_use=used, pages_trimmed=freed)
        for group, used, freed in zip(idle, held, trimmed, strict=True)
    )
    return StepReport(
        kind="prefill" if figures.prompt_rows[step] else "decode",
        tokens=int(figures.rows[step]),
        new_tokens=sum(map(len, drawn.values())),
        pages_in_use=max(held),
        running=int(figures.running[step]),
        waiting=int(figures.waiting[step]),
        drawn=drawn,
        ended=tuple(ended),
        pages_freed=int(figures.freed[step]),
        groups=groups,
        tokens_reused=int(figures.reused[step]),
        pages_shared=sum(shared),
        pages_copied=int(figures.copied[step]),
        pages_cached=sum(cached),
        pages_evicted=int(figures.evicted[step]),
        prompt_tokens=int(figures.prompt_rows[step]),
        rows=dict(zip(running, figures.slot_rows[step, slots].tolist(), strict=True)),
        prompts=tuple(place for place, own in zip(running, is_prompt, strict=True) if own),
    )
