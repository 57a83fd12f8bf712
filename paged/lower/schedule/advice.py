"""`Advice`: what contexts and tuning files said when an attention was lowered: a value, part of what is traced."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from paged.spec import PageLayout

from ..base import Schedule
from ..program import Call, Program
from .context import sources
from .file import Entry
from .key import Key
from .text import program_text
from .warning import warn_once


class Proposal(NamedTuple):
    """A schedule, who proposes it, and whether it is an error when it cannot run, rather than passed over."""

    source: str
    schedule: Schedule
    is_binding: bool


@dataclasses.dataclass(frozen=True)
class Said:
    """What one source says: one schedule for every call, or a tuning file's entries for one program and layout."""

    source: str
    schedule: Schedule | None = None
    entries: tuple[Entry, ...] = ()


@dataclasses.dataclass(frozen=True)
class Advice:
    """What was said, that of the first to be heeded first. It is kept as it was when `lower` was called, so that a
    cached trace never differs from what a new one would be. ``devices`` are kinds, None for this process's own."""

    said: tuple[Said, ...] = ()
    devices: tuple[str, ...] | None = None

    @classmethod
    def now(cls, program: Program, layout: PageLayout) -> "Advice":
        """What contexts and the file say of a program over a layout at this moment."""
        said = []
        for name, source in sources():
            if isinstance(source, Schedule):
                said.append(Said(name, source))
                continue
            every = source.entries()
            subject = (program_text(program), str(layout)) if every else None
            entries = tuple(entry for entry in every if (entry.key.program, entry.key.layout) == subject)
            said += [Said(name, entries=entries)] if entries else []
        return cls(tuple(said))

    def on(self, devices: tuple[str, ...]) -> "Advice":
        """The same for another device, of any of these kinds."""
        return dataclasses.replace(self, devices=devices)

    def for_any_call(self, lowering: str) -> Proposal | None:
        """What is said of a lowering whatever the call."""
        found = (s for s in self.said if s.schedule is not None and s.schedule.lowering == lowering)
        said = next(found, None)
        return None if said is None or said.schedule is None else Proposal(said.source, said.schedule, True)

    def proposals(
        self, program: Program, layout: PageLayout, lowerings: Sequence[str], call: Call
    ) -> Iterator[Proposal]:
        """What is said of one call, in order. Entries that hold no schedule are warned of, and those that would be for
        this call if they were not of another device or version."""
        for said in self.said:
            if said.schedule is not None:
                yield Proposal(said.source, said.schedule, True)
                continue
            keys = [Key.of(program, layout, lowerings, call, device) for device in self.devices or (None,)]
            exact = [entry for entry in said.entries if entry.key in keys]
            for entry in exact:
                try:
                    yield Proposal(said.source, entry.parsed(), False)
                except (ValueError, TypeError) as error:
                    warn_once(f"An entry of {said.source} is passed over: {error} It is for {entry.key}.")
            if not exact and self.devices is None:
                _warn_of_others(said, keys[0])


NO_ADVICE = Advice()


def _warn_of_others(said: Said, key: Key) -> None:
    """Say that this very call was tuned, elsewhere."""
    for entry in said.entries:
        if entry.key.subject == key.subject:
            warn_once(
                f"The {said.source} has a schedule for this call, tuned on {_origin(entry.key)}. Here is "
                f"{_origin(key)}: it is passed over. Tune again to have one."
            )


def _origin(key: Key) -> str:
    return f"{key.device!r} with paged {key.paged} and jax {key.jax}"
