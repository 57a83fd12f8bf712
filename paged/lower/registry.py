"""Which lowerings there are: the candidates of a target in order of preference, and why each refuses a program."""

import jax

from paged.spec import PageLayout

from .base import Lowering, Schedule
from .gpu import GPU_DECODE
from .program import Call, Program
from .tpu import TPU_DECODE, TPU_RAGGED, Chip
from .xla import XLA_BLOCKS

# In order of preference. A new lowering is one more entry; its target is then accepted by `lower`.
LOWERINGS: tuple[Lowering, ...] = (TPU_DECODE, TPU_RAGGED, GPU_DECODE, XLA_BLOCKS)
TARGETS = ("auto", *sorted({low.target for low in LOWERINGS}))


def refusals(
    program: Program, layout: PageLayout, target: str = "auto", call: Call | None = None
) -> dict[str, str | None]:
    """Why each lowering of a target refuses a program, by the lowering's name; None for one that accepts it.

    **Arguments:**

    - `program`, `layout`: what is to be lowered.
    - `target`: one of `TARGETS`; ``"auto"`` stands for every target.
    - `call`: the shapes of a call; None for the reasons that hold for any call.
    """
    return {low.name: low.refuses(program, layout, call) for low in LOWERINGS if target in ("auto", low.target)}


def select(program: Program, layout: PageLayout, target: str, schedule: Schedule | None = None) -> tuple[Lowering, ...]:
    """The lowerings of a target that accept a program, in order of preference; with a schedule, the one that it names.

    ``"auto"`` stands for the lowerings that run on this process's default backend. Raises ``ValueError`` when none
    accepts the program, with the reason of each, and when the target does not have the schedule's lowering.
    """
    candidates = _candidates(target)
    if schedule is not None:
        names = sorted(low.name for low in candidates)
        candidates = [low for low in candidates if low.name == schedule.lowering]
        if not candidates:
            others = [f'target="{low.target}"' for low in LOWERINGS if low.name == schedule.lowering]
            raise ValueError(
                f'The schedule is for the lowering "{schedule.lowering}", which target "{target}" does not have here; '
                f"it has {names}. Pass {' or '.join(others)}."
            )
    takers = tuple(low for low in candidates if low.refuses(program, layout) is None)
    if takers:
        return takers
    why = "; ".join(f"{low.name}: {low.refuses(program, layout)}" for low in candidates)
    others = sorted({low.target for low in LOWERINGS if low.refuses(program, layout) is None})
    raise ValueError(f'No lowering takes this spec on target "{target}": {why}. Targets that take it: {others}.')


def select_write(layout: PageLayout, target: str) -> Lowering:
    """The preferred lowering of a target that writes pages of a layout. Raises ``ValueError`` when there is none."""
    candidates = _candidates(target)
    for lowering in candidates:
        if lowering.refuses_write(layout) is None:
            return lowering
    why = "; ".join(f"{low.name}: {low.refuses_write(layout)}" for low in candidates)
    others = sorted({low.target for low in LOWERINGS if low.refuses_write(layout) is None})
    raise ValueError(f'No lowering writes these pages on target "{target}": {why}. Targets that do: {others}.')


def device_kinds(generation: str | Chip) -> tuple[str, ...]:
    """JAX's names for the devices of a generation of chips. Raises ``ValueError`` that lists the known generations."""
    if isinstance(generation, Chip):
        return generation.device_kinds
    known = {name: kinds for low in LOWERINGS for name, kinds in low.generations.items()}
    if not isinstance(generation, str) or generation not in known:
        raise ValueError(f"generation must be one of {sorted(known)}; got {generation!r}.")
    return known[generation]


def _candidates(target: str) -> list[Lowering]:
    if not isinstance(target, str) or target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}; got {target!r}.")
    return [low for low in LOWERINGS if target == low.target or (target == "auto" and _runs_here(low))]


def _runs_here(lowering: Lowering) -> bool:
    return lowering.target in ("xla", jax.default_backend()) and not lowering.by_name_only
