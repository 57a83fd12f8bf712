"""`check_lowering`: what an attention must promise on pages, whoever wrote it, and the named checks that it runs."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged.spec import (
    AttentionSpec,
    AttentionState,
    PageLayout,
    Prefix,
    RaggedBatch,
    add_sinks,
    merge,
    sinks_per_head,
)

from .arrays import Built, build
from .cases import CORNERS, PAST_THE_TABLE, Case, Corner, Phase
from .failures import CheckFailure
from .interpreter import watched
from .specs import SPECS
from .tolerances import assert_output, assert_state_close, assert_states_close, exact_state
from .writes import require_written

# An `Attend`, or any function ``f(q, pages, batch)``, with sinks as a fourth argument where the spec has them.
Attention = Any
LowerFn = Callable[[AttentionSpec, PageLayout], Attention]

_LAYOUT = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
_ROWS: dict[Phase, dict[str, int]] = {"decode": {"rows": 1}, "ragged": {}, "prefill": {"rows": 6}}


class Checked(NamedTuple):
    """What `check_lowering` has tried.

    * ``passed``: ``(spec, layout, phase, check)`` of everything that held.
    * ``refused``: ``(spec, layout, reason)`` where lowering raised ``ValueError``.
    * ``left_out``: why some checks were not tried, such as a function without an `update`.
    """

    passed: list[tuple[AttentionSpec, PageLayout, Phase, str]]
    refused: list[tuple[AttentionSpec, PageLayout, str]]
    left_out: set[str]


def check_lowering(
    lower: LowerFn,
    *,
    specs: Iterable[AttentionSpec] = tuple(SPECS.values()),
    layouts: Iterable[PageLayout] = (_LAYOUT,),
    phases: Iterable[Phase] = ("decode", "ragged", "prefill"),
    corners: Iterable[str] = tuple(CORNERS),
    checks: Iterable[str] | None = None,
    weights: float = 0.0,
) -> Checked:
    """Check every promise of an attention over pages, on adversarial batches.

    Every page holds NaN and infinities wherever no live token is, the pages lie in a random order, and tables hold
    garbage where no visible token needs an entry. `CORNERS` are lengths and row counts: empty sequences, one token,
    exact pages, a first page that the mask hides, more rows than tokens, dead slots.

    **Arguments:**

    - `lower`: ``lower(spec, layout)`` gives an `Attend`, or a function ``f(q, pages, batch)`` that returns the output
      or an `AttentionState`. With sinks, the function has a fourth argument ``sinks``. A ``ValueError`` is a refusal.
    - `specs`: the attentions to try.
    - `layouts`: the page layouts to try, each with the specs of its heads and head dimension.
    - `phases`: ``"decode"``, one row per sequence; ``"ragged"``, rows that vary; ``"prefill"``, rows of one sequence.
    - `corners`: names in `CORNERS`.
    - `checks`: names in `LOWERING_CHECKS`; None for all.
    - `weights`: the relative error of softmax weights that the lowering rounds: 0, or `ROUNDED_WEIGHTS`.

    **Returns:** what was tried, refused and left out.

    **Raises:** `CheckFailure` with the smallest batch that fails, of the first of `LOWERING_CHECKS` that fails, or of
    `KERNEL_CHECKS` where a kernel is `interpreted`; ``ValueError`` where every spec and layout is refused.

    >>> checked = check_lowering(paged.lower, specs=[AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)],
    ...     phases=["decode"], corners=["mixed"])
    >>> len(checked.passed), checked.refused
    (8, [])
    """
    report, specs, layouts, phases = Checked([], [], set()), list(specs), list(layouts), list(phases)
    chosen = LOWERING_CHECKS if checks is None else {name: LOWERING_CHECKS[name] for name in checks}
    for spec, layout in ((spec, layout) for spec in specs for layout in layouts if _fit(spec, layout)):
        try:
            lowered = lower(spec, layout)
        except ValueError as error:
            report.refused.append((spec, layout, str(error)))
            continue
        subject = Subject(lower, spec, layout, lowered, tuple(corners), weights)
        for phase in phases:
            for name, check in chosen.items():
                if phase not in check.phases:
                    continue
                if check.needs is not None and not hasattr(lowered, check.needs):
                    report.left_out.add(f"{name}: the attention has no `{check.needs}`")
                    continue
                _named(name, check.run, subject, phase)
                report.passed.append((spec, layout, phase, name))
    if not report.passed:
        why = "; ".join(reason for _, _, reason in report.refused) or "no layout has the heads of a spec"
        raise ValueError(f"Nothing was checked: {why}.")
    return report


def _fit(spec: AttentionSpec, layout: PageLayout) -> bool:
    return (spec.num_kv_heads, spec.head_dim) == (layout.num_kv_heads, layout.head_dim)


def _named(name: str, run: Callable[["Subject", Phase], None], subject: "Subject", phase: Phase) -> None:
    try:
        run(subject, phase)
    except CheckFailure:
        raise
    except AssertionError as error:
        where = f"{subject.spec}, {subject.layout}, {phase}"
        raise CheckFailure(name, f"{str(error).strip()}\nin {where}") from error


@dataclasses.dataclass(frozen=True)
class Subject:
    """One lowered attention that is checked, and how to make another of the same kind."""

    lower: LowerFn
    spec: AttentionSpec
    layout: PageLayout
    attention: Attention
    corners: tuple[str, ...]
    weights: float

    def case(self, phase: Phase, **facts: Any) -> Case:
        """A case of this spec and layout."""
        layout, is_half = self.layout, self.layout.dtype in ("bfloat16", "float16")
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
            **{**_ROWS[phase], **facts},
        )

    def run(self, built: Built) -> Any:
        """The state of built arrays, or the output alone where the attention gives no more."""
        return state_or_output(self.attention, built)


def check_case(attention: Attention, case: Case, *, weights: float = 0.0) -> None:
    """Check that an attention has the float64 reference's numbers for one case of yours.

    **Arguments:**

    - `attention`: an `Attend`, or a function ``f(q, pages, batch)``, with sinks as a fourth argument where the spec has
      them. A kernel that is `interpreted` is `watched`.
    - `case`: the case. Its spec and layout are the attention's.
    - `weights`: see `check_lowering`.

    **Raises:** `CheckFailure` named ``"equals the reference"``, or of `KERNEL_CHECKS`.

    >>> case = Case(spec=AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8), phase="decode", rows=3)
    >>> check_case(paged.lower(case.spec, case.layout), case)
    """
    try:
        _require_equal(attention, build(case), weights)
    except CheckFailure:
        raise
    except AssertionError as error:
        raise CheckFailure("equals the reference", str(error).strip()) from error


def state_or_output(attention: Attention, built: Built) -> Any:
    """Run an attention on built arrays: its `state` where it has one, else the function itself. Kernels are watched."""
    sinks = () if built.sinks is None else (built.sinks,)
    run = getattr(attention, "state", attention)
    return watched(run, built.q, built.pages, built.batch, *sinks)


def check_equals_the_reference(subject: Subject, phase: Phase) -> None:
    """The float64 reference's numbers in every row; exactly 0 in rows that see nothing, and in rows of no sequence."""
    for corner in subject.corners:
        _require_equal(subject.attention, build(subject.case(phase, corner=corner)), subject.weights)


