"""All-pairs tables: few rows in which any two levels of any two factors meet at least once."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_CANDIDATES = 40

# A factor, and which of its levels.
Item = tuple[str, int]


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
    missing = _allowed_pairs(factors, is_allowed)
    rows = []
    while pairs := sorted((p, q) for p, met in missing.items() for q in met if p < q):
        candidates = (_candidate(rng, factors, pairs, missing, is_allowed) for _ in range(_CANDIDATES))
        row = max(candidates, key=lambda r: sum(q in missing[p] for p, q in itertools.combinations(r.items(), 2)))
        for p, q in itertools.permutations(row.items(), 2):
            missing[p].discard(q)
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


def _allowed_pairs(factors: Mapping[str, Sequence[Any]], is_allowed: Callable[..., bool]) -> dict[Item, set[Item]]:
    """The levels that each level may meet."""
    met = {(name, x): set() for name, levels in factors.items() for x in range(len(levels))}
    for p, q in itertools.combinations(met, 2):
        if p[0] != q[0] and is_allowed({name: factors[name][x] for name, x in (p, q)}):
            met[p].add(q)
            met[q].add(p)
    return met


def _candidate(
    rng: random.Random,
    factors: Mapping[str, Sequence[Any]],
    pairs: Sequence[tuple[Item, Item]],
    missing: Mapping[Item, set[Item]],
    is_allowed: Callable[..., bool],
) -> dict[str, int]:
    """A row grown from one of the missing ``pairs``, each further factor at the level that covers most."""
    row = dict(rng.choice(pairs))
    names = [name for name in factors if name not in row]
    rng.shuffle(names)
    for name in names:
        known = {other: factors[other][x] for other, x in row.items()}
        levels = rng.sample(range(len(factors[name])), len(factors[name]))
        levels = [x for x in levels if is_allowed({**known, name: factors[name][x]})]
        row[name] = max(levels, key=lambda x: sum(pair in missing[name, x] for pair in row.items()))
    return row
