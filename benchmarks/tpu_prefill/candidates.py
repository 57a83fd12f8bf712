"""The candidates: each a builder from a shape to ``(function, arguments)``, which is what is compiled.

Integer arguments, lengths, starts and tables, are concrete, because the kernel's scalar program is run with
them; float arguments are shapes.
"""

from benchmarks.tpu import OWN, WRITING, Call, paged_call

from . import peers
from .shapes import SHAPES, Shape


def names() -> list[str]:
    """Every candidate, ours first."""
    return [*OWN, *peers.BUILDERS]


def is_for(candidate: str, shape: Shape) -> bool:
    """Whether a row says something: no peer takes a user's mask, and some take one kind of batch or head."""
    if shape.is_opaque:
        return candidate in OWN
    if candidate in peers.HEAD_64:
        return shape.head_dim == 64
    return len(shape.seqs) == 1 or candidate not in peers.ONE_CHUNK


def writes(candidate: str) -> bool:
    """Whether the call also writes this step's keys and values into the pages."""
    return candidate in (*WRITING, *peers.WRITING)


def build(candidate: str, shape: str, generation: str) -> Call:
    """The worker that compiles calls this, in a process of its own. The generation is that process' device."""
    del generation
    found = SHAPES[shape]
    return paged_call(found, candidate) if candidate in OWN else peers.BUILDERS[candidate](found)