def check_past_the_table(subject: Subject, phase: Phase) -> None:
    """Lengths are longer than tables: positions follow the lengths, and keys past the table do not exist."""
    _require_equal(subject.attention, build(subject.case(phase, corner=PAST_THE_TABLE)), subject.weights)


def _require_equal(attention: Attention, built: Built, weights: float) -> None:
    got = state_or_output(attention, built)
    try:
        if isinstance(got, AttentionState):
            assert_state_close(got, built, weights)
        else:
            assert_output(got, built, weights)
    except AssertionError as error:
        raise AssertionError(f"{error}\nwith {_batch_in_words(built)}") from error


def _batch_in_words(built: Built) -> str:
    batch, live = built.batch, int(built.batch.num_seqs)
    starts, corner = batch.query_starts[: live + 1].tolist(), built.case.corner
    return (
        f"{f'the corner {corner!r}' if isinstance(corner, str) else 'a corner'}: lengths "
        f"{batch.lengths[:live].tolist()}, query_starts {starts}, {live} of {batch.num_slots} sequences live, "
        f"{built.case.layout.page_size} tokens per page"
    )


def check_page_order_is_invisible(subject: Subject, phase: Phase) -> None:
    """Pages move in the pool, and everything that no live token owns is drawn anew: no bit of the result changes."""
    for corner in dict.fromkeys(("mixed", *subject.corners[:1])):
        builts = [build(subject.case(phase, corner=corner), physical_seed=i, padding_seed=i) for i in range(2)]
        owned = np.array([owner is not None for owner in builts[0].row_of])
        before, after = (_leaves(subject.run(built)) for built in builts)
        _assert_same(before, after, owned, "the order of pages, or what unused places hold, changed a result")


