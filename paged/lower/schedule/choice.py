"""`choose`: which lowering runs a call, with which schedule, and who picked that schedule."""

from typing import NamedTuple

from paged.spec import PageLayout

from ..base import Lowering, Schedule
from ..program import Call, Program
from .advice import Advice, Proposal
from .warning import warn_once

EXPLICIT, HEURISTIC, PLANNED = "explicit", "heuristic", "plan"


class Choice(NamedTuple):
    """What runs a call: a lowering and its schedule.

    ``source`` is who picked the schedule. From the highest precedence to the lowest: "explicit" (``schedule=``) or
    "hints, ..." (the arguments of `paged.compat`), "context", "context, tuning file <name>", "tuning file <name>",
    "heuristic" (the lowering itself). A call with a plan runs as was planned: "plan".
    """

    lowering: Lowering
    schedule: Schedule
    source: str


def choose(
    program: Program,
    layout: PageLayout,
    lowerings: tuple[Lowering, ...],
    pinned: Schedule | None,
    advice: Advice,
    call: Call,
    pinned_by: str = EXPLICIT,
) -> Choice:
    """What runs a call of these shapes: the first proposed schedule that its lowering can run, else the heuristic's.

    ``pinned`` is the caller's own schedule, and ``pinned_by`` says how the caller gave it. Raises ``ValueError`` when
    no lowering accepts the call, and when a schedule that the caller or a context gave cannot run. A tuning file's that
    cannot run is ignored with a warning.
    """
    reasons = {lowering.name: lowering.refuses(program, layout, call) for lowering in lowerings}
    takers = {lowering.name: lowering for lowering in lowerings if reasons[lowering.name] is None}
    if not takers:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f'No lowering takes this call: {why}. target="auto" and target="xla" take any call.')
    proposals = advice.proposals(program, layout, [lowering.name for lowering in lowerings], call)
    for proposal in proposals if pinned is None else [Proposal(pinned_by, pinned, True)]:
        lowering = takers.get(proposal.schedule.lowering)
        if lowering is None:
            continue
        reason = lowering.cannot_honour(program, layout, call, proposal.schedule)
        if reason is None:
            return Choice(lowering, proposal.schedule, proposal.source)
        told = f"The schedule {proposal.schedule} cannot run: {reason}"
        if proposal.is_binding:
            raise ValueError(f"{told} The nearest that can: {lowering.schedule(program, layout, call)}.")
        warn_once(f"{told} It comes from the {proposal.source}, and is ignored.")
    first = next(iter(takers.values()))
    return Choice(first, first.schedule(program, layout, call), HEURISTIC)


def choose_for_any_call(
    program: Program,
    layout: PageLayout,
    lowering: Lowering,
    pinned: Schedule | None,
    advice: Advice,
    pinned_by: str = EXPLICIT,
) -> Choice:
    """What runs a common call, whose shapes are not known."""
    if pinned is not None:
        return Choice(lowering, pinned, pinned_by)
    proposal = advice.for_any_call(lowering.name)
    if proposal is not None:
        return Choice(lowering, proposal.schedule, proposal.source)
    return Choice(lowering, lowering.schedule(program, layout), HEURISTIC)
