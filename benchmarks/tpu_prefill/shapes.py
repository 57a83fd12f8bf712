"""The batches to attend over: heads, rows and lengths of each sequence, and what a perfect kernel would have to do."""

import dataclasses
from typing import Any

import numpy as np

from benchmarks import tpu
from benchmarks.tpu.shape import ITEM_BYTES


@dataclasses.dataclass(frozen=True)
class Shape(tpu.Shape):
    """One step with prompts, or chunks of them, in it.

    ``parts`` names the shapes that this one is made of; ``is_emulated`` is false where running the scalar program
    would take too long, so that only what compiling shows is known.
    """

    parts: tuple[str, ...] = ()
    is_emulated: bool = True

    @property
    def needed_bytes(self) -> int:
        """What a perfect kernel reads: the pages that hold a visible token, and the queries, once."""
        return self.visible_bytes + self.num_rows * self.q_heads * self.head_dim * ITEM_BYTES


_HEADS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {  # (query heads, KV heads, head_dim), terms
    "llama": ((32, 8, 128), {}),  # Llama 3 8B, and Qwen 3 8B
    "llama70b": ((64, 8, 128), {}),
    "qwen14b": ((40, 8, 128), {}),  # Qwen 3 14B: a group of 5
    "gemma2": ((16, 8, 256), {"soft_cap": 50.0}),  # Gemma 2 9B, global layers
    "gemma3": ((32, 16, 128), {"window": 1024}),  # Gemma 3 27B, local layers
    "gptoss": ((64, 8, 64), {"has_sinks": True}),  # gpt-oss 20B, global layers
    "gptoss-window": ((64, 8, 64), {"has_sinks": True, "window": 128}),  # and local ones
    "mqa": ((16, 1, 128), {}),
}
_CONTEXT = 4096
_CHUNKS = tuple((512, length) for length in (2048, 4096, 1024, 3072))


def _decode_rows() -> tuple[tuple[int, int], ...]:
    return tuple((1, int(n)) for n in np.random.default_rng(0).integers(1024, 4097, 60))


def _even_rows() -> tuple[tuple[int, int], ...]:
    return tuple((1, 1032 + 52 * i) for i in range(60))


def _scattered() -> tuple[tuple[int, int], ...]:
    """The mixed batch with its chunks among the decode rows."""
    seqs = list(_decode_rows())
    for place, chunk in zip((3, 17, 34, 52), _CHUNKS, strict=True):
        seqs.insert(place, chunk)
    return tuple(seqs)


def _chunk(model: str, rows: int, page_size: int) -> Shape:
    (q_heads, kv_heads, head_dim), terms = _HEADS[model]
    name = f"{model}-{rows}-p{page_size}"
    return Shape(name, q_heads, kv_heads, head_dim, page_size, ((rows, _CONTEXT),), **terms)


_MIXED_PARTS = ("mixed-decode-p16", "mixed-chunks-p16")
SHAPES = {
    shape.name: shape
    for shape in (
        *(_chunk("llama", rows, page_size) for rows in (512, 2048) for page_size in (16, 64)),
        *(_chunk(model, rows, 16) for rows in (512, 2048) for model in _HEADS if model != "llama"),
        Shape("opaque-512-p16", 32, 8, 128, 16, ((512, _CONTEXT),), is_opaque=True),
        Shape("window-32k-512-p16", 32, 8, 128, 16, ((512, 32768),), window=1024),
        Shape("llama-4096-of-128k-p16", 32, 8, 128, 16, ((4096, 131072),), is_emulated=False),
        Shape("mixed-decode-p16", 32, 8, 128, 16, _decode_rows()),
        Shape("mixed-chunks-p16", 32, 8, 128, 16, _CHUNKS),
        Shape("mixed-p16", 32, 8, 128, 16, (*_decode_rows(), *_CHUNKS), parts=_MIXED_PARTS),
        Shape("mixed-256-p16", 32, 8, 128, 16, (*_even_rows(), *((256, 1024 * i) for i in (1, 2, 3, 4)))),
        Shape("mixed-scattered-p16", 32, 8, 128, 16, _scattered(), parts=_MIXED_PARTS),
    )
}


def describe(shape: Shape) -> str:
    """Heads, dims, rows, lengths and terms, for a table's title."""
    chunks = [(rows, length) for rows, length in shape.seqs if rows > 1]
    ones = [length for rows, length in shape.seqs if rows == 1]
    batch = [f"{len(ones)} decode rows of {min(ones)} to {max(ones)} tokens"] if ones else []
    if len(chunks) == 1:
        batch += ["the last {} of {} tokens".format(*chunks[0])]
    elif chunks:
        lengths = ", ".join(str(length) for _, length in chunks)
        batch += [f"{len(chunks)} chunks of {chunks[0][0]} that end at {lengths}"]
    batch += ["scattered"] if ones and shape.rows != sorted(shape.rows) else []
    return shape.described(*batch)