def check_other_sequences_are_invisible(subject: Subject, phase: Phase) -> None:
    """Other sequences' lengths and contents change: no bit of a sequence's own rows does."""
    case = subject.case(phase, corner="one past a page")
    before, after = build(case), build(case, changed=(0, 2, 4))
    kept = np.array([owner is not None and owner[0] in (1, 3) for owner in before.row_of])
    _assert_same(_leaves(subject.run(before)), _leaves(subject.run(after)), kept, "another sequence changed a result")


def _leaves(result: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(result)]


def _assert_same(before: list[np.ndarray], after: list[np.ndarray], rows: np.ndarray, what: str) -> None:
    for a, b in zip(before, after, strict=True):
        wrong = [i for i in np.flatnonzero(rows) if a[i].tobytes() != b[i].tobytes()]
        assert not wrong, f"{what}, in rows {wrong[:8]}"


def check_padding_is_nothing(subject: Subject, phase: Phase) -> None:
    """Rows of no sequence give 0, whatever their queries are."""
    built = build(subject.case(phase, corner="few live"))
    owned = np.array([owner is not None for owner in built.row_of])
    out = _leaves(subject.run(built))[0]
    wrong = [i for i in np.flatnonzero(~owned) if out[i].any()]
    assert not wrong, f"rows of no sequence are not 0: {wrong[:8]}"


def check_split_and_merge(subject: Subject, phase: Phase) -> None:
    """The keys before 5 and the keys from 5 on, merged, are all keys; sinks enter once, at the end."""
    built = build(subject.case(phase, corner="first page masked"))
    whole, states = subject.spec, []
    for part in (Prefix(5), ~Prefix(5)):
        half = whole.replace(mask=part if whole.mask is None else whole.mask & part, sinks=False)
        states.append(watched(subject.lower(half, subject.layout).state, built.q, built.pages, built.batch))
    merged = merge(*states)
    if whole.sinks and built.sinks is not None:
        owned = np.array([owner is not None for owner in built.row_of])[:, None]
        with_sinks = add_sinks(merged, sinks_per_head(whole, built.sinks))
        merged = AttentionState(with_sinks.out, jnp.where(owned, with_sinks.lse, merged.lse))
    dtype = built.case.q_dtype
    assert_states_close(merged, exact_state(built), built.error_unit, dtype, subject.weights)


def check_chunks_are_invisible(subject: Subject, phase: Phase) -> None:
    """Nine rows of a sequence in one step, or in steps of 4, 3 and 2: the same rows."""
    if _sees_ahead(subject.spec):
        return
    built = build(subject.case(phase, corner="one live"))
    length, sinks = int(built.batch.lengths[0]), () if built.sinks is None else (built.sinks,)

    def step(first: int, last: int) -> AttentionState:
        starts = jnp.array([0] + [last - first] * (built.batch.num_slots))
        lengths = built.batch.lengths.at[0].set(length - 9 + last)
        batch = RaggedBatch(lengths, built.batch.block_tables, starts, 1)
        state = watched(subject.attention.state, jnp.roll(built.q, -first, axis=0), built.pages, batch, *sinks)
        return AttentionState(*(x[: last - first] for x in state))

    parts = [step(0, 4), step(4, 7), step(7, 9)]
    joined = AttentionState(*(jnp.concatenate(xs) for xs in zip(*parts, strict=True)))
    exact = AttentionState(*(x[:9] for x in exact_state(built)))
    assert_states_close(joined, exact, built.error_unit[:9], built.case.q_dtype, subject.weights)


