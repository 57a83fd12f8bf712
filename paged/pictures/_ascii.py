"""Matrices of tiles as lines of ASCII, for terminals."""

from typing import Any

import numpy as np

from ._style import TILES


def table(states: Any) -> list[str]:
    """A line for each row; a space where there is no tile.

    >>> table([["F", "P"], ["S", ""]])
    ['#+', '. ']
    """
    letters = {"": " ", **{letter: tile.ascii for letter, tile in TILES.items()}}
    return ["".join(letters[state] for state in row) for row in np.asarray(states, dtype="U1").tolist()]
