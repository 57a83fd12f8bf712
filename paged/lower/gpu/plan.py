"""The decode kernel's schedules for GPUs: what it refuses, the heuristic, what fits, and what to time."""

from collections.abc import Iterator
from typing import Any

from paged.spec import PageLayout

from ..gpu_targets import GpuTarget
from ..jax_version import HAS_GPU_KERNELS
from ..program import COMMON, Call, Program, most_pages_seen, refused_operations
from ..schedule import around, grid, halvings
from .chips import HOPPERS, shared_for_a_block
from .launch import DecodeLaunch, shared_bytes
from .schedule import GpuDecodeSchedule
from .terms import ELEMENTWISE

# What one step of the softmax takes: the least that the matrix unit multiplies, and twice that.
_TOKENS = (64, 128)
_SHORT = 128  # bytes of a key, of which a step takes 128 tokens
_MOST_ROWS = 32
# With 32 rows, the compiler runs out of registers for the conversion of 8-bit pages.
_MOST_ROWS_OF_8_BITS = 16
_LEAST_STAGES, _MOST_STAGES = 3, 8
# Shared memory that the compiler adds: barriers, and exchanges of maxima between warps.
ADDED_BYTES = 3584
# How often the blocks of threads of a call should fill the GPU, so that long sequences do not run alone at the end.
_FILLS = 2


def refuses_program(program: Program, layout: PageLayout) -> str | None:
    """Why the kernel does not accept this program over this layout, or None."""
    reason = _refuses_layout(layout)
    if reason is not None:
        return reason
    if program.has_ancestors:
        return "a mask with a Tree asks for a row's ancestors, which the kernel does not know"
    operations = refused_operations(program, ELEMENTWISE)
    if operations:
        return (
            f"a mask or bias uses {', '.join(operations)}, which the kernel has no rule for: only elementwise "
            "arithmetic of positions, and anything of the head alone"
        )
    if not HAS_GPU_KERNELS:
        return "its kernel is written for JAX 0.11 or later (Python 3.12)"
    return None


def _refuses_layout(layout: PageLayout) -> str | None:
    if layout.dtype == "float32":
        return "the pages must be float16, bfloat16, int8 or float8, which the matrix unit multiplies; got float32"
    if layout.scales == "token":
        return (
            'it has no copies of per-token scales: scales must be "head" or "tensor", which are factors of a whole '
            'head; got "token"'
        )
    if layout.is_quantised and layout.head_dim == 64:
        return (
            "head_dim of int8 and float8 pages must be 128 or 256: at 64 the instructions would take about two thirds "
            "of the cycles of the transfers; got 64"
        )
    if layout.head_dim not in (64, 128, 256) or layout.value_dim != layout.head_dim:
        dims = f"{layout.head_dim} with values of {layout.value_dim}"
        return f"head_dim must be 64, 128 or 256, and value_dim the same (got {dims})"
    if layout.page_size not in (8, 16, 32, 64):
        return f"page_size must be 8, 16, 32 or 64 (got {layout.page_size})"
    return None


def refuses_call(program: Program, layout: PageLayout, call: Call) -> str | None:
    """Why the kernel does not accept this call, or None."""
    if call.query_rows is None or not call.has_even_rows:
        return "it decodes, with as many query rows for every sequence (RaggedBatch.decode), and this batch's rows vary"
    most = _MOST_ROWS_OF_8_BITS if layout.is_quantised else _MOST_ROWS
    if call.query_rows * program.group > most:
        return (
            f"it decodes: {call.query_rows} query rows per sequence are {call.query_rows * program.group} rows per KV "
            f"head, of at most {most}{' for int8 and float8 pages' if layout.is_quantised else ''}"
        )
    if call.has_own_rows:
        return "the batch brings positions of its rows, which the kernel does not read"
    if layout.is_quantised and call.q_dtype not in ("float16", "bfloat16"):
        return f"queries of int8 and float8 pages must be float16 or bfloat16; got {call.q_dtype}"
    if not layout.is_quantised and call.q_dtype != layout.dtype:
        return f"queries must be {layout.dtype}, as the pages: both are multiplied as they lie; got {call.q_dtype}"
    if not call.num_pages or not call.pages_per_seq:
        return "there is no page to copy"
    smallest = _blocks(layout)[0]
    if _taken(program, layout, call, GpuDecodeSchedule(pages_per_block=smallest, stages=_LEAST_STAGES)) > min(
        shared_for_a_block(gpu) for gpu in HOPPERS.values()
    ):
        rows = call.query_rows * program.group
        return f"{rows} rows of {layout.head_dim} per KV head do not fit shared memory beside three tiles of pages"
    return None


