"""`Hints`: what a caller says of a kernel, made into the schedule of the kernel that runs."""

import dataclasses
from typing import Any, NamedTuple, Self

from paged.lower import Attend, Call, Lowering, Schedule, ShardedAttend, lower
from paged.spec import AttentionSpec, PageLayout

from .devices import Devices
from .number import flag, integer

MEGACORE_MODES = (None, "batch", "kv_head")
_KERNELS = "tpu"  # the target that has kernels


class Hint(NamedTuple):
    """One argument, its value, and the field of a schedule that it sets."""

    argument: str
    field: str
    value: Any


class Hints(NamedTuple):
    """Hints of one call; none by default."""

    given: tuple[Hint, ...] = ()
    vmem_limit_bytes: int | None = None

    @classmethod
    def of_decode(cls, num_splits: Any, pages_per_compute_block: Any, megacore_mode: Any, inline_seq_dim: Any) -> Self:
        """Those of `page_attention`. ``"batch"`` and None are what kernels do anyway, and say nothing."""
        if megacore_mode not in MEGACORE_MODES:
            raise ValueError(f"megacore_mode must be one of {MEGACORE_MODES}; got {megacore_mode!r}.")
        if megacore_mode == "kv_head":
            raise ValueError(
                'megacore_mode="kv_head" cannot be honoured: kernels here share sequences between the cores of a chip, '
                'not KV heads. "batch" says so, and None leaves it to the chip: both cores wherever there are two.'
            )
        splits = integer("num_splits", num_splits, 0)
        return cls(
            _said(
                Hint("num_splits", "kv_splits", splits or None),
                _positive("pages_per_compute_block", "pages_per_block", pages_per_compute_block),
                Hint("inline_seq_dim", "sequence", None if flag("inline_seq_dim", inline_seq_dim) else "grid"),
            )
        )

    @classmethod
    def of_ragged(
        cls, vmem_limit_bytes: Any, num_kv_pages_per_block: Any = None, num_queries_per_block: Any = None
    ) -> Self:
        """Those of the ragged entry points."""
        if vmem_limit_bytes is None and num_kv_pages_per_block is None and num_queries_per_block is None:
            return cls()
        hints = (
            _positive("num_kv_pages_per_block", "pages_per_block", num_kv_pages_per_block),
            _positive("num_queries_per_block", "rows_per_tile", num_queries_per_block),
        )
        return cls(_said(*hints), _positive("vmem_limit_bytes", "", vmem_limit_bytes).value)

    def narrowed(self, lowering: Lowering) -> Lowering:
        """The lowering with no more vector memory than the limit."""
        return lowering if self.vmem_limit_bytes is None else lowering.within_memory(self.vmem_limit_bytes)

    def schedule(self, attend: Attend, call: Call) -> tuple[Lowering, Schedule | None]:
        """What runs in this call, with its schedule where hints had a say.

        Raises ``ValueError`` naming the argument, where a kernel runs that cannot honour it.
        """
        program, layout = attend.program, attend.layout
        lowering = attend.choice(call).lowering
        if lowering.target != _KERNELS:
            return lowering, None
        lowering = self.narrowed(lowering)
        reason = lowering.refuses(program, layout, call)
        if reason is not None:
            raise ValueError(f"vmem_limit_bytes={self.vmem_limit_bytes} is too little: {reason}.")
        own = lowering.schedule(program, layout, call)
        fields = {field.name for field in dataclasses.fields(own)}
        for hint in self.given:
            if hint.field not in fields:
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


def lowered(target: str, interpret: Any, hints: Hints, spec: AttentionSpec, layout: PageLayout, call: Call) -> Attend:
    """The attention that runs in this call, hints heeded; remembered, for calls that are not jitted."""
    return _heeding(lower(spec, layout, target, interpret=interpret), hints, call)


def lowered_on(
    devices: Devices, target: str, interpret: Any, hints: Hints, spec: AttentionSpec, layout: PageLayout, call: Call
) -> ShardedAttend:
    """The same on a mesh; each device heeds the hints in its part of the call."""
    attend = devices.lowered(spec, layout, target, interpret)
    call = dataclasses.replace(call, num_pages=call.num_pages // attend.shares.context)
    return dataclasses.replace(attend, first_device=_heeding(attend.first_device, hints, call))


def _heeding(attend: Attend, hints: Hints, call: Call) -> Attend:
    if hints == Hints():
        return attend
    lowering, schedule = hints.schedule(attend, call)
    return attend if schedule is None else dataclasses.replace(attend, lowerings=(lowering,), pinned=schedule)


def _positive(argument: str, field: str, value: Any) -> Hint:
    return Hint(argument, field, None if value is None else integer(argument, value, 1))


def _said(*hints: Hint) -> tuple[Hint, ...]:
    """Those that say something."""
    return tuple(hint for hint in hints if hint.value is not None)
