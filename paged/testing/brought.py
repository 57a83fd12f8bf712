"""What the batch of a case brings for its sequences and rows, drawn at the edges; and what each row sees by it."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from paged.spec import AttentionSpec, Given, Value, terms_in

from .cases import Case

_WORD = 32
_GARBAGE = {"int32": (9, -7, 10**6, -(2**31), 2**31 - 1), "float32": (np.nan, np.inf, -1e30, 0.0)}
_FLOATS = (0.25, 1.0, 4.0, 30.0, -0.5)


@dataclasses.dataclass(frozen=True, eq=False)
class Brought:
    """What a batch brings for one sequence of ``length`` tokens, of which the last ``rows`` are this step's rows.

    * ``numbers``: by the name of each `Value` of the spec, a number or a tuple of numbers.
    * ``positions``: of the rows; None where the batch says none.
    * ``ancestors``: for each row, the numbers of the rows that it descends from; None where no term asks.
    """

    length: int
    rows: int
    numbers: dict[str, Any]
    positions: np.ndarray | None
    ancestors: list[set[int]] | None

    @classmethod
    def draw(cls, case: Case, s: int, length: int, rows: int, is_changed: bool) -> "Brought":
        """For the sequence in slot ``s``: drawn from the seed, the slot and the sequence alone."""

        def rng(name: str) -> np.random.Generator:
            return np.random.default_rng([case.seed, 400 + s, is_changed, length, rows, zlib.crc32(name.encode())])

        numbers = {value.name: _numbers(value, length, case.page_size, rng(value.name)) for value in case.spec.values}
        ancestors = depths = positions = None
        if case.spec.has_ancestors:
            ancestors, depths = _tree(rows, rng("tree"))
        if case.brings_positions:
            drawn = rng("positions").integers(-3, length + 6, rows)
            positions = drawn if depths is None else length - rows + depths
        return cls(length, rows, numbers, positions, ancestors)

    def words(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """The ancestors of every row as ``count`` words of bits, with garbage where no row of the sequence is.

        A row sees itself whatever its own bit is, so that bit is garbage too.
        """
        bits = rng.integers(0, 2, (self.rows, count * _WORD))
        for i, above in enumerate(self.ancestors or ()):
            bits[i, : self.rows] = [j in above or (j == i and bits[i, i]) for j in range(self.rows)]
        powers = np.left_shift(np.uint32(1), np.arange(_WORD, dtype=np.uint32))
        return (bits.reshape(self.rows, count, _WORD).astype(np.uint32) * powers).sum(-1, dtype=np.uint32)


def _numbers(value: Value, length: int, page_size: int, rng: np.random.Generator) -> Any:
    """A number, or a tuple of numbers: none, one, exact pages, the length and more, and less than is allowed."""
    ints = (0, 1, 2, page_size, 2 * page_size, page_size + 1, max(length - 1, 0), length, length + 3, 2**31 - 1, -2)
    drawn = rng.choice(ints if value.dtype == "int32" else _FLOATS, value.size or 1).tolist()
    return tuple(drawn) if value.size else drawn[0]


def _tree(rows: int, rng: np.random.Generator) -> tuple[list[set[int]], np.ndarray]:
    """The ancestors of each row of a random forest, and each row's depth. In one of two a parent may follow a child."""
    order = rng.permutation(rows) if rng.random() < 0.5 else np.arange(rows)
    above: list[set[int]] = [set() for _ in range(rows)]
    for i, row in enumerate(order[1:], 1):
        parent = int(order[rng.integers(0, i)])
        if rng.random() < 0.8:
            above[row] = above[parent] | {parent}
    return above, np.array([len(own) for own in above], int)


