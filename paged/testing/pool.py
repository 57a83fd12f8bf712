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
from .pool_model import CAPACITY, PAGES, SIZE, SLOTS, WIDTH, PoolModel
from .strategies import pool_tokens

_MASKS = (Causal() & Window(3), Causal() & (Prefix(1) | Window(1)), Causal() & Chunk(3), Causal())
_FEW = st.lists(st.integers(0, 3), min_size=SLOTS, max_size=SLOTS)
_PER_SLOT = st.lists(pool_tokens(CAPACITY), min_size=SLOTS, max_size=SLOTS)
_SLOT_OR_NONE = st.lists(st.sampled_from([-1, 0, 1, 2, 2, 1, 0, SLOTS, -2]), min_size=SLOTS, max_size=SLOTS)


class PoolMachine(RuleBasedStateMachine):
    """A state machine over a pool. Subclass it with rules for operations of your own, and run it with `check_pool`.

    * ``pool_type``: the class of pools, made by ``pool_type.init(num_pages, num_slots, pages_per_seq, page_size)``.
    * ``self.pool``: the pool. ``self.model``: the same in plain Python, a `PoolModel`.

    After every operation: tables and lengths are the model's, entries past a slot's pages and in place of trimmed pages
    are -1, a page's count is the number of slots and of copies that hold it, and counts, tables and free pages agree.
    No page with several holders is written, and every slot finds its own tokens, whatever others write.
    """

    pool_type: ClassVar[Any] = PagePool

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.pool_type.init(PAGES, SLOTS, WIDTH, SIZE)
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

    @rule(is_released=st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS))
    def release(self, is_released: list[bool]) -> None:
        """Slots emptied."""
        self.pool = _jitted(self.pool_type, "release")(self.pool, jnp.asarray(is_released))
        for slot in np.flatnonzero(is_released):
            self.model.release(int(slot))

    @rule(source=_SLOT_OR_NONE)
    def fork(self, source: list[int]) -> None:
        """Slots with all tokens of others."""
        self.step()
        self.pool, ok = _jitted(self.pool_type, "fork")(self.pool, jnp.asarray(source, jnp.int32))
        want = self.model.share(source, [self.model.lengths[min(max(at, 0), SLOTS - 1)] for at in source])
        require(ok.tolist() == want, "ok", f"ok of fork({source}) is {ok.tolist()}, and must be {want}")

    @rule(source=_SLOT_OR_NONE, tokens=_PER_SLOT)
    def share(self, source: list[int], tokens: list[int]) -> None:
        """Slots with some tokens of others."""
        self.step()
        arguments = (jnp.asarray(x, jnp.int32) for x in (source, tokens))
        self.pool, ok = _jitted(self.pool_type, "share")(self.pool, *arguments)
        want = self.model.share(source, tokens)
        require(ok.tolist() == want, "ok", f"ok of share({source}, {tokens}) is {ok.tolist()}, and must be {want}")

    @rule(parents=_SLOT_OR_NONE)
    def reorder(self, parents: list[int]) -> None:
        """Slots that continue others."""
        self.step()
        self.pool, ok = _jitted(self.pool_type, "reorder")(self.pool, jnp.asarray(parents, jnp.int32))
        want = self.model.reorder(parents)
        require(ok.tolist() == want, "ok", f"ok of reorder({parents}) is {ok.tolist()}, and must be {want}")

    @rule()
    def settle(self) -> None:
        """Copied pages let go."""
        self.step()
        self.pool = _jitted(self.pool_type, "settle")(self.pool)
        self.model.settle()

    @rule()
    def step(self) -> None:
        """A step of all tokens that are counted and not written."""
        rows = self.model.unwritten()
        batch = _jitted(self.pool_type, "ragged_batch")(self.pool, jnp.asarray(rows, jnp.int32))
        self.model.step(batch.copy_from.tolist())

    @rule(mask=st.sampled_from(_MASKS), tokens=_FEW)
    def trim(self, mask: Mask, tokens: list[int]) -> None:
        """Pages freed that a mask hides, and then a few tokens more, as before a step."""
        self.step()
        self.pool = _trimmed(self.pool, mask)
        self.model.trim(mask)
        self.extend(tokens)

    @invariant()
    def agrees(self) -> None:
        """The pool is what the model says."""
        model, pool = self.model, self.pool
        tables = [table + [-1] * (WIDTH - len(table)) for table in model.tables]
        counts = np.bincount(np.array(model.held(), int), minlength=PAGES)
        for name, got, want in (
            ("block_tables", pool.block_tables.tolist(), tables),
            ("lengths", pool.lengths.tolist(), model.lengths),
            ("ref_counts", pool.ref_counts.tolist(), counts.tolist()),
            ("num_free", int(pool.num_free), model.num_free()),
        ):
            require(got == want, name, f"the pool has {got}, and must have {want}")
        model.require_tokens()


@functools.cache
def _jitted(pool_type: Any, name: str) -> Any:
    return jax.jit(getattr(pool_type, name))


@functools.partial(jax.jit, static_argnums=1)
def _trimmed(pool: Any, mask: Mask) -> Any:
    return pool.trim(mask)


def check_pool(
    pool_type: Any = PagePool, *, machine: type[PoolMachine] = PoolMachine, examples: int = 30, steps: int = 12
) -> None:
    """Check a class of page pools against plain Python, over random sequences of operations.

    **Arguments:**

    - `pool_type`: a class with the operations of `PagePool`.
    - `machine`: a subclass of `PoolMachine` with more rules.
    - `examples`: how many sequences of operations.
    - `steps`: the most operations of each.

    **Raises:** `CheckFailure` with the shortest sequence of operations that fails, named after what is wrong:
    ``"only free pages are handed out"``, ``"no shared page is written"``, ``"what is copied is held"``, ``"tokens"``,
    ``"ok"``, ``"block_tables"``, ``"lengths"``, ``"ref_counts"`` or ``"num_free"``.

    >>> check_pool(PagePool, examples=2)
    """
    chosen = type(machine.__name__, (machine,), {"pool_type": pool_type})
    run_state_machine_as_test(
        chosen,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None, report_multiple_bugs=False
        ),
    )
