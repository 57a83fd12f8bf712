"""`PoolMachine`: random operations on a page pool, beside the same book-keeping in plain Python."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from paged.runtime import PagePool
from paged.spec import Causal, Chunk, Mask, Prefix, Window

from .failures import require
from .strategies import pool_tokens

_PAGES, _SLOTS, _WIDTH, _SIZE = 7, 3, 4, 2
_CAPACITY = _WIDTH * _SIZE
_MASKS = (Causal() & Window(3), Causal() & (Prefix(1) | Window(1)), Causal() & Chunk(3), Causal())
_PER_SLOT = st.lists(pool_tokens(_CAPACITY), min_size=_SLOTS, max_size=_SLOTS)


class PoolModel:
    """The book-keeping of a pool with lists and loops: which pages each slot holds, and how many tokens it has.

    A page that was trimmed is -1 in its slot's list.
    """

    def __init__(self) -> None:
        self.tables: list[list[int]] = [[] for _ in range(_SLOTS)]
        self.lengths = [0] * _SLOTS

    def held(self) -> list[int]:
        """The pages of all slots, each as often as it is held."""
        return [page for table in self.tables for page in table if page >= 0]

    def num_free(self) -> int:
        """Pages that no slot holds."""
        return _PAGES - len(set(self.held()))

    def reserve(self, tokens: list[int], new: list[list[int]]) -> list[bool]:
        """Which slots get room for so many tokens. ``new`` is the pool's tables, from which new pages are read."""
        ok = []
        for slot, count in enumerate(tokens):
            table = self.tables[slot]
            more = max(0, -(-count // _SIZE) - len(table))
            ok.append(0 <= count <= _CAPACITY and more <= self.num_free())
            if ok[-1]:
                taken = new[slot][len(table) : len(table) + more]
                held = set(self.held())
                is_free = len(set(taken)) == more and not held & set(taken)
                require(is_free, "only free pages are handed out", f"slot {slot} got {taken}, held: {held}")
                is_real = all(0 <= page < _PAGES for page in taken)
                require(is_real, "only free pages are handed out", f"slot {slot} got {taken} of {_PAGES} pages")
                table += taken
        return ok

    def extend(self, tokens: list[int], new: list[list[int]]) -> list[bool]:
        """`reserve` for tokens more than there are."""
        wanted = [n + m if m >= 0 else -1 for n, m in zip(self.lengths, tokens, strict=True)]
        ok = self.reserve(wanted, new)
        self.lengths = [n + m if o else n for n, m, o in zip(self.lengths, tokens, ok, strict=True)]
        return ok

    def trim(self, mask: Mask) -> None:
        """Free the full pages of which no position to come sees a token."""
        for table, length in zip(self.tables, self.lengths, strict=True):
            for i in range(length // _SIZE):
                keys = range(i * _SIZE, (i + 1) * _SIZE)
                if not any(mask(p, j) for p in range(length, 2 * _CAPACITY) for j in keys):
                    table[i] = -1


class PoolMachine(RuleBasedStateMachine):
    """A state machine over a pool. Subclass it with rules for operations of your own, and run it with `check_pool`.

    * ``pool_type``: the class of pools, made by ``pool_type.init(num_pages, num_slots, pages_per_seq, page_size)``.
    * ``self.pool``: the pool. ``self.model``: the same in plain Python, a `PoolModel`.

    After every operation: tables and lengths are the model's, entries past a slot's pages and in place of trimmed pages
    are -1, a page's count is the number of slots that hold it, and counts, tables and free pages agree.
    """

    pool_type: ClassVar[Any] = PagePool

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.pool_type.init(_PAGES, _SLOTS, _WIDTH, _SIZE)
        self.model = PoolModel()

    @rule(tokens=_PER_SLOT)
    def reserve(self, tokens: list[int]) -> None:
        """Room for tokens."""
        self.pool, ok = _jitted(self.pool_type, "reserve")(self.pool, jnp.asarray(tokens, jnp.int32))
        want = self.model.reserve(tokens, self.pool.block_tables.tolist())
        require(ok.tolist() == want, "ok", f"ok of reserve({tokens}) is {ok.tolist()}, and must be {want}")

    @rule(tokens=_PER_SLOT)
    def extend(self, tokens: list[int]) -> None:
        """More tokens."""
        self.pool, ok = _jitted(self.pool_type, "extend")(self.pool, jnp.asarray(tokens, jnp.int32))
        want = self.model.extend(tokens, self.pool.block_tables.tolist())
        require(ok.tolist() == want, "ok", f"ok of extend({tokens}) is {ok.tolist()}, and must be {want}")

    @rule(is_released=st.lists(st.booleans(), min_size=_SLOTS, max_size=_SLOTS))
    def release(self, is_released: list[bool]) -> None:
        """Slots emptied."""
        self.pool = _jitted(self.pool_type, "release")(self.pool, jnp.asarray(is_released))
        for slot in np.flatnonzero(is_released):
            self.model.tables[slot], self.model.lengths[slot] = [], 0

    @rule(mask=st.sampled_from(_MASKS))
    def trim(self, mask: Mask) -> None:
        """Pages freed that a mask hides."""
        self.pool = _trimmed(self.pool, mask)
        self.model.trim(mask)

    @invariant()
    def agrees(self) -> None:
        """The pool is what the model says."""
        model, pool = self.model, self.pool
        tables = [table + [-1] * (_WIDTH - len(table)) for table in model.tables]
        counts = np.bincount(np.array(model.held(), int), minlength=_PAGES)
        for name, got, want in (
            ("block_tables", pool.block_tables.tolist(), tables),
            ("lengths", pool.lengths.tolist(), model.lengths),
            ("ref_counts", pool.ref_counts.tolist(), counts.tolist()),
            ("num_free", int(pool.num_free), model.num_free()),
        ):
            require(got == want, name, f"the pool has {got}, and must have {want}")


@functools.cache
def _jitted(pool_type: Any, name: str) -> Any:
    return jax.jit(getattr(pool_type, name))


@functools.partial(jax.jit, static_argnums=1)
def _trimmed(pool: Any, mask: Mask) -> Any:
    return pool.trim(mask)


def check_pool(pool_type: Any = PagePool, *, machine: type[PoolMachine] = PoolMachine, examples: int = 30) -> None:
    """Check a class of page pools against plain Python, over random sequences of operations.

    **Arguments:**

    - `pool_type`: a class with the operations of `PagePool`.
    - `machine`: a subclass of `PoolMachine` with more rules.
    - `examples`: how many sequences of operations.

    **Raises:** `CheckFailure` with the shortest sequence of operations that fails, named after what is wrong:
    ``"only free pages are handed out"``, ``"ok"``, ``"block_tables"``, ``"lengths"``, ``"ref_counts"`` or
    ``"num_free"``.

    >>> check_pool(PagePool, examples=2)
    """
    chosen = type(machine.__name__, (machine,), {"pool_type": pool_type})
    run_state_machine_as_test(
        chosen,
        settings=settings(
            max_examples=examples, stateful_step_count=12, deadline=None, database=None, report_multiple_bugs=False
        ),
    )
