"""`Hints`: arguments that describe a kernel, made into the schedule of the kernel that runs."""

import dataclasses
from typing import Any, NamedTuple

from paged.lower import Attend, Call, Lowering, Schedule, ShardedAttend, lower
from paged.spec import AttentionSpec, PageLayout

from .devices import Devices
from .number import flag, integer

MEGACORE_MODES = (None, "batch", "kv_head")
_KERNELS = "tpu"  # the target whose lowerings are kernels; hints change nothing on others


class Hint(NamedTuple):
    """One argument, the field of a schedule that it sets, and the value."""

    argument: str
    field: str
    value: Any


class Hints(NamedTuple):
    """The hints of one call; none by default."""

    given: tuple[Hint, ...] = ()
    vmem_limit_bytes: int | None = None

    @classmethod
    def of_decode(
        cls, num_splits: Any, pages_per_compute_block: Any, megacore_mode: Any, inline_seq_dim: Any
    ) -> "Hints":
        """The hints of `page_attention`. ``megacore_mode`` gives none: kernels do what ``"batch"`` and None ask for."""
        if megacore_mode not in MEGACORE_MODES:
            raise ValueError(f"megacore_mode must be one of {MEGACORE_MODES}; got {megacore_mode!r}.")
        if megacore_mode == "kv_head":
            raise ValueError(
                'megacore_mode="kv_head" cannot be honoured: kernels here divide sequences between the cores of a '
                'chip, not KV heads. "batch" and None use both cores of a chip that has two.'
            )
        splits = integer("num_splits", num_splits, 0)
        return cls(
            _set(
                Hint("num_splits", "kv_splits", splits or None),
                _positive("pages_per_compute_block", "pages_per_block", pages_per_compute_block),
                Hint("inline_seq_dim", "sequence", None if flag("inline_seq_dim", inline_seq_dim) else "grid"),
            )
        )

    @classmethod
    def of_ragged(
        cls, vmem_limit_bytes: Any, num_kv_pages_per_block: Any = None, num_queries_per_block: Any = None
    ) -> "Hints":
        """The hints of the ragged entry points."""
        if vmem_limit_bytes is None and num_kv_pages_per_block is None and num_queries_per_block is None:
            return cls()
        hints = (
            _positive("num_kv_pages_per_block", "pages_per_block", num_kv_pages_per_block),
            _positive("num_queries_per_block", "rows_per_tile", num_queries_per_block),
        )
        return cls(_set(*hints), _positive("vmem_limit_bytes", "", vmem_limit_bytes).value)

    def narrowed(self, lowering: Lowering) -> Lowering:
        """The lowering, using no more vector memory than the limit."""
        return lowering if self.vmem_limit_bytes is None else lowering.within_memory(self.vmem_limit_bytes)

    def schedule(self, attend: Attend, call: Call) -> tuple[Lowering, Schedule | None]:
        """The lowering that runs in this call, and the schedule that the hints ask for; None where no kernel runs.

        Raises ``ValueError`` that names the argument, if the kernel cannot honour it.
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
            asked = ", ".join(f"{hint.argument}={hint.value!r}" for hint in self.given)
            raise ValueError(f"The kernel that {asked or 'the call'} asks for, {schedule}, cannot run: {reason} The "
                             f"nearest that can: {own}.")  # fmt: skip
        return lowering, schedule


def lowered(target: str, interpret: Any, hints: Hints, spec: AttentionSpec, layout: PageLayout, call: Call) -> Attend:
    """The attention that runs in this call, with the schedule that the hints ask for."""
    return _with_hints(lower(spec, layout, target, interpret=interpret), hints, call)


def lowered_on(
    devices: Devices, target: str, interpret: Any, hints: Hints, spec: AttentionSpec, layout: PageLayout, call: Call
) -> ShardedAttend:
    """The attention on a mesh, where each device runs its part of the call with the schedule that the hints ask for."""
    attend = devices.lowered(spec, layout, target, interpret)
    call = dataclasses.replace(call, num_pages=call.num_pages // attend.shares.context)
    return dataclasses.replace(attend, first_device=_with_hints(attend.first_device, hints, call))


def _with_hints(attend: Attend, hints: Hints, call: Call) -> Attend:
    if hints == Hints():
        return attend
    lowering, schedule = hints.schedule(attend, call)
    return attend if schedule is None else dataclasses.replace(attend, lowerings=(lowering,), pinned=schedule)


def _positive(argument: str, field: str, value: Any) -> Hint:
    return Hint(argument, field, None if value is None else integer(argument, value, 1))


def _set(*hints: Hint) -> tuple[Hint, ...]:
    """The hints that have a value."""
    return tuple(hint for hint in hints if hint.value is not None)