def _blocks(layout: PageLayout) -> list[int]:
    """The page blocks that the matrix unit multiplies, in pages."""
    return [tokens // layout.page_size for tokens in _TOKENS]


def _taken(program: Program, layout: PageLayout, call: Call, schedule: GpuDecodeSchedule) -> int:
    return shared_bytes(layout, rows_of(program, call), schedule) + ADDED_BYTES


def launch_of(
    program: Program, layout: PageLayout, call: Call, schedule: GpuDecodeSchedule, interpret: Any
) -> DecodeLaunch:
    """The kernel that a schedule describes."""
    assert call.query_rows is not None
    intervals = program.page_intervals(layout.page_size)
    return DecodeLaunch(program, intervals, call.query_rows, schedule, interpret)


def plan_schedule(program: Program, layout: PageLayout, call: Call | None, gpu: GpuTarget) -> GpuDecodeSchedule:
    """The heuristic: steps of 64 tokens, or 128 of the shortest keys, as many tiles as two blocks of threads have room
    for, and enough KV splits to fill the GPU's multiprocessors twice.

    A step of 64 tokens with keys of 128 bytes issues more instructions than half of the cycles that its bytes take
    (counted in compiled code).
    """
    call = call or COMMON
    pages = _blocks(layout)[layout.head_dim * layout.dtype.itemsize <= _SHORT]
    seen = -(-most_pages_seen(program, layout.page_size, call) // pages)
    items = call.slots * program.num_kv_heads
    wanted = -(-2 * _FILLS * gpu.multiprocessors // items)
    schedule = GpuDecodeSchedule(pages_per_block=pages, stages=_MOST_STAGES, kv_splits=max(1, min(wanted, seen // 4)))
    while schedule.stages > _LEAST_STAGES and fits(program, layout, call, schedule, gpu) is not None:
        schedule = schedule.replace(stages=schedule.stages - 1)
    return schedule


def fits(program: Program, layout: PageLayout, call: Call, schedule: GpuDecodeSchedule, gpu: GpuTarget) -> str | None:
    """Why a schedule cannot run, or None."""
    tokens = schedule.pages_per_block * layout.page_size
    if tokens not in _TOKENS:
        return (
            f"its page blocks have {tokens} tokens, and the matrix unit's long side has {_TOKENS[0]} or {_TOKENS[1]}."
        )
    taken, room = _taken(program, layout, call, schedule), shared_for_a_block(gpu)
    if taken > room:
        return (
            f"its tiles take {taken} bytes of shared memory, and a block of threads has {room} while "
            "two run on a multiprocessor: lower stages or pages_per_block."
        )
    if schedule.kv_splits > call.pages_per_seq:
        return f"it splits sequences into kv_splits={schedule.kv_splits}, and they have {call.pages_per_seq} pages."
    return None


def rows_of(program: Program, call: Call) -> int:
    """Query rows of a KV head, padded: the matrix unit multiplies multiples of 8."""
    return -(-(call.query_rows or 1) * program.group // 8) * 8


def alternatives(layout: PageLayout, call: Call, own: GpuDecodeSchedule) -> Iterator[GpuDecodeSchedule]:
    """Schedules to time beside ``own``: more tokens per step, fewer stages, half and twice as many KV splits."""
    stages = sorted({_LEAST_STAGES, max(_LEAST_STAGES, own.stages // 2), own.stages})
    yield from grid(own, pages_per_block=_blocks(layout), stages=stages)
    yield from grid(own, kv_splits=[splits for splits in around(own.kv_splits) if splits <= call.pages_per_seq])


def neighbours(layout: PageLayout, call: Call, asked: GpuDecodeSchedule) -> Iterator[GpuDecodeSchedule]:
    """Schedules like ``asked`` with blocks that the matrix unit multiplies, fewer stages, and fewer KV splits."""
    splits = halvings(min(asked.kv_splits, call.pages_per_seq))
    stages = range(_LEAST_STAGES, asked.stages + 1)
    yield from grid(asked, pages_per_block=_blocks(layout), stages=stages, kv_splits=splits)
