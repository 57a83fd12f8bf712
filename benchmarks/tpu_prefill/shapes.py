"""The batches to attend over: heads, rows and lengths of each sequence, and what a perfect kernel would have to do."""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.tpu import pages

ITEM_BYTES = pages.ITEM_BYTES


@dataclasses.dataclass(frozen=True)
class Shape:
    """One step in bfloat16: what attention, over which sequences, each with its query rows and its length.

    The rows of a sequence are its last tokens. ``parts`` names the shapes that this one is made of; ``is_emulated`` is
    false where running the scalar program would take too long, so that only what compiling shows is known.
    """

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    seqs: tuple[tuple[int, int], ...]  # (query rows, length)
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    parts: tuple[str, ...] = ()
    is_emulated: bool = True

    @property
    def rows(self) -> list[int]:
        """Query rows of each sequence."""
        return [rows for rows, _ in self.seqs]

    @property
    def lengths(self) -> list[int]:
        """KV tokens of each sequence, its rows' own among them."""
        return [length for _, length in self.seqs]

    @property
    def num_rows(self) -> int:
        """Query rows of all sequences."""
        return sum(self.rows)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one row."""
        return max(self.rows) == 1

    @property
    def pages_per_seq(self) -> int:
        """Width of the block tables."""
        return max(self._page_counts())

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of all heads."""
        return 2 * self.kv_heads * self.page_size * self.head_dim * ITEM_BYTES

    @property
    def pool_pages(self) -> int:
        """Pages of the pool, which is large enough to stay in HBM."""
        return pages.pool_pages(self._page_counts(), self.page_bytes)

    @property
    def visible_pairs(self) -> int:
        """(query row, KV token) pairs that the masks leave visible, a query head."""
        return sum(int(self._visible(np.arange(length - rows, length)).sum()) for rows, length in self.seqs)

    @property
    def needed_bytes(self) -> int:
        """What a perfect kernel reads: the pages that hold a visible token, and the queries, once."""
        return self._visible_pages() * self.page_bytes + self.num_rows * self.q_heads * self.head_dim * ITEM_BYTES

    def query_starts(self) -> np.ndarray:
        """i32[seqs + 1]."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int32)

    def tables(self) -> np.ndarray:
        """i32[seqs, pages_per_seq], the pages shuffled over the pool; entries that nobody needs are 0."""
        return pages.tables(self._page_counts(), self.pages_per_seq, self.pool_pages)

    def _page_counts(self) -> list[int]:
        return [-(-n // self.page_size) for n in self.lengths]

    def _visible(self, positions: np.ndarray) -> np.ndarray:
        """How many tokens a row at each position sees."""
        return positions + 1 if self.window is None else np.minimum(positions + 1, self.window)

    def _visible_pages(self) -> int:
        firsts = [0 if self.window is None else max(0, n - rows - self.window + 1) for rows, n in self.seqs]
        return sum(end - first // self.page_size for first, end in zip(firsts, self._page_counts(), strict=True))


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
        Shape("window-32k-512-p16", 32, 8, 128, 16, ((512, 32768),), window=1024),
        Shape("llama-4096-of-128k-p16", 32, 8, 128, 16, ((4096, 131072),), is_emulated=False),
        Shape("mixed-decode-p16", 32, 8, 128, 16, _decode_rows()),
        Shape("mixed-chunks-p16", 32, 8, 128, 16, _CHUNKS),
        Shape("mixed-p16", 32, 8, 128, 16, (*_decode_rows(), *_CHUNKS), parts=_MIXED_PARTS),
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
    terms = [f"window {shape.window}"] if shape.window else []
    terms += [f"soft cap {shape.soft_cap:g}"] if shape.soft_cap else []
    terms += ["sinks"] if shape.has_sinks else []
    heads = f"{shape.q_heads}/{shape.kv_heads} heads of {shape.head_dim}"
    return ", ".join([heads, f"page {shape.page_size}", *batch, *terms])
