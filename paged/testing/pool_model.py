"""`PoolModel`: the book-keeping of a page pool in plain Python, with the tokens that are in the pages."""

import itertools

import numpy as np

from paged.spec import Mask

from .failures import require

PAGES, SLOTS, WIDTH, SIZE = 7, 3, 4, 2
CAPACITY = WIDTH * SIZE


class PoolModel:
    """The book-keeping of a pool with lists and loops.

    * ``tables``: the pages of each slot. A page that was trimmed is -1 in its slot's list.
    * ``lengths``: how many tokens each slot has.
    * ``copies``: for a slot that has got a page of its own in place of a shared one, that page and the token at which
      the slot begins to write; else None.
    * ``tokens``: a number for every token of each slot, one for each that was ever written.
    * ``memory``: the number that lies at every place of every page.
    """

    def __init__(self) -> None:
        self.tables: list[list[int]] = [[] for _ in range(SLOTS)]
        self.lengths = [0] * SLOTS
        self.copies: list[tuple[int, int] | None] = [None] * SLOTS
        self.tokens: list[list[int]] = [[] for _ in range(SLOTS)]
        self.memory = np.full((PAGES, SIZE), -1)
        self._names = itertools.count()

    def held(self) -> list[int]:
        """The pages of all slots and of the copies, each as often as it is held."""
        in_tables = [page for table in self.tables for page in table if page >= 0]
        return in_tables + [copy[0] for copy in self.copies if copy is not None]

    def num_free(self) -> int:
        """Pages that nobody holds."""
        return PAGES - len(set(self.held()))

    def reserve(self, tokens: list[int], new: list[list[int]]) -> list[bool]:
        """Which slots get room for so many tokens. ``new`` is the pool's tables, from which new pages are read."""
        held, ok, dropped = self.held(), [], []
        shared = [n < count <= CAPACITY and held.count(self._next_page(s)) > 1 for s, (n, count) in self._with(tokens)]
        for slot, (length, count) in self._with(tokens):
            table, held = self.tables[slot], {*self.held(), *dropped}
            more = max(0, -(-count // SIZE) - len(table))
            ok.append(0 <= count <= CAPACITY and more + shared[slot] <= PAGES - len(held))
            if ok[-1]:
                own = [length // SIZE] if shared[slot] else []
                taken = [new[slot][i] for i in [*own, *range(len(table), len(table) + more)]]
                is_free = len(set(taken)) == len(taken) and not held & set(taken)
                require(is_free, "only free pages are handed out", f"slot {slot} got {taken}, held: {held}")
                is_real = all(0 <= page < PAGES for page in taken)
                require(is_real, "only free pages are handed out", f"slot {slot} got {taken} of {PAGES} pages")
                if own:
                    copy = self.copies[slot]
                    dropped += [] if copy is None else [copy[0]]
                    self.copies[slot] = table[own[0]], length
                    table[own[0]] = taken.pop(0)
                table += taken
        return ok

    def extend(self, tokens: list[int], new: list[list[int]]) -> list[bool]:
        """`reserve` for tokens more than there are."""
        wanted = [n + m if m >= 0 else -1 for _, (n, m) in self._with(tokens)]
        ok = self.reserve(wanted, new)
        self.lengths = [n + m if o else n for n, m, o in zip(self.lengths, tokens, ok, strict=True)]
        return ok

    def release(self, slot: int) -> None:
        """Empty a slot."""
        self.tables[slot], self.lengths[slot], self.tokens[slot], self.copies[slot] = [], 0, [], None

    def share(self, source: list[int], tokens: list[int]) -> list[bool]:
        """Which slots get the first tokens of other slots."""
        ok, new = [], {}
        for slot, (at, count) in enumerate(zip(source, tokens, strict=True)):
            may = 0 <= at < SLOTS and not self.tables[slot] and 0 <= count <= self.lengths[at]
            # Fewer tokens than the source has may need a page that it has trimmed.
            may = may and (count == self.lengths[at] or min(self._first_pages(at, count), default=0) >= 0)
            ok.append(may or at == -1)
            if may:
                new[slot] = self._first_pages(at, count), count, self.tokens[at][:count]
        # All at once: no slot gets what another one gets in the same call.
        for slot, parts in new.items():
            self.tables[slot], self.lengths[slot], self.tokens[slot] = parts
        return ok

    def reorder(self, parents: list[int]) -> list[bool]:
        """Make every slot a continuation of another."""
        new = []
        for slot, parent in enumerate(parents):
            own = self.tables[slot], self.lengths[slot], self.tokens[slot], self.copies[slot]
            if parent == -1:
                new.append(([], 0, [], None))
            elif parent == slot or not 0 <= parent < SLOTS:
                new.append(own)
            else:
                length = self.lengths[parent]
                new.append((self._first_pages(parent, length), length, [*self.tokens[parent]], None))
        for slot, parts in enumerate(new):
            self.tables[slot], self.lengths[slot], self.tokens[slot], self.copies[slot] = parts
        return [-1 <= parent < SLOTS for parent in parents]

    def settle(self) -> None:
        """Let go of what was copied: of slots that have tokens past the one at which they began to write."""
        for slot, copy in enumerate(self.copies):
            if copy is not None and self.lengths[slot] > copy[1]:
                self.copies[slot] = None

    def trim(self, mask: Mask) -> None:
        """Free the full pages of which no position to come sees a token."""
        for table, length in zip(self.tables, self.lengths, strict=True):
            for i in range(length // SIZE):
                keys = range(i * SIZE, (i + 1) * SIZE)
                if not any(mask(p, j) for p in range(length, 2 * CAPACITY) for j in keys):
                    table[i] = -1

    def unwritten(self) -> list[int]:
        """How many tokens of each slot are counted and not written yet."""
        return [n - len(own) for n, own in zip(self.lengths, self.tokens, strict=True)]

    def step(self, copy_from: list[int]) -> None:
        """Write the tokens that are not written, as a step does: its copies first."""
        rows, held, before = self.unwritten(), self.held(), self.memory.copy()
        for slot, source in enumerate(copy_from):
            if rows[slot] and source >= 0:
                page = self.tables[slot][len(self.tokens[slot]) // SIZE]
                require(source in held, "what is copied is held", f"slot {slot} copies page {source}, held: {held}")
                self.memory[page] = before[source]
        for slot, count in enumerate(rows):
            for _ in range(count):
                entry, offset = divmod(len(self.tokens[slot]), SIZE)
                page, name = self.tables[slot][entry], next(self._names)
                is_own = held.count(page) == 1
                require(is_own, "no shared page is written", f"slot {slot} writes page {page}, held: {held}")
                self.memory[page, offset] = name
                self.tokens[slot].append(name)

    def require_tokens(self) -> None:
        """Raise `CheckFailure` unless every slot finds each of its tokens where its table leads."""
        for slot, own in enumerate(self.tokens):
            for j, name in enumerate(own):
                page = self.tables[slot][j // SIZE]
                if page >= 0:
                    found = int(self.memory[page, j % SIZE])
                    where = f"slot {slot} finds {found} in place of token {j}, {name}, on page {page}"
                    require(found == name or self._is_to_be_copied(slot, j), "tokens", where)

    def _is_to_be_copied(self, slot: int, token: int) -> bool:
        """Whether a token lies on the shared page still: the slot has a page of its own, which no step has written."""
        copy, length = self.copies[slot], len(self.tokens[slot])
        if copy is None or copy[1] != length or token // SIZE != length // SIZE:
            return False
        return int(self.memory[copy[0], token % SIZE]) == self.tokens[slot][token]

    def _with(self, tokens: list[int]) -> list[tuple[int, tuple[int, int]]]:
        return list(enumerate(zip(self.lengths, tokens, strict=True)))

    def _next_page(self, slot: int) -> int:
        """The page in which a slot goes on to write, -1 where it has none."""
        table, entry = self.tables[slot], self.lengths[slot] // SIZE
        return table[entry] if entry < len(table) else -1

    def _first_pages(self, slot: int, tokens: int) -> list[int]:
        pages, copy = self.tables[slot][: -(-tokens // SIZE)], self.copies[slot]
        if copy is not None and tokens <= copy[1] and copy[1] // SIZE < len(pages):
            pages[copy[1] // SIZE] = copy[0]
        return pages
