"""`Hints`: arguments that describe a kernel, made into the nearest schedule that the kernel can run."""

import dataclasses
from typing import Any, NamedTuple

from paged.lower import Attend, Call, Lowering, Schedule, ShardedAttend, lower
from paged.spec import AttentionSpec, PageLayout

from .devices import Devices
from .number import block_sizes, flag, integer

MEGACORE_MODES = (None, "batch", "kv_head")


class Hint(NamedTuple):
    """One argument, the value that was given, and the field of a schedule that it means; ``""`` where it means none.

    ``value`` is the field's value: a number of tokens where ``is_tokens``, which the page size divides.
    """

    argument: str
    given: Any
    field: str
    value: Any
    is_tokens: bool = False


class Hints(NamedTuple):
    """The hints of one call; none by default. They change time and memory, and never a result."""

    given: tuple[Hint, ...] = ()
    vmem_limit_bytes: int | None = None

    @classmethod
    def of_decode(
        cls, num_splits: Any, pages_per_compute_block: Any, megacore_mode: Any, inline_seq_dim: Any
    ) -> "Hints":
        """The hints of `page_attention`. ``"batch"`` and None ask for what every kernel does with two cores."""
        if megacore_mode not in MEGACORE_MODES:
            raise ValueError(f"megacore_mode must be one of {MEGACORE_MODES}; got {megacore_mode!r}.")
        splits, inline = integer("num_splits", num_splits, 0), flag("inline_seq_dim", inline_seq_dim)
        if not splits and pages_per_compute_block is None and megacore_mode != "kv_head" and inline:
            return cls()
        hints = (
            Hint("num_splits", splits, "kv_splits", splits or None),
            _positive("pages_per_compute_block", "pages_per_block", pages_per_compute_block),
            Hint("megacore_mode", megacore_mode, "", True if megacore_mode == "kv_head" else None),
            Hint("inline_seq_dim", inline, "sequence", None if inline else "grid"),
        )
        return cls(_set(*hints))

    @classmethod
    def of_ragged(
        cls,
        vmem_limit_bytes: Any,
        num_kv_pages_per_block: Any = None,
        num_queries_per_block: Any = None,
        m_block_sizes: Any = None,
    ) -> "Hints":
        """The hints of the ragged entry points. ``m_block_sizes`` begins with rows and with tokens of a block."""
        if (
            vmem_limit_bytes is None
            and num_kv_pages_per_block is None
            and num_queries_per_block is None
            and m_block_sizes is None
        ):
            return cls()
        hints = [] if m_block_sizes is None else _of_blocks("m_block_sizes", m_block_sizes)
        hints += [
            _positive("num_kv_pages_per_block", "pages_per_block", num_kv_pages_per_block),
            _positive("num_queries_per_block", "rows_per_tile", num_queries_per_block),
        ]
        limit = None if vmem_limit_bytes is None else integer("vmem_limit_bytes", vmem_limit_bytes, 1)
        return cls(_set(*hints), limit)

    def fields(self, page_size: int) -> dict[str, Any]:
        """The fields of a schedule that the hints ask for. The last hint of a field counts."""
        return {
            hint.field: max(1, hint.value // page_size) if hint.is_tokens else hint.value
            for hint in self.given
            if hint.field
        }

    def schedule(self, attend: Attend, call: Call) -> tuple[Lowering, Schedule, str] | None:
        """The lowering that runs in this call, the schedule that comes nearest to the hints, and whose choice that is.

        None where no kernel runs: hints mean nothing there.
        """
        program, layout = attend.program, attend.layout
        lowering = attend.choice(call).lowering
        if not lowering.has_kernels:
            return None
        lowering, limit = self._narrowed(lowering, attend, call)
        wanted = self.fields(layout.page_size)
        schedule = lowering.nearest(program, layout, call, wanted)
        is_exact = limit == self.vmem_limit_bytes and all(hint.field for hint in self.given)
        is_exact &= all(getattr(schedule, name, None) == value for name, value in wanted.items())
        return lowering, schedule, f"hints, {'' if is_exact else 'the nearest to '}{self}"

    def _narrowed(self, lowering: Lowering, attend: Attend, call: Call) -> tuple[Lowering, int | None]:
        """The lowering, using no more vector memory than the limit; or than the least double of it that is enough."""
        limit = self.vmem_limit_bytes
        if limit is None:
            return lowering, None
        # The lowering accepts the call with the whole memory, so that some double of the limit is enough.
        while lowering.within_memory(limit).refuses(attend.program, attend.layout, call) is not None:
            limit *= 2
        return lowering.within_memory(limit), limit

    def __str__(self) -> str:
        said = [f"{argument}={given!r}" for argument, given in dict((hint[:2]) for hint in self.given).items()]
        said += [] if self.vmem_limit_bytes is None else [f"vmem_limit_bytes={self.vmem_limit_bytes}"]
        return ", ".join(said)


def lowered(target: str, interpret: Any, hints: Hints, spec: AttentionSpec, layout: PageLayout, call: Call) -> Attend:
    """The attention that runs in this call, with the schedule that comes nearest to the hints."""
    return _with_hints(lower(spec, layout, target, interpret=interpret), hints, call)


def lowered_on(
    devices: Devices, target: str, interpret: Any, hints: Hints, spec: AttentionSpec, layout: PageLayout, call: Call
) -> ShardedAttend:
    """The attention on a mesh, where each device runs its part of the call with the schedule nearest to the hints."""
    attend = devices.lowered(spec, layout, target, interpret)
    call = dataclasses.replace(call, num_pages=call.num_pages // attend.shares.context)
    return dataclasses.replace(attend, first_device=_with_hints(attend.first_device, hints, call))


def _with_hints(attend: Attend, hints: Hints, call: Call) -> Attend:
    if hints == Hints():
        return attend
    chosen = hints.schedule(attend, call)
    if chosen is None:
        return attend
    lowering, schedule, source = chosen
    return dataclasses.replace(attend, lowerings=(lowering,), pinned=schedule, pinned_by=source)


def _of_blocks(name: str, value: Any) -> list[Hint]:
    """Hints from four sizes of blocks, of which the first are rows and tokens of one copy."""
    sizes = block_sizes(name, value)
    return [Hint(name, sizes, "rows_per_tile", sizes[0]), Hint(name, sizes, "pages_per_block", sizes[1], True)]


def _positive(argument: str, field: str, value: Any) -> Hint:
    number = None if value is None else integer(argument, value, 1)
    return Hint(argument, number, field, number)


def _set(*hints: Hint) -> tuple[Hint, ...]:
    """The hints that have a value."""
    return tuple(hint for hint in hints if hint.value is not None)
