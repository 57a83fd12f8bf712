"""`Hints`: what a caller says of a kernel, made into the schedule of the kernel that runs."""

import dataclasses
from typing import Any, NamedTuple

from paged.lower import Attend, Call, Lowering, Schedule, lower
from paged.spec import AttentionSpec, PageLayout

MEGACORE_MODES = (None, "batch", "kv_head")
_KERNELS = "tpu"  # the target that has kernels


class Hint(NamedTuple):
    """One argument, its value, and the field of a schedule that it sets."""

    argument: str
    field: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Hints:
    """Hints of one call; none by default."""

    given: tuple[Hint, ...] = ()
    vmem_limit_bytes: int | None = None

    @classmethod
    def of(cls, *hints: Hint, vmem_limit_bytes: int | None = None) -> "Hints":
        """Those that say something: whose value is not None."""
        return cls(tuple(hint for hint in hints if hint.value is not None), vmem_limit_bytes)

    def narrowed(self, lowering: Lowering) -> Lowering:
        """The lowering with no more vector memory than the limit."""
        return lowering if self.vmem_limit_bytes is None else lowering.within_vmem(self.vmem_limit_bytes)

    def schedule(self, attend: Attend, call: Call) -> tuple[Lowering, Schedule | None]:
        """What runs in this call, with its schedule where hints had a say.

        Raises ``ValueError`` naming the argument, where a kernel runs that cannot honour it.
        """
        program, layout = attend.program, attend.layout
        lowering, _ = attend.choose(call)
        if lowering.target != _KERNELS:
            return lowering, None
        lowering = self.narrowed(lowering)
        reason = lowering.refuses(program, layout, call)
        if reason is not None:
            raise ValueError(f"vmem_limit_bytes={self.vmem_limit_bytes} is too little: {reason}.")
        own = lowering.schedule(program, layout, call)
        for hint in self.given:
            if hint.field not in lowering.choices:
                raise ValueError(
                    f"{hint.argument}={hint.value!r} cannot be honoured: the kernel {lowering.name}, which takes this "
                    f"call, has no {hint.field}. Leave it out."
                )
        schedule = own.replace(**{hint.field: hint.value for hint in self.given})
        reason = lowering.cannot_honour(program, layout, call, schedule)
        if reason is not None:
            said = ", ".join(f"{hint.argument}={hint.value!r}" for hint in self.given)
            raise ValueError(f"The kernel that {said or 'the call'} asks for, {schedule}, cannot run: {reason} The "
                             f"nearest that can: {own}.")  # fmt: skip
        return lowering, schedule


def megacore_mode_of(value: Any) -> None:
    """Check a mode. ``"batch"`` and None are what kernels do anyway: sequences are shared by what cores there are."""
    if value not in MEGACORE_MODES:
        raise ValueError(f"megacore_mode must be one of {MEGACORE_MODES}; got {value!r}.")
    if value == "kv_head":
        raise ValueError(
            'megacore_mode="kv_head" cannot be honoured: kernels here share sequences between the cores of a chip, not '
            'KV heads. "batch" says so, and None leaves it to the chip: both cores wherever there are two.'
        )


def lowered(target: str, interpret: Any, hints: Hints, spec: AttentionSpec, layout: PageLayout, call: Call) -> Attend:
    """The attention that runs in this call, hints heeded."""
    attend = lower(spec, layout, target, interpret=interpret)
    if hints == Hints():
        return attend
    lowering, schedule = hints.schedule(attend, call)
    return attend if schedule is None else dataclasses.replace(attend, lowerings=(lowering,), pinned=schedule)
