"""`schedule`: page blocks, buffers and KV splits of one call, in the order in which they are worked on."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from paged.lower import Attend, Call, Sequences, Work, WorkItem
from paged.spec import GroupedBatch, PageLayout, RaggedBatch, batch_for

from ._canvas import Canvas, Number, text_width
from ._picture import Picture

_WIDTH, _LEFT = 704, 84
_INNER = _WIDTH - _LEFT - 12
_MOST_BLOCKS, _MOST_LINES = 40, 12  # that are drawn of each core, and lines of text for it
_ROW = 16


def schedule(
    attend: Attend, call: Call | RaggedBatch | GroupedBatch, *, num_pages: int | None = None, q_dtype: Any = None
) -> Picture:
    """Draw how a call is worked on: items of query rows, their page blocks, and the buffers that these go through.

    Nothing is timed. Where the chip's bandwidth is known, the widths of blocks are the least time of their transfers,
    modelled: their bytes by that bandwidth. The work on a block is drawn as if it took no longer. Elsewhere widths are
    numbers of pages.

    **Arguments:**

    - `attend`: a lowered attention on one device. `Attend.on_chip` makes one for another chip than this process's.
    - `call`: the step, with concrete arrays. Or the `Call` of its shapes: then every sequence is as long as its table.
    - `num_pages`: pages of the pool, where ``call`` is a batch. None: all that its tables could name.
    - `q_dtype`: the dtype of queries, where ``call`` is a batch. None: the pages', or bfloat16 over quantised pages.

    **Returns:** the picture; of more than 40 blocks of a core the first 40. A call in which nothing is visible has no
    blocks. Raises ``ValueError`` where the lowering does not tell how it divides its work; and where no lowering
    accepts the call, with the reasons.

    >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128, window=96)
    >>> attend = paged.lower(spec, PageLayout(page_size=16, num_kv_heads=2, head_dim=128), target="tpu").on_chip("v5e")
    >>> batch = RaggedBatch.decode(lengths=[200, 40], block_tables=np.arange(32).reshape(2, 16))
    >>> print(paged.pictures.schedule(attend, batch).text)
    sequences, 6 buffers of 7 pages
      seq 0: 7 pages, 5 full: [7]
      seq 1: 3 pages, 2 full: [3]
    At least 0.2 us for transfers alone (modelled from the chip's bandwidth).
    """
    call, batch = _step(attend, call, num_pages, q_dtype)
    program = attend.program.for_batch(batch)
    lowering, chosen, source = attend.choice(call)
    seqs = Sequences.of(batch, call.tokens, attend.layout.page_size)
    works = lowering.work(program, chosen, call, attend.layout, seqs)
    if not works:
        raise ValueError(f"The lowering {lowering.name} does not tell how it divides its work.")
    return drawn(works, seqs, f"{chosen}", source, attend.layout)


def _names(works: tuple[Work, ...], starts: np.ndarray, counts: np.ndarray) -> dict[WorkItem, str]:
    """What each item is called: its sequence, which of its rows unless all, and which part."""
    names = {}
    for item in (item for work in works for items in work.cores for item in items):
        slot = int(np.argmax((starts <= item.row) & (item.row < starts + counts)))
        names[item] = f"seq {slot}"
        if item.rows < counts[slot]:
            first = item.row - int(starts[slot])
            names[item] += f", rows {first}-{first + item.rows - 1}"
        if item.parts > 1:
            names[item] += f", part {item.part + 1}/{item.parts}"
    return names


def drawn(works: tuple[Work, ...], seqs: Sequences, name: str, source: str, layout: PageLayout) -> Picture:
    """`schedule`, of work that a lowering has told."""
    names = _names(works, np.asarray(seqs.starts), np.asarray(seqs.counts))
    title = f"How {name} works on a call"
    canvas = Canvas(_WIDTH)
    y = canvas.lines(12, 24, title, _WIDTH - 24, size=14, style="h") + 2
    counts, lines, seconds = [0, 0], [], 0.0
    for work in works:
        counts[0] += sum(map(len, work.cores))
        counts[1] += sum(-(-item.pages // work.pages_per_block) for items in work.cores for item in items)
        words = f"{work.words}, {work.buffers} buffers of {work.pages_per_block} pages"
        words = words if work.buffers > 1 else f"{work.words}, {work.pages_per_block} pages in a step"
        lines.append(words)
        y = canvas.lines(12, y + 8, words, _WIDTH - 24, style="h") - 4
        for core, items in enumerate(work.cores):
            label = f"core {core}" if len(work.cores) > 1 else ""
            y = _core(canvas, y, work, (items, names, label), layout)
            lines += _lines(items, names, work.pages_per_block, label)
        pages = max(sum(item.pages for item in items) for items in work.cores)
        seconds += 0.0 if work.bytes_per_second is None else pages * layout.bytes_per_page / work.bytes_per_second
    y = canvas.legend(12, y + 12, _legend(works), _WIDTH - 24)
    time = "Widths are numbers of pages: no time is modelled here."
    if seconds:
        time = f"At least {1e6 * seconds:.1f} us for transfers alone (modelled from the chip's bandwidth)."
    words = f"{counts[0]} items in {counts[1]} page blocks; picked by: {source}. {time}"
    canvas.lines(12, y + 2, words, _WIDTH - 24, style="d")
    return Picture.of(canvas, title, words, "\n".join([*lines, time]))


def _step(attend: Attend, call: Any, num_pages: int | None, q_dtype: Any) -> tuple[Call, RaggedBatch]:
    layout = attend.layout
    if isinstance(call, Call):
        return call, _longest(call, layout.page_size, attend)
    batch: Any = batch_for(attend.spec, call)
    dtype = q_dtype or (jnp.bfloat16 if layout.is_quantised else layout.dtype)
    tokens = int(np.max(np.asarray(batch.query_starts), initial=0))
    if num_pages is None:
        num_pages = int(np.max(np.asarray(batch.block_tables), initial=0)) + 1
    own = Call(
        tokens=tokens,
        slots=batch.num_slots,
        pages_per_seq=batch.pages_per_seq,
        num_pages=num_pages,
        query_rows=batch.query_rows,
        q_dtype=jnp.dtype(dtype),
        has_even_starts=batch.has_even_starts,
        has_own_rows=batch.positions is not None or batch.ancestors is not None,
    )
    return own, batch


def _longest(call: Call, page_size: int, attend: Attend) -> RaggedBatch:
    """A step of these shapes in which every sequence is as long as its table, and rows are shared evenly."""
    slots, width = call.slots, call.pages_per_seq
    starts = np.arange(slots + 1) * call.tokens // max(slots, 1)
    tables = np.arange(slots * width).reshape(slots, width) % max(call.num_pages, 1)
    numbers = attend.program.any_numbers()
    values = {name: np.tile(np.asarray(x), (slots, *[1] * np.ndim(x))) for name, x in numbers.items()}
    return RaggedBatch(np.full(slots, width * page_size), tables, starts, query_rows=call.query_rows, values=values)


def _blocks(items: tuple[WorkItem, ...], size: int) -> list[tuple[int, int, bool]]:
    """For each block in order: its item, its pages, and whether it needs no mask."""
    found = []
    for i, item in enumerate(items):
        for first in range(0, item.pages, size):
            last = min(first + size, item.pages)
            found.append((i, last - first, last <= item.full))
    return found


def _core(canvas: Canvas, y: Number, work: Work, of_core: Any, layout: PageLayout) -> Number:
    """The time line of one core. Gives where it ends."""
    items, names, label = of_core
    blocks = _blocks(items, work.pages_per_block)
    shown = blocks[:_MOST_BLOCKS]
    if label:
        canvas.text(12, y + 14, label, style="d")
        y += 20
    if not shown:
        canvas.text(_LEFT, y + 14, "no page is visited", style="d")
        return y + 20
    # All cores have one scale.
    total = max(sum(pages for _, pages, _ in _blocks(own, work.pages_per_block)[:_MOST_BLOCKS]) for own in work.cores)
    starts = np.concatenate([[0], np.cumsum([pages for _, pages, _ in shown])]) * (_INNER / total)
    for i in sorted({item for item, _, _ in shown}):
        own = [at for at, (item, _, _) in enumerate(shown) if item == i]
        left, right = starts[own[0]], starts[own[-1] + 1]
        canvas.rect(_LEFT + left, y, right - left, 18, "o")
        name = names[items[i]]
        if text_width(name, 10) + 4 <= right - left:
            canvas.text(_LEFT + (left + right) / 2, y + 13, name, size=10, anchor="middle")
    canvas.text(_LEFT - 6, y + 13, "items", size=10, anchor="end", style="d")
    top = y + 22
    for stage in range(work.buffers):
        name = f"buffer {stage}" if work.buffers > 1 else "work"
        canvas.text(_LEFT - 6, top + stage * _ROW + 11, name, size=10, anchor="end", style="d")
    for at, (_, _, is_full) in enumerate(shown):
        row = top + at % work.buffers * _ROW
        canvas.tiles(_LEFT + starts[at], row, starts[at + 1] - starts[at], _ROW - 2, [["F" if is_full else "P"]])
        begins = max(0, at - work.buffers + 1)
        if begins < at:
            canvas.tiles(_LEFT + starts[begins], row, starts[at] - starts[begins], _ROW - 2, [["S"]])
    bottom = top + work.buffers * _ROW
    canvas.line(_LEFT, bottom + 2, _LEFT + _INNER, bottom + 2)
    return _axis(canvas, bottom, work, total, len(blocks) - len(shown), layout)


def _axis(canvas: Canvas, bottom: Number, work: Work, total: int, more: int, layout: PageLayout) -> Number:
    words = f"{total} pages"
    if work.bytes_per_second is not None:
        words += f", {1e6 * total * layout.bytes_per_page / work.bytes_per_second:.1f} us (modelled)"
    canvas.text(_LEFT, bottom + 16, "0", size=10, style="d")
    canvas.text(_LEFT + _INNER, bottom + 16, words, size=10, anchor="end", style="d")
    if more:
        canvas.text(_LEFT + 40, bottom + 16, f"{more} more blocks follow", size=10, style="d")
    return bottom + 26


def _legend(works: tuple[Work, ...]) -> list[tuple[str, str]]:
    entries = [("F", "worked on: no mask needed"), ("P", "worked on, with a mask")]
    return entries + [("S", "on its way")] * any(work.buffers > 1 for work in works)


def _lines(items: tuple[WorkItem, ...], names: dict[WorkItem, str], size: int, label: str) -> list[str]:
    found = [f"  {label}"] if label else []
    for item in items[:_MOST_LINES]:
        blocks = [min(size, item.pages - first) for first in range(0, item.pages, size)]
        more = f" and {len(blocks) - 8} more" if len(blocks) > 8 else ""
        shown = " ".join(f"[{pages}]" for pages in blocks[:8]) + more
        found.append(f"  {names[item]}: {item.pages} page{'s' * (item.pages != 1)}, {item.full} full: {shown}")
    return found + [f"  and {len(items) - _MOST_LINES} more"] * (len(items) > _MOST_LINES)
