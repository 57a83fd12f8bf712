"""`Shape`: a batch to attend over, with its pages in a random physical order in a pool that stays in HBM."""

import dataclasses

import numpy as np

ITEM_BYTES = 2  # bfloat16 everywhere
_POOL_BYTES = 512 << 20  # a smaller pool may be placed in VMEM by XLA, where reading it costs nothing


@dataclasses.dataclass(frozen=True)
class Shape:
    """One step in bfloat16: what attention, over which sequences, each with its query rows and its length.

    The rows of a sequence are its last tokens.
    """

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    seqs: tuple[tuple[int, int], ...]  # (query rows, length)
    _: dataclasses.KW_ONLY
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    is_opaque: bool = False  # the causal mask is a predicate of the user's, of which no coverage is known

    @property
    def rows(self) -> list[int]:
        """Query rows of each sequence."""
        return [rows for rows, _ in self.seqs]

    @property
    def lengths(self) -> list[int]:
        """KV tokens of each sequence, its rows' own among them."""
        return [length for _, length in self.seqs]

    @property
    def num_seqs(self) -> int:
        """Sequences."""
        return len(self.seqs)

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
        """Pages of the pool: those of the batch, or more, so that the pool stays in HBM."""
        return max(sum(self._page_counts()), _POOL_BYTES // self.page_bytes)

    @property
    def visible_pairs(self) -> int:
        """(query row, KV token) pairs that the masks leave visible, a query head."""
        return sum(int(self._visible(np.arange(length - rows, length)).sum()) for rows, length in self.seqs)

    @property
    def visible_bytes(self) -> int:
        """Bytes of the pages that hold a visible token."""
        return sum(len(part) for part in self.visible_pages()) * self.page_bytes

    def query_starts(self) -> np.ndarray:
        """i32[seqs + 1]."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int32)

    def tables(self) -> np.ndarray:
        """i32[seqs, pages_per_seq], the pages shuffled over the pool; entries that nobody needs are 0."""
        counts = self._page_counts()
        ids = np.random.default_rng(0).permutation(self.pool_pages)[: sum(counts)]
        made = np.zeros((self.num_seqs, self.pages_per_seq), np.int32)
        for row, part in enumerate(np.split(ids, np.cumsum(counts)[:-1])):
            made[row, : len(part)] = part
        return made

    def visible_pages(self) -> list[np.ndarray]:
        """Each sequence's pages that hold a visible token, in order."""
        firsts = [0 if self.window is None else max(0, n - rows - self.window + 1) for rows, n in self.seqs]
        ends = self._page_counts()
        return [row[first // self.page_size : end] for row, first, end in zip(self.tables(), firsts, ends, strict=True)]

    def described(self, *batch: str) -> str:
        """Heads, dims and terms, around what is said of the batch: for a table's title."""
        terms = [f"window {self.window}"] if self.window else []
        terms += [f"soft cap {self.soft_cap:g}"] if self.soft_cap else []
        terms += ["sinks"] if self.has_sinks else []
        terms += ["an opaque mask"] if self.is_opaque else []
        heads = f"{self.q_heads}/{self.kv_heads} heads of {self.head_dim}"
        return ", ".join([heads, f"page {self.page_size}", *batch, *terms])

    def _page_counts(self) -> list[int]:
        return [-(-n // self.page_size) for n in self.lengths]

    def _visible(self, positions: np.ndarray) -> np.ndarray:
        """How many tokens a row at each position sees."""
        return positions + 1 if self.window is None else np.minimum(positions + 1, self.window)
