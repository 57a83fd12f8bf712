"""`explain`: what a call will run, why not something else, and which pages and bytes it touches."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from paged.spec import PageLayout, RaggedBatch

from ._pages_seen import pages_seen
from .base import Lowering, Schedule
from .program import Call, Program
from .registry import LOWERINGS
from .schedule import HEURISTIC, Choice

# What draws an explanation. Pictures import lowerings, and not the other way round: the door brings both together.
_PAGE_OF: list[Callable[[Any], Any]] = []


def draw_with(page_of: Callable[[Any], Any]) -> None:
    """Let `Explanation.show` draw with this function, which makes a page of an explanation."""
    _PAGE_OF.append(page_of)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The answer of `explain`. Print it to read it; the fields are for tests and tools.

    * ``program``, ``layout``: the attention in normal form, and the pages that it is over.
    * ``schedule``: the schedule that runs, which names its lowering.
    * ``source``: who picked the schedule: "explicit" (the caller), "hints, ..." (arguments of `paged.compat`),
      "context", "tuning file <name>", or "heuristic".
    * ``refused``: for every other lowering that refuses the call, its reason.
    * ``pages_visited``: the pages that the rows of a sequence may see, summed over live sequences. Each page is read at
      least once. None without a batch.
    * ``pages_held``: the pages that the tokens of live sequences fill. None without a batch.
    * ``pages_freed``: those of them that the table does not have: `PagePool.trim` has freed them, because the mask
      hides them from every query to come. None without a batch.
    * ``notes``: lines of the lowering about memory and time.
    * ``lowering``, ``call``, ``batch``: what runs, the shapes of the call, and its batch. None without a batch, and of
      an attention on many devices.
    """

    program: Program
    layout: PageLayout
    schedule: Schedule
    refused: dict[str, str]
    pages_visited: int | None
    pages_held: int | None
    notes: tuple[str, ...] = ()
    source: str = HEURISTIC
    pages_freed: int | None = None
    lowering: Lowering | None = dataclasses.field(default=None, repr=False)
    call: Call | None = dataclasses.field(default=None, repr=False)
    batch: RaggedBatch | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def bytes_saved(self) -> int | None:
        """Bytes of keys and values in the pages that were freed, without scales. None without a batch."""
        return None if self.pages_freed is None else self.pages_freed * self.layout.bytes_per_page

    @property
    def bytes_visited(self) -> int | None:
        """Bytes of keys and values in the visited pages, without scales. None without a batch."""
        return None if self.pages_visited is None else self.pages_visited * self.layout.bytes_per_page

    def show(self, path: str | os.PathLike | None = None) -> Any:
        """Draw the explanation on one page of HTML that stands alone: heads, mask, pages and schedule.

        **Arguments:**

        - `path`: the file to write it to. None for no file.

        **Returns:** the `paged.pictures.Page`: a notebook shows it, ``print`` prints it as text, and ``html`` is the
        page. Without a batch, and for an attention on many devices, it has the heads and the mask.

        >>> attend = lower(AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8), PageLayout(page_size=2,
        ...     num_kv_heads=2, head_dim=8))
        >>> len(attend.explain().show().pictures)
        2
        """
        page = _PAGE_OF[-1](self)
        if path is not None:
            page.save(path)
        return page

    def __str__(self) -> str:
        lines = [str(self.program), f"over {self.layout}", f"runs as {self.schedule} (from: {self.source})"]
        lines += [f"not as {name}: {reason}" for name, reason in self.refused.items()]
        if self.pages_visited is not None and self.pages_held is not None:
            skipped = self.pages_held - self.pages_visited
            mebibytes = (self.bytes_visited or 0) / 2**20
            lines += [
                f"visits {self.pages_visited} pages ({mebibytes:.2f} MiB) and skips {skipped} of {self.pages_held}"
            ]
        if self.pages_freed:
            lines.append(f"{self.pages_freed} pages ({(self.bytes_saved or 0) / 2**20:.2f} MiB) were freed by the mask")
        return "\n".join([*lines, *self.notes])


def explain(
    program: Program,
    layout: PageLayout,
    choice: Choice,
    call: Call | None = None,
    batch: RaggedBatch | None = None,
) -> Explanation:
    """See `Attend.explain`. With a call there is a batch too."""
    lowering, schedule, source = choice
    reasons = {low.name: low.refuses(program, layout, call) for low in LOWERINGS if low.name != lowering.name}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if call is None or batch is None:
        return Explanation(program, layout, schedule, refused, None, None, source=source)
    sizes = {"tokens": call.tokens, "page_size": layout.page_size, "num_pages": call.num_pages}
    seen = pages_seen(program, batch, **sizes)
    visited, held, freed = (int(np.sum(x)) for x in (seen.some, seen.is_filled, seen.is_freed))
    notes = lowering.describe(program, layout, call, schedule, visited * layout.bytes_per_page)
    counts = {"pages_visited": visited, "pages_held": held, "pages_freed": freed}
    call_facts: dict[str, Any] = {"lowering": lowering, "call": call, "batch": batch}
    return Explanation(program, layout, schedule, refused, **counts, notes=tuple(notes), source=source, **call_facts)
