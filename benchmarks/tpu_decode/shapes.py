"""The batches to attend over: heads and lengths, one query row per sequence."""

import dataclasses

import numpy as np

from benchmarks import tpu

_TABLE_MULTIPLE = 16  # JAX's paged_attention wants tables a multiple of its pages per block


@dataclasses.dataclass(frozen=True)
class Shape(tpu.Shape):
    """One decode step."""

    @property
    def pages_per_seq(self) -> int:
        """Width of the block tables."""
        return -(-super().pages_per_seq // _TABLE_MULTIPLE) * _TABLE_MULTIPLE


def _rows(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((1, length) for length in lengths)


def _short_lengths() -> list[int]:
    return [int(n) for n in np.random.default_rng(0).integers(1, 301, 64)]


_LONG, _ONE = _rows(*[4096] * 16), _rows(32768)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-p16", 32, 8, 128, 16, _LONG),
        Shape("llama-p64", 32, 8, 128, 64, _LONG),
        Shape("group8-p16", 64, 8, 128, 16, _LONG),
        Shape("softcap-d256-p16", 16, 8, 256, 16, _LONG, soft_cap=50.0),
        Shape("window-d64-p16", 64, 8, 64, 16, _LONG, window=128, has_sinks=True),
        Shape("window-d64-p64", 64, 8, 64, 64, _LONG, window=128, has_sinks=True),
        Shape("one-32k-p16", 32, 8, 128, 16, _ONE),
        Shape("one-32k-p64", 32, 8, 128, 64, _ONE),
        Shape("64-2k-p16", 32, 8, 128, 16, _rows(*[2048] * 64)),
        Shape("mha-p16", 16, 16, 128, 16, _rows(*[2048] * 64)),
        Shape("group3-p16", 24, 8, 128, 16, _rows(*[2048] * 64)),
        Shape("group5-p16", 40, 8, 128, 16, _rows(*[2048] * 64)),
        Shape("group5-window-p16", 40, 8, 128, 16, _rows(*[2048] * 64), window=128),
        Shape("256-1k-p16", 32, 8, 128, 16, _rows(*[1024] * 256)),
        Shape("window-p16", 32, 8, 128, 16, _rows(*[2048] * 64), window=128),
        Shape("opaque-p16", 32, 8, 128, 16, _LONG, is_opaque=True),
        Shape("short-p16", 32, 8, 128, 16, _rows(*_short_lengths())),
    )
}


def describe(shape: Shape) -> str:
    """Heads, dims, lengths and terms, for a table's title."""
    even = len(set(shape.lengths)) == 1
    tokens = str(shape.lengths[0]) if even else f"{min(shape.lengths)} to {max(shape.lengths)}"
    return shape.described(f"{shape.num_seqs} x {tokens} tokens")