def _sees_ahead(spec: AttentionSpec) -> bool:
    """Whether a row sees later tokens. Then the rows of a chunk miss tokens that are not written yet."""
    p, j = np.arange(32)[:, None], np.arange(32)[None, :]
    return bool((np.asarray(spec.visibility(p, j)) & (j > p)).any())


def check_one_trace(subject: Subject, phase: Phase) -> None:
    """Lengths, tables, row counts and live sequences are data: a new value never traces again."""
    traces = []
    run = getattr(subject.attention, "state", subject.attention)

    def step(*args: Any) -> Any:
        traces.append(args)
        return run(*args)

    jitted = jax.jit(step)
    for corner in subject.corners[:4]:
        built = build(subject.case(phase, corner=corner))
        jitted.trace(built.q, built.pages, built.batch, *(() if built.sinks is None else (built.sinks,)))
    assert len(traces) == 1, f"{len(traces)} traces for batches of one shape: a value decided what is traced"


def check_update(subject: Subject, phase: Phase) -> None:
    """`update` puts every row into its place, changes no other bit, attends, and copies no pages that are donated."""
    update = jax.jit(subject.attention.update, donate_argnums=3)
    for corner in ("mixed", PAST_THE_TABLE, *([] if phase == "prefill" else [_NEIGHBOURS])):
        case = subject.case(phase, corner=corner)
        built, held = build(case, hold_new=False), build(case)
        if corner == _NEIGHBOURS:
            built, held = _share_a_page(built), _share_a_page(held)
        sinks = () if built.sinks is None else (built.sinks,)
        pages = jax.tree.map(jnp.copy, built.pages)
        before = [x.unsafe_buffer_pointer() for x in pages.arrays]
        out, after = watched(update, built.q, built.k, built.v, pages, built.batch, *sinks)
        require_written(after, built.k, built.v, built.pages, built.batch, _batch_in_words(built))
        assert_output(out, dataclasses.replace(held, pages=after), subject.weights)
        moved = [i for i, x in enumerate(after.arrays) if x.unsafe_buffer_pointer() != before[i]]
        assert not moved, f"arrays {moved} of the donated pages were copied"


# The first two sequences write next to each other in one page: see `_share_a_page`.
_NEIGHBOURS = Corner(((0, 3), (0, 4), (1, 1), (0, 2), (2, 0)), (1, 1, 1, 1, 1))


def _share_a_page(built: Built) -> Built:
    """The first two sequences in one page. What it holds is the second one's; the first one's new token is its own."""
    tables = built.batch.block_tables.at[0, 0].set(built.batch.block_tables[1, 0])
    batch = RaggedBatch(
        built.batch.lengths, tables, built.batch.query_starts, built.batch.num_seqs, query_rows=built.batch.query_rows
    )
    # Each holds what the other wrote, so an error of either is measured against the larger of their numbers.
    first = [next(i for i, owner in enumerate(built.row_of) if owner and owner[0] == s) for s in range(2)]
    unit = built.error_unit.copy()
    unit[first] = built.error_unit[first].max(axis=0)
    return dataclasses.replace(built, batch=batch, error_unit=unit)


class LoweringCheck(NamedTuple):
    """One promise: the check, the phases that it is for, and the method of the attention that it needs, if any."""

    run: Callable[[Subject, Phase], None]
    phases: tuple[Phase, ...] = ("decode", "ragged", "prefill")
    needs: str | None = None


LOWERING_CHECKS = {
    "equals the reference": LoweringCheck(check_equals_the_reference),
    "past the table": LoweringCheck(check_past_the_table),
    "page order is invisible": LoweringCheck(check_page_order_is_invisible),
    "other sequences are invisible": LoweringCheck(check_other_sequences_are_invisible, ("decode", "ragged")),
    "padding is nothing": LoweringCheck(check_padding_is_nothing),
    "split and merge": LoweringCheck(check_split_and_merge, ("decode", "ragged"), "state"),
    "chunks are invisible": LoweringCheck(check_chunks_are_invisible, ("ragged",), "state"),
    "one trace": LoweringCheck(check_one_trace),
    "update": LoweringCheck(check_update, needs="update"),
}
