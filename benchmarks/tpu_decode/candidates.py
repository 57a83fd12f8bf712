"""The candidates: each a builder from a shape to ``(function, arguments)``, which is what is compiled.

Integer arguments, lengths and tables, are concrete, because the kernel's scalar program is run with them; float
arguments are shapes.
"""

from benchmarks.tpu import OWN, WRITING, Call, paged_call

from . import peers
from .ceiling import ceiling
from .shapes import SHAPES, Shape

CEILING = "ceiling"
TWO_CORES = ("v4", "v5p")  # generations whose two cores are one JAX device


def names() -> list[str]:
    """Every candidate, the ceiling first."""
    return [CEILING, *OWN, *peers.BUILDERS]


def is_for(candidate: str, shape: Shape) -> bool:
    """Whether a row says something: no peer takes a user's mask, and some are made for one head size."""
    if shape.is_opaque:
        return candidate not in peers.BUILDERS
    return candidate not in peers.HEAD_64 or shape.head_dim == 64


def writes(candidate: str) -> bool:
    """Whether the call also writes this step's keys and values into the pages."""
    return candidate in (*WRITING, *peers.WRITING)


def build(candidate: str, shape: str, generation: str) -> Call:
    """The worker that compiles calls this, in a process of its own."""
    found = SHAPES[shape]
    if candidate == CEILING:
        return ceiling(found, 2 if generation in TWO_CORES else 1)
    return paged_call(found, candidate) if candidate in OWN else peers.BUILDERS[candidate](found)
