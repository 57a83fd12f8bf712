"""Promises about numbers: the reference's, at every corner, in every shape, and where others go wrong."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paged.spec import AttentionState, Bias, Where, sinks_per_head

from ..arrays import Built
from ..brought import ops_of
from ..cases import Phase
from ..tolerances import assert_output, assert_state_close, exact_state
from .subject import LeftOut, Subject, in_words, leaves

# Widths of tables and numbers of rows that no block and no tile divides.
_ODD_SHAPES: dict[Phase, dict[str, int]] = {
    "decode": {"pages_per_seq": 7},
    "ragged": {"pages_per_seq": 5, "tokens": 12},
    "prefill": {"pages_per_seq": 3, "rows": 5},
}


def check_equals_the_reference(subject: Subject, phase: Phase) -> None:
    """The float64 reference's numbers in every row; exactly 0 in rows that see nothing, and in rows of no sequence."""
    for corner in subject.corners:
        require_equal(subject, subject.build(phase, corner))


def require_equal(subject: Subject, built: Built) -> None:
    """Assert that an attention gives the reference's numbers for built arrays; the error says which batch it is."""
    got = subject.run(built)
    try:
        if isinstance(got, AttentionState):
            assert_state_close(got, built, subject.weights)
        else:
            assert_output(got, built, subject.weights)
    except AssertionError as error:
        raise AssertionError(f"{error}\nwith {in_words(built)}") from error


def check_any_shape(subject: Subject, phase: Phase) -> None:
    """Tables of any width, and any number of rows, the last of which may be somebody's."""
    for corner in ("mixed", "few live"):
        require_equal(subject, subject.build(phase, corner, _ODD_SHAPES[phase]))


def check_scores_of_zero(subject: Subject, phase: Phase) -> None:
    """With queries of 0 the natural log-sum-exp is that of the score operations on 0: nothing scales or caps those."""
    spec, built = subject.spec, subject.build(phase, "exact pages")
    lse = np.asarray(subject.run(built, q=jnp.zeros_like(built.q)).lse)
    sinks = -np.inf if built.sinks is None else np.asarray(sinks_per_head(spec, built.sinks))
    # Scores of every row with every key, for all heads. The keys of a row's own sequence are picked afterwards.
    p, j = jnp.asarray(built.pairs.p), jnp.asarray(built.pairs.j)
    heads = jnp.arange(spec.num_q_heads, dtype=jnp.int32)[None, :, None]
    scores = jnp.zeros((len(p), spec.num_q_heads, j.shape[2]), jnp.float32)
    for op in ops_of(spec, built.pairs.numbers):
        scores = op(scores, p, j, heads)
    for row, (seen, by_head) in enumerate(zip(built.visible, built.by_head, strict=True)):
        if seen is not None and by_head is not None and len(seen):
            own = np.asarray(scores, np.float64)[row][:, seen]
            with np.errstate(divide="ignore"):
                want = np.logaddexp(np.log(np.where(by_head, np.exp(own), 0).sum(axis=1)), sinks)
            is_some = np.isfinite(want)
            assert np.array_equal(is_some, np.isfinite(lse[row])), f"heads that see nothing in row {row}"
            error = np.abs(lse[row] - want, where=is_some, out=np.zeros_like(want)).max()
            size = np.abs(want[is_some]).max(initial=1.0)
            assert error <= 1e-5 * size, f"lse of row {row}: {lse[row]}, and not {want}"


def check_huge_scores(subject: Subject, phase: Phase) -> None:
    """Scores far below or above any sentinel: a row that sees one key has its value, and no result is NaN."""
    size = 1e4 if subject.layout.dtype == "float16" else 1e15
    built = subject.build(phase, "one token")
    if built.sinks is not None:
        raise LeftOut("a sink of a spec with sinks outweighs the key")
    exact = np.asarray(exact_state(built).out, np.float32)
    rounding = 1e-6 if built.q.dtype == jnp.float32 else 2.0**-8
    alone = [row for row, seen in enumerate(built.visible) if seen is not None and len(seen) == 1]
    for query in (size, -size):
        got = leaves(subject.run(built, q=jnp.full_like(built.q, query)))
        for row in alone:
            error = np.abs(got[0][row] - exact[row]).max()
            allowed = rounding * np.abs(exact[row]).max()
            assert error <= allowed, f"row {row} sees one key, and not its value, where queries are {query:g}"
            assert all(np.isfinite(x[row]).all() for x in got[1:]), f"the lse of row {row} is not finite"


