"""`RaggedLists`: what `TpuRagged` computes from a step's sequences alone, once for all layers of one mask."""

from typing import Any, NamedTuple, Self

import jax
from jaxtyping import Array

from ...program import Program, Sequences, visits_by_sort
from ..decode import DecodeLists
from ..pages import Brought, TileVisits, WorkList
from .schedule import RaggedSchedule
from .tiles import query_rows


class Listed(NamedTuple):
    """Tiles with the pages that each visits, and the place of the first token of the step in each tile's sequence if
    the batch brings positions."""

    visited: TileVisits
    place: Array | None

    @classmethod
    def of(cls, program: Program, seqs: Sequences, tiles: Sequences, page_size: int, num_pages: int) -> Self:
        """The pages that tiles of these sequences visit."""
        if seqs.own is None:
            visited, place = TileVisits.of(program, tiles, page_size, num_pages), None
        else:
            seen = query_rows(seqs, tiles)
            visits = visits_by_sort(program, seen, tiles.tables, page_size, num_pages)
            visited = TileVisits(tiles._replace(numbers={}), visits, Brought.of_numbers(program, tiles))
            place = seen.own
        # The pages are listed: nobody reads the tables of tiles any more.
        return cls(visited._replace(tiles=visited.tiles._replace(tables=tiles.tables[:, :0])), place)

    def sliced(self, first: Any, tiles: int) -> Self:
        """So many tiles from tile ``first`` on, which may be traced."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, tiles), self)

    def work_list(self, schedule: RaggedSchedule, entries: slice) -> WorkList:
        """The work list for all tiles, over a range of their entries."""
        work = self.visited.work_list(
            slice(None), entries, splits=1, pages_per_block=schedule.pages_per_block, cores=schedule.cores
        )
        return work._replace(own=self.place)

    def moved(self, first_page: Any) -> Self:
        """The lists for pages that lie ``first_page`` pages further on in the pool."""
        visits = self.visited.visits
        visits = visits._replace(page=visits.page + first_page)
        return self._replace(visited=self.visited._replace(visits=visits))


class RaggedLists(NamedTuple):
    """What a step's calls share. Either part is None where its kernel finds its pages by itself, or does not run.

    - `tiled`: the work list of each prefill kernel; or the tiles, where kernels of some of these are a loop.
    - `single`: the work lists of the decode kernel, for sequences of one row.
    """

    tiled: tuple[WorkList, ...] | Listed | None
    single: DecodeLists | None

    def moved(self, first_page: Any) -> "RaggedLists":
        """The lists for pages that lie ``first_page`` pages further on in the pool."""
        tiled = self.tiled
        if isinstance(tiled, Listed):
            tiled = tiled.moved(first_page)
        elif tiled is not None:
            tiled = tuple(work._replace(page=work.page + first_page) for work in tiled)
        return RaggedLists(tiled, None if self.single is None else self.single.moved(first_page))


def planned(seqs: Sequences) -> RaggedLists | None:
    """The lists of the step, if it has been planned for this lowering."""
    return seqs.planned if isinstance(seqs.planned, RaggedLists) else None
