"""`check_layer` and `check_model`: what is served from pages equals what is computed without them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from paged.runtime import pools_of
from paged.spec import Pages, RaggedBatch

from .failures import CheckFailure

_LENGTHS = (11, 5, 8)  # tokens of three sequences: with pages of 4 more than two pages, one and a bit, exactly two
_ROWS = 8  # rows of one step

# Rows of each sequence in each step. A pair (slot, -1) gives the slot's pages back, as a preemption does: its tokens
# are then computed again, into other pages.
Plan = Sequence[Sequence[tuple[int, int]]]
PLANS: dict[str, Plan] = {
    "chunks of one sequence after the other": [[(0, 8)], [(0, 3)], [(1, 5)], [(2, 8)]],
    "token by token": [[(0, 1), (1, 1), (2, 1)]] * 5 + [[(0, 1), (2, 1)]] * 3 + [[(0, 1)]] * 3,
    "chunks beside decoding, and a preemption": [
        [(0, 5), (1, 1)],
        [(0, 1), (1, 3), (2, 4)],
        [(1, -1), (0, 1), (2, 1)],
        [(0, 1), (2, 3), (1, 4)],
        [(0, 3), (1, 1)],
    ],
}


class _Place(NamedTuple):
    """What a check needs of a state: the page size, and how many pages each `Pages` of it has."""

    page_size: int
    num_pages: int


def check_layer(layer: Any, state: eqx.nn.State, *, tolerance: float = 2e-4) -> None:
    """Check that a layer that is served equals the layer without pages, for any chunks, page order and preemption.

    **Arguments:**

    - `layer`: called as ``y, state = layer(x, batch, state)``, with ``layer.dense(x)`` of ``x`` [batch, tokens,
      embed_dim] beside it, such as a `PagedAttention`.
    - `state`: its state. Its pages are filled with NaN first, and hold at least 12 pages.
    - `tolerance`: the largest error, as a part of the largest output. The default is for float32 pages: sums over the
      same few numbers in another order. Pages of bfloat16 need about 2e-2.

    **Raises:** `CheckFailure` with the plan, the sequence and the token of the first output that differs.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> layer, state = eqx.nn.make_with_state(PagedAttention)(spec, layout, 16, 32, key=jax.random.key(0))
    >>> check_layer(layer, state)
    """
    width = layer.embed_dim if hasattr(layer, "embed_dim") else layer.query_proj.in_features
    inputs = [np.random.default_rng(i).normal(size=(n, width)).astype(np.float32) for i, n in enumerate(_LENGTHS)]
    dense = eqx.filter_jit(lambda layer, x: layer.dense(x)[0])
    want = [dense(layer, x[None]) for x in inputs]
    _check_served(layer, state, inputs, want, tolerance)


def check_model(
    model: Any,
    state: eqx.nn.State,
    *,
    vocab_size: int,
    dense: Callable[[jax.Array], jax.Array] | None = None,
    tolerance: float = 2e-4,
) -> None:
    """Check that a model that is served equals the model without pages, for any chunks, page order and preemption.

    **Arguments:**

    - `model`: called as ``logits, state = model(tokens, batch, state)``, as `generate` calls it.
    - `state`: its state. Its pages are filled with NaN first, and hold at least 12 pages.
    - `vocab_size`: token ids are drawn below it.
    - `dense`: ``dense(tokens)`` gives the logits [tokens, vocab] of one whole sequence; by default ``model.dense``.
    - `tolerance`: the largest error, as a part of the largest logit.

    **Raises:** `CheckFailure` with the plan, the sequence and the token of the first logits that differ.

    >>> class OneLayer(eqx.Module):
    ...     embedding: jax.Array
    ...     layer: PagedAttention
    ...     def __call__(self, tokens, batch, state):
    ...         y, state = self.layer(self.embedding[tokens], batch, state)
    ...         return y @ self.embedding.T, state
    ...     def dense(self, tokens):
    ...         return self.layer.dense(self.embedding[tokens][None])[0] @ self.embedding.T
    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
    >>> layer, state = eqx.nn.make_with_state(PagedAttention)(spec, layout, 16, 16, key=jax.random.key(0))
    >>> check_model(OneLayer(jax.random.normal(jax.random.key(1), (9, 16)), layer), state, vocab_size=9)
    """
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, vocab_size, n).astype(np.int32) for n in _LENGTHS]
    if dense is None:
        jitted = eqx.filter_jit(lambda model, tokens: model.dense(tokens))
        want = [jitted(model, jnp.asarray(tokens)) for tokens in inputs]
    else:
        want = [dense(jnp.asarray(tokens)) for tokens in inputs]
    _check_served(model, state, inputs, want, tolerance)


def _check_served(
    run: Any, state: eqx.nn.State, inputs: list[np.ndarray], want: list[jax.Array], tolerance: float
) -> None:
    place = _place_of(state)
    step = eqx.filter_jit(lambda rows, batch, state: run(rows, batch, state))
    for seed, (name, plan) in enumerate(PLANS.items()):
        got = _serve(step, _poisoned(state), place, inputs, plan, seed)
        for slot, (served, exact) in enumerate(zip(got, want, strict=True)):
            error = np.abs(served - np.asarray(exact, np.float32)).max(-1)
            allowed = tolerance * float(np.abs(np.asarray(exact)).max())
            wrong = np.flatnonzero(~(error <= allowed))
            if len(wrong):
                raise CheckFailure(
                    "served equals dense",
                    f'in the plan "{name}", token {int(wrong[0])} of sequence {slot} (of '
                    f"{len(served)} tokens) differs by {error[wrong[0]]:.3g}; allowed {allowed:.3g}. Is a position, a "
                    "mask or a state of the model taken from the step and not from the sequence?",
                )


def _serve(
    step: Any, state: eqx.nn.State, place: _Place, inputs: list[np.ndarray], plan: Plan, seed: int
) -> list[np.ndarray]:
    """The outputs of every token, served by a plan, in pages of a random order."""
    free = list(np.random.default_rng(seed).permutation(place.num_pages))
    width = -(-max(_LENGTHS) // place.page_size)
    tables, done = np.full((len(inputs), width), -1, np.int32), [0] * len(inputs)
    outputs: list[list[Any]] = [[None] * len(x) for x in inputs]
    for rows_of in plan:
        for slot, count in rows_of:
            if count < 0:  # The pages go to the end of the free ones, so that the sequence gets others.
                free += [int(page) for page in tables[slot] if page >= 0]
                tables[slot], done[slot] = -1, 0
        counts = [sum(count for slot, count in rows_of if slot == s and count > 0) for s in range(len(inputs))]
        for slot, count in enumerate(counts):
            needed = -(-(done[slot] + count) // place.page_size)
            for entry in np.flatnonzero(tables[slot, :needed] < 0):
                tables[slot, entry] = free.pop(0)
        out, state = step(*_rows(counts, tables, done, inputs), state)
        first, rows = 0, np.asarray(out, np.float32)
        for slot, count in enumerate(counts):
            for i in range(count):
                outputs[slot][done[slot] + i] = rows[first + i]
            first, done[slot] = first + count, done[slot] + count
    return [np.stack(rows) for rows in outputs]


def _rows(
    counts: list[int], tables: np.ndarray, done: list[int], inputs: list[np.ndarray]
) -> tuple[jax.Array, RaggedBatch]:
    """The rows of one step, padded to `_ROWS`, and their batch."""
    parts = [x[n : n + count] for x, n, count in zip(inputs, done, counts, strict=True)]
    rows = np.concatenate(parts)
    rows = np.concatenate([rows, np.zeros((_ROWS - len(rows), *rows.shape[1:]), rows.dtype)])
    lengths = [n + count if count else 0 for n, count in zip(done, counts, strict=True)]
    return jnp.asarray(rows), RaggedBatch(lengths, tables.copy(), np.concatenate([[0], np.cumsum(counts)]))


def _place_of(state: eqx.nn.State) -> _Place:
    pools = pools_of(state)
    if not pools:
        raise ValueError("The state holds no Pages, so there is nothing to serve from.")
    needed = sum(-(-n // pools[0].layout.page_size) for n in _LENGTHS) + 2
    fewest = min(pool.num_pages for pool in pools)
    if fewest < needed:
        raise ValueError(f"The state's pages must number at least {needed} for this check; got {fewest}.")
    return _Place(pools[0].layout.page_size, fewest)


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages)


def _poisoned(state: eqx.nn.State) -> eqx.nn.State:
    """The state with NaN in all its pages; in int8 pages -128."""

    def fill(x: Any) -> Any:
        if not _is_pages(x):
            return x
        filler = -128 if x.layout.dtype == jnp.int8 else jnp.nan
        return Pages(tuple(jnp.full_like(a, filler) for a in x.arrays), x.k_scale, x.v_scale, x.layout)

    return jax.tree.map(fill, state, is_leaf=_is_pages)