@dataclasses.dataclass(frozen=True)
class _From:
    """An opaque predicate: pages before ``first`` are visited, and hidden there."""

    first: int

    def __call__(self, p: Any, j: Any) -> Any:
        return (j >= self.first) & (p == p)


def check_hidden_first_pages(subject: Subject, phase: Phase) -> None:
    """Blocks of keys that a mask hides wholly, before the first visible key: -inf minus -inf shows nowhere."""
    late = Where(_From(2 * subject.layout.page_size + 1))
    other = subject.other(subject.spec.replace(causal=False, window=None, mask=late))
    require_equal(other, other.build(phase, "first page masked"))


def check_full_pages_end(subject: Subject, phase: Phase) -> None:
    """A page that the mask shows in full still ends at the sequence's length."""
    other = subject.other(subject.spec.replace(causal=False, window=None, mask=None))
    for corner in ("one past a page", "one token", "first page masked"):
        require_equal(other, other.build(phase, corner))


def check_window_of_the_whole(subject: Subject, phase: Phase) -> None:
    """A window as long as the sequence, or longer than any, is no window."""
    spec = subject.spec.replace(window=None)
    built = dataclasses.replace(subject, spec=spec).build(phase, "exact pages")
    capacity = built.batch.pages_per_seq * subject.layout.page_size
    for width in (capacity, 2**31 - 1) if phase == "decode" else (capacity,):
        other = subject.other(spec.replace(window=width))
        other.assert_close(other.run(built), built)


def _first_counts(p: Any, j: Any, h: Any) -> Any:
    return jnp.where(j == 0, 0.0, -9.0)


def check_float32_sums(subject: Subject, phase: Phase) -> None:
    """One key weighs 1 and the others exp(-9) each: in bfloat16 a block of these would be lost beside the first."""
    spec = subject.spec.replace(scores=(Bias(_first_counts),), sinks=False)
    other = subject.other(spec, subject.layout.replace(dtype=jnp.bfloat16, scales=None))
    built = other.build(phase, "exact pages")
    lse = np.asarray(other.run(built, q=jnp.zeros_like(built.q)).lse)
    for row, (seen, by_head) in enumerate(zip(built.visible, built.by_head, strict=True)):
        if seen is None or by_head is None or 0 not in seen:
            continue
        by_head = np.broadcast_to(by_head, (spec.num_q_heads, len(seen)))
        heads = by_head[:, seen.tolist().index(0)]
        want = np.log1p((by_head.sum(axis=1) - 1)[heads] * np.exp(-9.0))
        error = np.abs(lse[row][heads] - want)
        assert (error <= 1e-3 * want + 1e-6).all(), f"lse of row {row}: {lse[row]}, and not {want}"


def check_output_dtype(subject: Subject, phase: Phase) -> None:
    """The output has the dtype of the queries, whatever the pages hold, and the log-sum-exp is float32."""
    layout = subject.layout
    for pool in (layout, layout.replace(dtype=jnp.int8, scales="head")):
        try:
            other = subject.other(subject.spec, pool)
        except LeftOut:
            continue
        built = other.build(phase)
        sinks = () if built.sinks is None else (built.sinks,)
        for dtype in ("float16", "bfloat16", "float32"):
            q = built.q.astype(dtype)
            run = getattr(other.attention, "state", other.attention)
            out, *lse = jax.tree.leaves(jax.eval_shape(run, q, built.pages, built.batch, *sinks))
            assert out.dtype == dtype, f"the output of {dtype} queries over {pool.dtype} pages is {out.dtype}"
            assert out.shape[:2] == q.shape[:2] and all(x.shape == out.shape[:2] for x in lse), "shapes"
            assert all(x.dtype == jnp.float32 for x in lse), f"the lse is {lse[0].dtype}"
