"""`Subject`: one lowered attention that is checked, with its compiled calls, and comparisons of what they give."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from paged.spec import AttentionSpec, AttentionState, PageLayout, Pages

from ..arrays import Built, build
from ..cases import Case, Corner, Phase
from ..interpreter import PATIENCE, watched
from ..tolerances import assert_states_close, exact_state

# An `Attend`, or any function ``f(q, pages, batch)``, with sinks as a fourth argument where the spec has them.
Attention = Any
LowerFn = Callable[[AttentionSpec, PageLayout], Attention]

# Query rows: of each sequence, of the whole batch, of the one sequence.
ROWS: dict[Phase, int] = {"decode": 1, "ragged": 16, "prefill": 6}


class LeftOut(Exception):
    """Why a check does not apply to an attention."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """One lowered attention that is checked, and how to make another of the same kind.

    Its calls are compiled once for all checks of a phase, because compiling takes most of the time.
    """

    lower: LowerFn
    spec: AttentionSpec
    layout: PageLayout
    corners: tuple[str | Corner, ...]
    weights: float
    rows: Mapping[Phase, int]
    patience: float = PATIENCE

    @functools.cached_property
    def attention(self) -> Attention:
        """The attention itself."""
        return self.lower(self.spec, self.layout)

    @property
    def own_corners(self) -> tuple[Corner, ...]:
        """The corners that are not of `CORNERS`."""
        return tuple(corner for corner in self.corners if not isinstance(corner, str))

    def other(self, spec: AttentionSpec, layout: PageLayout | None = None) -> "Subject":
        """The same lowering of another spec. Raises `LeftOut` where it refuses."""
        subject = dataclasses.replace(self, spec=spec, layout=layout or self.layout)
        try:
            assert subject.attention is not None
        except ValueError as error:
            raise LeftOut(str(error)) from error
        return subject

    def case(self, phase: Phase, **facts: Any) -> Case:
        """A case of this spec and layout."""
        layout, rows = self.layout, {"tokens" if phase == "ragged" else "rows": self.rows[phase]}
        is_half = layout.dtype in ("bfloat16", "float16")
        return Case(
            spec=self.spec,
            page_size=layout.page_size,
            order=layout.order,
            dtype=layout.dtype.name,
            scales=layout.scales,
            value_dim=layout.value_dim if layout.value_dim != layout.head_dim else None,
            q_dtype=layout.dtype.name if is_half else "float32",
            phase=phase,
            sink_shape=(self.spec.num_q_heads,) if self.spec.sinks else None,
            **{**rows, **facts},
        )

    def build(self, phase: Phase, corner: str | Corner = "mixed", facts: Any = (), **how: Any) -> Built:
        """The arrays of such a case: see `paged.testing.build`."""
        return build(self.case(phase, corner=corner, **dict(facts)), **how)

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        return jax.jit(getattr(self.attention, "state", self.attention))

    @functools.cached_property
    def donating(self) -> Callable[..., Any]:
        """The attention's `update`, compiled for pages that are donated."""
        return jax.jit(self.attention.update, donate_argnums=3)

    def run(self, built: Built, **changed: Any) -> Any:
        """The state of built arrays, or the output alone where the attention gives no more. Kernels are watched."""
        q, sinks = changed.get("q", built.q), changed.get("sinks", built.sinks)
        given = (q, built.pages, built.batch, *(() if sinks is None else (sinks,)))
        return watched(self._run, *given, patience=self.patience)

    def update(self, built: Built) -> tuple[jax.Array, Pages]:
        """The output and the pages after an update, of a copy of the pages that is donated. Kernels are watched."""
        sinks = () if built.sinks is None else (built.sinks,)
        pages = jax.tree.map(lambda x: x.copy(), built.pages)
        given = (built.q, built.k, built.v, pages, built.batch, *sinks)
        return watched(self.donating, *given, patience=self.patience)

    @property
    def can_update(self) -> bool:
        """Whether the attention writes."""
        return hasattr(self.attention, "update")

    def assert_close(self, got: Any, built: Built, rows: Any = slice(None)) -> None:
        """Assert that a state, or an output alone, is the reference's, and exactly 0 in rows that see nothing."""
        want = AttentionState(*(np.asarray(x)[rows] for x in exact_state(built)))  # pyright: ignore
        got = state_like(got, want)
        assert_states_close(got, want, built.error_unit[rows], str(built.q.dtype), self.weights)
        empty = ~np.asarray(want.out).any(axis=2)
        assert not np.asarray(got.out, np.float32)[empty].any(), "rows and heads that see nothing are not 0"


def state_like(got: Any, want: AttentionState) -> AttentionState:
    """What an attention gave; the log-sum-exp is the wanted one where it gave the output alone."""
    return got if isinstance(got, AttentionState) else AttentionState(got, want.lse)


def leaves(result: Any) -> list[np.ndarray]:
    """The output, and the log-sum-exp if there is one, in float32."""
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(result)]


def assert_same(before: Any, after: Any, rows: Any, what: str) -> None:
    """Assert that two results are the same to the bit in these rows, a mask or indices."""
    rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
    for a, b in zip(leaves(before), leaves(after), strict=True):
        wrong = [int(i) for i in rows if a[i].tobytes() != b[i].tobytes()]
        assert not wrong, f"{what}, in rows {wrong[:8]}"


def assert_nothing(result: Any, rows: Any = slice(None)) -> None:
    """Assert that these rows are the empty state, ``(0, -inf)``."""
    out, *lse = (x[rows] for x in leaves(result))
    assert not out.any(), f"rows that see nothing are not 0: {np.argwhere(out)[:4, 0].tolist()}"
    assert all(np.isneginf(x).all() for x in lse), "the lse of rows of no sequence is not -inf"


def owned(built: Built, *seqs: int) -> np.ndarray:
    """Which rows belong to these sequences; without any, to a sequence at all."""
    return np.array([owner is not None and (not seqs or owner[0] in seqs) for owner in built.row_of])


def in_words(built: Built) -> str:
    """The batch of built arrays, for an error."""
    batch, live, corner = built.batch, int(built.batch.num_seqs), built.case.corner
    name = f"the corner {corner!r}" if isinstance(corner, str) else "a corner"
    starts = batch.query_starts[: live + 1].tolist()
    return (
        f"{name}: lengths {batch.lengths[:live].tolist()}, query_starts {starts}, {live} of {batch.num_slots} "
        f"sequences live, {built.case.layout.page_size} tokens per page"
    )
