"""`Advice`: the schedules that contexts and tuning files proposed when an attention was lowered."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from paged.spec import PageLayout

from ..base import Schedule
from ..program import Call, Program
from .context import sources_in_force
from .file import Entry
from .key import Key
from .text import program_text
from .warning import warn_once


class Proposal(NamedTuple):
    """A proposed schedule, and the name of its source. If it cannot run that is an error where the proposal is binding,
    and otherwise the proposal is ignored with a warning."""

    source: str
    schedule: Schedule
    is_binding: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of schedules: one ``schedule`` for every call, or a tuning file's ``entries`` for one program and
    layout. ``name`` is what `explain` calls the source."""

    name: str
    schedule: Schedule | None = None
    entries: tuple[Entry, ...] = ()


@dataclasses.dataclass(frozen=True)
class Advice:
    """Proposed schedules, highest precedence first, as they were when `lower` was called.

    They are part of the lowered attention's value, so that a cached trace never differs from a new one. ``devices`` are
    the kinds of device that a tuning file is asked for; None for this process's own.
    """

    sources: tuple[Source, ...] = ()
    devices: tuple[str, ...] | None = None

    @classmethod
    def now(cls, program: Program, layout: PageLayout) -> "Advice":
        """What contexts and the tuning file propose at this moment for a program over a layout."""
        found = []
        for name, source in sources_in_force():
            if isinstance(source, Schedule):
                found.append(Source(name, source))
                continue
            entries = source.entries()
            subject = (program_text(program), str(layout)) if entries else None
            entries = tuple(entry for entry in entries if (entry.key.program, entry.key.layout) == subject)
            found += [Source(name, entries=entries)] if entries else []
        return cls(tuple(found))

    def on(self, devices: tuple[str, ...]) -> "Advice":
        """This advice for a device of any of these kinds."""
        return dataclasses.replace(self, devices=devices)

    def for_any_call(self, lowering: str) -> Proposal | None:
        """The proposal for a lowering that does not depend on the call, or None."""
        for source in self.sources:
            if source.schedule is not None and source.schedule.lowering == lowering:
                return Proposal(source.name, source.schedule, True)
        return None

    def proposals(
        self, program: Program, layout: PageLayout, lowerings: Sequence[str], call: Call
    ) -> Iterator[Proposal]:
        """Proposals for one call, in order of precedence.

        Warns of entries that do not parse, and of entries for this very call from another device or version.
        """
        for source in self.sources:
            if source.schedule is not None:
                yield Proposal(source.name, source.schedule, True)
                continue
            keys = [Key.of(program, layout, lowerings, call, device) for device in self.devices or (None,)]
            exact = [entry for entry in source.entries if entry.key in keys]
            for entry in exact:
                try:
                    yield Proposal(source.name, entry.parsed(), False)
                except (ValueError, TypeError) as error:
                    warn_once(f"An entry of the {source.name} is ignored: {error} It is for {entry.key}.")
            if not exact and self.devices is None:
                _warn_of_other_origins(source, keys[0])


NO_ADVICE = Advice()


def _warn_of_other_origins(source: Source, key: Key) -> None:
    """Warn of entries for this very call that come from another device or version."""
    for entry in source.entries:
        if entry.key.subject == key.subject:
            warn_once(
                f"The {source.name} has a schedule for this call, tuned on {_origin(entry.key)}. It is ignored here, "
                f"on {_origin(key)}. Tune again to have one."
            )


def _origin(key: Key) -> str:
    return f"{key.device!r} with paged {key.paged} and jax {key.jax}"
