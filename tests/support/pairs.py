"""All-pairs tables: few rows in which any two levels of any two factors meet at least once."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_CANDIDATES = 40


def covering_rows(
    factors: Mapping[str, Sequence[Any]],
    seed: int = 0,
    is_allowed: Callable[[Mapping[str, Any]], bool] = lambda row: True,
) -> list[dict[str, Any]]:
    """Rows that cover every pair of levels, chosen greedily (Cohen et al., the AETG system, 1997); the same each run.

    ``is_allowed(part of a row)`` says which levels may meet; it must leave every level something to meet.

    >>> rows = covering_rows({"a": "xy", "b": "xy", "c": "xy"})
    >>> len(rows), sorted({(row["a"], row["c"]) for row in rows})
    (4, [('x', 'x'), ('x', 'y'), ('y', 'x'), ('y', 'y')])
    """
    rng = random.Random(seed)
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(factors, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
        if is_allowed({a: factors[a][x], b: factors[b][y]})
    }
    rows = []
    while missing:
        row = max(
            (_candidate(rng, factors, missing, is_allowed) for _ in range(_CANDIDATES)),
            key=lambda r: len(_pairs(r) & missing),
        )
        missing -= _pairs(row)
        # In the order of the factors, and not of a set's hashes, which differ between processes.
        rows.append({name: levels[row[name]] for name, levels in factors.items()})
    return rows


def assert_every_pair_meets(
    rows: Sequence[Mapping[str, Any]],
    factors: Mapping[str, Sequence[Any]],
    is_allowed: Callable[[Mapping[str, Any]], bool] = lambda row: True,
) -> None:
    """Rows have exactly the pairs of levels that are allowed."""
    for a, b in itertools.combinations(factors, 2):
        wanted = {(x, y) for x in factors[a] for y in factors[b] if is_allowed({a: x, b: y})}
        assert {(row[a], row[b]) for row in rows} == wanted, (a, b)


def assert_every_level(rows: Sequence[Mapping[str, Any]], factors: Mapping[str, Sequence[Any]]) -> None:
    """Every level of every factor is in some row."""
    levels = {(name, x) for name, levels in factors.items() for x in levels}
    missing = levels - {(name, row[name]) for row in rows for name in factors}
    assert not missing, missing


def named(row: Mapping[str, Any], *without: str) -> str:
    """What a test of a row is called."""
    return "-".join(str(level) for name, level in row.items() if name not in without)


def _candidate(
    rng: random.Random, factors: Mapping[str, Sequence[Any]], missing: set, is_allowed: Callable[..., bool]
) -> dict[str, int]:
    """A row grown from one missing pair, each further factor at the level that covers most."""
    row = dict(rng.choice(sorted(missing, key=sorted)))
    names = [name for name in factors if name not in row]
    rng.shuffle(names)
    for name in names:
        known = {other: factors[other][x] for other, x in row.items()}
        levels = rng.sample(range(len(factors[name])), len(factors[name]))
        levels = [x for x in levels if is_allowed({**known, name: factors[name][x]})]
        gain = {x: sum(frozenset(((name, x), pair)) in missing for pair in row.items()) for x in levels}
        row[name] = max(levels, key=lambda x: gain[x])
    return row


def _pairs(row: dict[str, int]) -> set:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
