"""`Rows`: which rows of the table of requests are free, and in which shard of sequences a request goes."""

import collections
from collections.abc import Iterable, Sequence


class Rows:
    """The free rows of the table of requests: those of the first shard come first, then those of the second.

    **Arguments:**

    - `rows`, `slots`: how many each shard has. - `shards`: how many there are; 1 without a mesh.
    """

    def __init__(self, rows: int, slots: int, shards: int):
        self._free = [collections.deque(range(i * rows, (i + 1) * rows)) for i in range(shards)]
        self._rows, self._slots = rows, slots
        self._latest = (-1, 0)  # the family of the latest request, and its shard

    def take(self, families: Iterable[int]) -> list[int]:
        """A row for each of some requests, as long as there are free ones.

        A request goes to the shard that has the fewest, and a sample to the latest one of its prompt, whose pages it
        shares, while that shard has no more requests than slots.

        **Arguments:**

        - `families`: of the requests, in order, see `NewRequest`.
        """
        taken: list[int] = []
        for family in families:
            held = [self._rows - len(free) for free in self._free]
            shard = self._latest[1]
            if family < 0 or family != self._latest[0] or held[shard] >= self._slots:
                shard = held.index(min(held))
            if not self._free[shard]:
                break
            self._latest = family, shard
            taken.append(self._free[shard].popleft())
        return taken

    def give_back(self, rows: Sequence[int]) -> None:
        """These rows are free again."""
        for row in rows:
            self._free[row // self._rows].append(row)
