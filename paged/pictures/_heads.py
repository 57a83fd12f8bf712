"""`heads`: which query heads share a KV head, which have sinks, and which have a mask of their own."""

import string
from typing import Any

from paged.lower import Program
from paged.spec import AttentionSpec

from ._canvas import Canvas, Number, text_width
from ._mask import per_head
from ._picture import Picture

_WIDTH, _GAP = 704, 10
_MOST_GROUPS, _PER_LINE = 16, 8


def heads(spec: AttentionSpec | Program) -> Picture:
    """Draw the heads of an attention: the groups of query heads that share a KV head, sinks, and masks by head.

    **Arguments:**

    - `spec`: the attention, or its `Program`.

    **Returns:** the picture. Of more than 16 KV heads it shows the first 15 and the last one.

    >>> print(paged.pictures.heads(AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, sinks=True)).text)
    KV 0: q0* q1*
    KV 1: q2* q3*
    * has a sink: a learnt logit in its softmax's denominator
    """
    program = spec if isinstance(spec, Program) else Program.from_spec(spec)
    masks = per_head(program)
    title = f"{program.num_q_heads} query heads over {program.num_kv_heads} KV heads"
    words = (
        f"Query heads {program.group} by {program.group} read one KV head."
        if program.group > 1
        else ("Every query head reads a KV head of its own.")
    )
    words += " Each query head has a sink." if program.sinks else ""
    words += f" There are {len(masks)} masks by head." if masks else ""
    return _drawn(program, title, words, masks)


def _shown(program: Program) -> list[int | None]:
    """The KV heads that are drawn, with None where some are left out."""
    count = program.num_kv_heads
    if count <= _MOST_GROUPS:
        return list(range(count))
    return [*range(_MOST_GROUPS - 1), None, count - 1]


def _label(program: Program, head: int, masks: tuple[str, ...]) -> str:
    letter = string.ascii_uppercase[head * len(masks) // program.num_q_heads % 26] if masks else ""
    return f"q{head}{letter}{'*' * program.sinks}"


def _drawn(program: Program, title: str, words: str, masks: tuple[str, ...]) -> Picture:
    canvas, lines = Canvas(_WIDTH), []
    y = canvas.lines(12, 24, title, _WIDTH - 24, size=14, style="h") + 4
    widest = max(text_width(_label(program, head, masks), 11) for head in range(program.num_q_heads)) + 10
    per_line = min(program.group, _PER_LINE)
    kv_width = text_width(f"KV {program.num_kv_heads - 1}", 12) + 16
    width = max(per_line * (widest + 4) + 12, kv_width + 12)
    rows = -(-program.group // per_line)
    height = 34 + rows * 24
    x, top = 12.0, y
    for kv in _shown(program):
        own_width = 30.0 if kv is None else width
        if x > 12 and x + own_width > _WIDTH - 12:
            x, top = 12.0, top + height + _GAP
        if kv is None:
            canvas.text(x + 15, top + height / 2, "...", anchor="middle", style="d")
            lines.append("...")
        else:
            lines.append(_group(canvas, program, kv, masks, (x, top, width, height), widest, per_line))
        x += own_width + _GAP
    y = top + height + 24
    notes = [f"{string.ascii_uppercase[i % 26]}: sees a key where {mask}" for i, mask in enumerate(masks)]
    notes += ["* has a sink: a learnt logit in its softmax's denominator"] * program.sinks
    for note in [*notes, words]:
        y = canvas.lines(12, y, note, _WIDTH - 24, size=12, style="d" if note == words else "t") + 2
    return Picture.of(canvas, title, words, "\n".join([*lines, *notes]))


def _group(
    canvas: Canvas, program: Program, kv: int, masks: tuple[str, ...], box: Any, widest: Number, per_line: int
) -> str:
    x, top, width, height = box
    canvas.rect(x, top, width, height, "e", corner=6)
    canvas.rect(x + 6, top + 6, width - 12, 20, "fF", corner=4)
    canvas.text(x + width / 2, top + 20, f"KV {kv}", anchor="middle", style="n")
    labels = [_label(program, kv * program.group + i, masks) for i in range(program.group)]
    for i, label in enumerate(labels):
        left, y = x + 8 + i % per_line * (widest + 4), top + 32 + i // per_line * 24
        canvas.rect(left, y, widest, 20, "k" if program.sinks else "o", corner=4)
        canvas.text(left + widest / 2, y + 14, label, size=11, anchor="middle")
    return f"KV {kv}: {' '.join(labels)}"
