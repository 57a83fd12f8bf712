"""Which lowering runs: the candidates of a target, in order of preference, and what each refuses."""

from paged.spec import PageLayout

from .lowering import Lowering
from .program import Program
from .schedule import Schedule
from .xla import XLA_BLOCKS

# In order of preference. A new lowering is one more entry.
LOWERINGS: tuple[Lowering, ...] = (XLA_BLOCKS,)
TARGETS = ("auto", "tpu", "xla")


def refusals(program: Program, layout: PageLayout, target: str = "auto") -> dict[str, str | None]:
    """For each candidate of a target, by name: why it does not take the program, or None when it does."""
    return {low.name: low.refuses(program, layout) for low in LOWERINGS if target in ("auto", low.target)}


def select(program: Program, layout: PageLayout, target: str, schedule: Schedule | None = None) -> Lowering:
    """The first candidate that takes the program, or the one that the schedule names.

    Raises ``ValueError`` with every candidate's reason when there is none.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}; got {target!r}.")
    reasons = refusals(program, layout, target)
    if schedule is not None and schedule.lowering not in reasons:
        raise ValueError(
            f'The schedule is for the lowering "{schedule.lowering}", which target "{target}" does not have; it has '
            f"{sorted(reasons) or 'none'}."
        )
    wanted = reasons if schedule is None else {schedule.lowering: reasons[schedule.lowering]}
    for lowering in LOWERINGS:
        if lowering.name in wanted and wanted[lowering.name] is None:
            return lowering
    why = "; ".join(f"{name}: {reason}" for name, reason in wanted.items()) or "it has no lowerings yet"
    others = sorted({low.target for low in LOWERINGS if low.refuses(program, layout) is None})
    raise ValueError(f'No lowering takes this spec on target "{target}": {why}. Targets that take it: {others}.')