def batch_arrays(
    case: Case, brought: Sequence[Brought], starts: np.ndarray, tokens: int, rng: np.random.Generator
) -> dict[str, Any]:
    """``values``, ``positions`` and ``ancestors`` of the batch, for `RaggedBatch`.

    **Arguments:**

    - `brought`: of every live sequence.
    - `starts`: where the rows of each sequence begin.
    - `tokens`: rows of the batch. Rows and slots of no sequence get garbage from ``rng``.
    """
    values: dict[str, np.ndarray] = {}
    for value in case.spec.values:
        garbage = rng.choice(_GARBAGE[value.dtype], (case.slots, value.size or 1))
        for s, own in enumerate(brought):
            garbage[s] = own.numbers[value.name]
        values[value.name] = (garbage if value.size else garbage[:, 0]).astype(value.dtype)
    arrays: dict[str, Any] = {"values": values} if values else {}
    if case.brings_positions:
        arrays["positions"] = rng.choice(_GARBAGE["int32"], tokens).astype(np.int32)
    if case.spec.has_ancestors:
        count = -(-(tokens if case.phase == "ragged" else case.rows) // _WORD)
        arrays["ancestors"] = rng.integers(0, 2**32, (tokens, max(1, count)), np.uint32)
    for s, own in enumerate(brought):
        rows = slice(starts[s], starts[s] + own.rows)
        if own.positions is not None:
            arrays["positions"][rows] = own.positions
        if own.ancestors is not None:
            arrays["ancestors"][rows] = own.words(arrays["ancestors"].shape[1], rng)
    return arrays


class Pairs(NamedTuple):
    """What masks and scores see of every query row and every key of its sequence: arrays for [tokens, heads, keys]."""

    p: np.ndarray
    j: np.ndarray
    numbers: dict[str, Any]
    is_ancestor: np.ndarray | None

    @classmethod
    def of(cls, case: Case, brought: Sequence[Brought], starts: np.ndarray, tokens: int) -> "Pairs":
        """Of all rows of a batch. Rows of no sequence are at position 0, and every number is 0 there."""
        p = np.zeros((tokens, 1, 1), np.int32)
        j = np.tile(np.arange(case.capacity, dtype=np.int32), (tokens, 1, 1))
        numbers = {v.name: np.zeros((v.size or 1, tokens, 1, 1), v.dtype) for v in case.spec.values}
        is_ancestor = np.ones(j.shape, bool) if case.spec.has_ancestors else None
        for s, own in enumerate(brought):
            rows, first = slice(starts[s], starts[s] + own.rows), own.length - own.rows
            places = first + np.arange(own.rows)
            at = places if own.positions is None else own.positions
            p[rows, 0, 0] = at
            is_key = (places >= 0) & (places < case.capacity)
            j[rows, 0, places[is_key]] = at[is_key]
            for name, x in numbers.items():
                x[:, rows] = np.reshape(own.numbers[name], (-1, 1, 1, 1))
            if is_ancestor is not None and own.ancestors is not None:
                for i, above in enumerate(own.ancestors):
                    is_seen = np.array([k == i or k in above for k in range(own.rows)], bool)
                    is_ancestor[starts[s] + i, 0, places[is_key]] = is_seen[is_key]
        by_value = {v.name: tuple(numbers[v.name]) if v.size else numbers[v.name][0] for v in case.spec.values}
        return cls(p, j, by_value, is_ancestor)

    def visible(self, spec: AttentionSpec) -> np.ndarray:
        """Which pairs the mask shows: bool[tokens, heads, keys], heads 1 where they do not differ."""
        head = np.arange(spec.num_q_heads, dtype=np.int32)[None, :, None]
        mask: Any = spec.visibility.given(Given(self.numbers, head, self.is_ancestor))
        heads = head.shape[1] if any(term.has_heads for term in terms_in(spec.visibility)) else 1
        return np.broadcast_to(np.asarray(mask(self.p, self.j)), (len(self.p), heads, self.j.shape[2]))


def ops_of(spec: AttentionSpec, numbers: Any) -> list[Any]:
    """The score operations of a spec's ``scores``, with these numbers."""
    return [op.bind(spec.num_q_heads).given(Given(numbers)) for op in spec.scores]
