"""The batches to attend over: heads, lengths, pages in a random physical order, and the bytes that each needs read."""

import dataclasses

import numpy as np

from benchmarks.tpu import pages

ITEM_BYTES = pages.ITEM_BYTES
_TABLE_MULTIPLE = 16  # JAX's paged_attention wants tables a multiple of its pages a block


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode step in bfloat16: what attention, over which lengths and pages."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    lengths: tuple[int, ...]
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    @property
    def num_seqs(self) -> int:
        """Sequences, each with one query row."""
        return len(self.lengths)

    @property
    def pages_per_seq(self) -> int:
        """Width of the block tables."""
        widest = -(-max(self.lengths) // self.page_size)
        return -(-widest // _TABLE_MULTIPLE) * _TABLE_MULTIPLE

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of all heads."""
        return 2 * self.kv_heads * self.page_size * self.head_dim * ITEM_BYTES

    @property
    def pool_pages(self) -> int:
        """Pages of the pool: those of the batch, or more, so that the pool stays in HBM."""
        return pages.pool_pages(self._page_counts(), self.page_bytes)

    @property
    def visible_tokens(self) -> int:
        """KV tokens that the masks leave visible."""
        return sum(n if self.window is None else min(n, self.window) for n in self.lengths)

    @property
    def visible_bytes(self) -> int:
        """Bytes of the pages that hold a visible token: what a perfect kernel reads."""
        return sum(len(part) for part in self.visible_pages()) * self.page_bytes

    def tables(self) -> np.ndarray:
        """i32[seqs, pages_per_seq], the pages shuffled over the pool; entries that nobody needs are 0."""
        return pages.tables(self._page_counts(), self.pages_per_seq, self.pool_pages)

    def visible_pages(self) -> list[np.ndarray]:
        """Each sequence's pages that hold a visible token, in order."""
        firsts = [0 if self.window is None else max(0, n - self.window) // self.page_size for n in self.lengths]
        return [row[first:end] for row, first, end in zip(self.tables(), firsts, self._page_counts(), strict=True)]

    def _page_counts(self) -> list[int]:
        return [-(-n // self.page_size) for n in self.lengths]


def _short_lengths() -> tuple[int, ...]:
    return tuple(int(n) for n in np.random.default_rng(0).integers(1, 301, 64))


_LONG, _ONE = (4096,) * 16, (32768,)
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
        Shape("short-p16", 32, 8, 128, 16, _short_lengths()),
    )
}


def describe(shape: Shape) -> str:
    """Heads, dims, lengths and terms, for a table's title."""
    even = len(set(shape.lengths)) == 1
    tokens = str(shape.lengths[0]) if even else f"{min(shape.lengths)} to {max(shape.lengths)}"
    terms = [f"window {shape.window}"] if shape.window else []
    terms += [f"soft cap {shape.soft_cap:g}"] if shape.soft_cap else []
    terms += ["sinks"] if shape.has_sinks else []
    heads = f"{shape.q_heads}/{shape.kv_heads} heads of {shape.head_dim}"
    return ", ".join([heads, f"page {shape.page_size}", f"{shape.num_seqs} x {tokens} tokens", *terms])
