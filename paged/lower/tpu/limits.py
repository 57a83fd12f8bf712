"""What a TPU kernel cannot do, said by name before anything is traced; and how work is cut to fit scalar memory."""

from collections.abc import Iterator

import jax.numpy as jnp

from paged.spec import PageLayout

from ..call import Call
from ..program import Program
from ..schedule import Schedule
from .chips import Chip
from .planning import plan_prefill, plan_schedule, prefill_launch_of, prefill_vmem_budget, vmem_budget, vmem_bytes
from .terms import refused_operations

_ROWS_OF_A_TILE = 8
_MOST_QUERY_ROWS = 128
_LANES = 128
# Of scalar memory, what page lists may take, and its bytes for each entry and each item.
_SMEM_SHARE = 0.6
_BYTES_AN_ENTRY, _BYTES_AN_ITEM = 8, 40


def refuses_program(program: Program, layout: PageLayout) -> str | None:
    """Why no decode kernel takes this program over this layout, or None."""
    if layout.page_size % _ROWS_OF_A_TILE:
        return (
            f"pages of {layout.page_size} tokens are no whole tiles: page_size must be a multiple of {_ROWS_OF_A_TILE}"
        )
    if layout.dtype == jnp.float16:
        return "a TPU has no float16: pages must be bfloat16, float32, int8 or float8"
    if layout.order == "interleaved" and layout.scales == "token":
        return 'scales="token" with order="interleaved" would have to be transposed: use order="packed" or "split"'
    if layout.num_kv_heads > _LANES:
        return f"{layout.num_kv_heads} KV heads are more than the {_LANES} lanes that log-sum-exps are kept in"
    operations = refused_operations(program)
    if operations:
        return (
            f"a mask or bias uses {', '.join(operations)}, which kernels have no rule for: only elementwise arithmetic "
            "of positions, and anything of the head alone"
        )
    return None


def refuses_call(program: Program, layout: PageLayout, call: Call, chip: Chip) -> str | None:
    """Why no decode kernel takes this call, or None."""
    if call.query_rows is None:
        return "it decodes, with as many query rows for every sequence (RaggedBatch.decode), and this batch's rows vary"
    rows = call.query_rows * -(-program.group // _ROWS_OF_A_TILE) * _ROWS_OF_A_TILE
    if rows > _MOST_QUERY_ROWS:
        return (
            f"it decodes: {call.query_rows} query rows a sequence are {rows} rows a KV head, of at most "
            f"{_MOST_QUERY_ROWS}"
        )
    smallest = plan_schedule("", program, layout, call, chip)
    if vmem_bytes(program, layout, call, smallest) > vmem_budget(chip):
        return (
            f"two pages of {layout.bytes_per_page} bytes, with queries and results, do not fit the {chip.generation} "
            "chip's vector memory: use smaller pages"
        )
    return None


def fits(program: Program, layout: PageLayout, call: Call, schedule: Schedule, chip: Chip) -> str | None:
    """Why a schedule does not fit the chip, or None."""
    taken, budget = vmem_bytes(program, layout, call, schedule), vmem_budget(chip)
    if taken > budget:
        return (
            f"its buffers take {taken} bytes of vector memory, and there are {budget} for them on {chip.generation}: "
            "lower pages_per_block or buffers."
        )
    if schedule.kv_splits > call.pages_per_seq:
        return f"it splits sequences into kv_splits={schedule.kv_splits}, and they have {call.pages_per_seq} pages."
    if schedule.cores > chip.cores:
        return f"it has cores={schedule.cores}, and a device of {chip.generation} has {chip.cores}."
    return None


def refuses_prefill(program: Program, layout: PageLayout, call: Call, chip: Chip) -> str | None:
    """Why no prefill kernel takes this call, or None."""
    smallest = plan_prefill("", program, layout, call, chip)
    if prefill_launch_of(program, layout, call, smallest, chip).vmem_bytes > prefill_vmem_budget(chip):
        return (
            f"{smallest.query_rows} query rows of {program.num_q_heads} heads, with two blocks of "
            f"{smallest.pages_per_block} pages, do not fit the {chip.generation} chip's vector memory: use smaller "
            "pages"
        )
    return None


def prefill_fits(program: Program, layout: PageLayout, call: Call, schedule: Schedule, chip: Chip) -> str | None:
    """Why a schedule of the prefill kernel cannot run on the chip, or None."""
    rows, tokens = schedule.query_rows, schedule.pages_per_block * layout.page_size
    if rows < 16 or rows & (rows - 1):
        return f"it has query_rows={rows}, which must be a power of two, and at least 16."
    if tokens % _LANES:
        return f"its blocks of {tokens} tokens must be a multiple of {_LANES}: change pages_per_block."
    taken = prefill_launch_of(program, layout, call, schedule, chip).vmem_bytes
    budget = prefill_vmem_budget(chip)
    if taken > budget:
        return (
            f"its buffers take {taken} bytes of vector memory, and there are {budget} for them on {chip.generation}: "
            "lower query_rows, pages_per_block or buffers."
        )
    if schedule.cores > chip.cores:
        return f"it has cores={schedule.cores}, and a device of {chip.generation} has {chip.cores}."
    return None


def chunks(tables: tuple[int, ...], schedule: Schedule, chip: Chip) -> Iterator[tuple[slice, slice]]:
    """Sequences and table entries of each kernel, so that its lists fit scalar memory: usually one kernel for all."""
    rows, entries = rows_and_entries((tables[0], tables[1]), schedule, chip)
    for first_row in range(0, tables[0], rows):
        for first_entry in range(0, tables[1], entries):
            yield (
                slice(first_row, min(first_row + rows, tables[0])),
                slice(first_entry, min(first_entry + entries, tables[1])),
            )


def rows_and_entries(tables: tuple[int, int], schedule: Schedule, chip: Chip) -> tuple[int, int]:
    """How many tables, and how many entries of each, one kernel can list in scalar memory."""
    seqs, width = tables
    budget = int(_SMEM_SHARE * chip.smem_bytes)
    per_item = _BYTES_AN_ITEM * schedule.kv_splits
    entries = max(1, min(width, (budget - per_item) // _BYTES_AN_ENTRY))
    return max(1, min(seqs, budget // (entries * _BYTES_AN_ENTRY + per_item))), entries
