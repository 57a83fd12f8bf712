"""`check_lowering`: what an attention must promise on pages, whoever wrote it."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from paged.spec import AttentionSpec, PageLayout

from .arrays import build
from .cases import CORNERS, Case, Corner, Phase
from .failures import CheckFailure
from .interpreter import PATIENCE
from .promises import LOWERING_CHECKS, ROWS, Attention, LeftOut, LowerFn, Subject, require_equal
from .specs import SPECS

_LAYOUT = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)


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
    corners: Iterable[str | Corner] = tuple(CORNERS),
    checks: Iterable[str] = tuple(LOWERING_CHECKS),
    rows: Mapping[Phase, int] = ROWS,
    weights: float = 0.0,
    patience: float = PATIENCE,
) -> Checked:
    """Check every promise of an attention over pages, on adversarial batches.

    Every page holds NaN and infinities wherever no live token is, the pages lie in a random order, and tables hold
    garbage where no visible token needs an entry. `CORNERS` are lengths and row counts: empty sequences, one token,
    exact pages, a first page that the mask hides, more rows than tokens, dead slots. Kernels that are `interpreted`
    are `watched`.

    **Arguments:**

    - `lower`: ``lower(spec, layout)`` gives an `Attend`, or a function ``f(q, pages, batch)`` that returns the output
      or an `AttentionState`. With sinks, the function has a fourth argument ``sinks``. An object with a method
      ``update(q, k, v, pages, batch)``, which returns the output and the pages, is checked for what it writes too.
      Everything is called under ``jax.jit``. A ``ValueError`` is a refusal.
    - `specs`: the attentions to try. Checks that lower specs of their own start from the first one alone.
    - `layouts`: the page layouts to try, each with the specs of its heads and head dimension.
    - `phases`: ``"decode"``, the same few rows per sequence; ``"ragged"``, rows that vary; ``"prefill"``, rows of one
      sequence.
    - `corners`: names in `CORNERS`, or a `Corner` of your own.
    - `checks`: names in `LOWERING_CHECKS`.
    - `rows`: how many query rows each sequence has in decode, the whole batch in ragged, and the sequence in prefill.
    - `weights`: the relative error of softmax weights that the lowering rounds: 0, or `ROUNDED_WEIGHTS`.
    - `patience`: seconds that one interpreted kernel may run, see `watched`.

    **Returns:** what was tried, refused and left out.

    **Raises:** `CheckFailure` with the smallest batch that fails, of the first of `LOWERING_CHECKS` that fails, or of
    `KERNEL_CHECKS` where a kernel is `interpreted`; ``ValueError`` where every spec and layout is refused.

    >>> checked = check_lowering(paged.lower, specs=[AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)],
    ...     phases=["decode"], corners=["mixed"], checks=["equals the reference", "holes are invisible"])
    >>> len(checked.passed), checked.refused
    (2, [])
    """
    report, specs, layouts, phases = Checked([], [], set()), list(specs), list(layouts), list(phases)
    seen: set[tuple[PageLayout, Phase, str]] = set()
    for spec, layout in ((spec, layout) for spec in specs for layout in layouts if _fit(spec, layout)):
        subject = Subject(lower, spec, layout, tuple(corners), weights, {**ROWS, **rows}, patience)
        try:
            assert subject.attention is not None, "lower returned None"
        except ValueError as error:
            report.refused.append((spec, layout, str(error)))
            continue
        for phase in phases:
            for name in checks:
                if LOWERING_CHECKS[name].once and (layout, phase, name) in seen:
                    continue
                seen.add((layout, phase, name))
                reason = run_check(name, subject, phase)
                if reason is None:
                    report.passed.append((spec, layout, phase, name))
                elif reason:
                    report.left_out.add(f"{name}: {reason}")
    if not report.passed:
        why = "; ".join(reason for _, _, reason in report.refused) or "no layout has the heads of a spec"
        raise ValueError(f"Nothing was checked: {why}.")
    return report


def check_case(attention: Attention, case: Case, *, weights: float = 0.0, patience: float = PATIENCE) -> None:
    """Check that an attention has the float64 reference's numbers for one case of yours.

    **Arguments:**

    - `attention`: an `Attend`, or a function ``f(q, pages, batch)``, with sinks as a fourth argument where the spec has
      them. A kernel that is `interpreted` is `watched`.
    - `case`: the case. Its spec and layout are the attention's.
    - `weights`, `patience`: see `check_lowering`.

    **Raises:** `CheckFailure` named ``"equals the reference"``, or of `KERNEL_CHECKS`.

    >>> case = Case(spec=AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8), phase="decode", rows=3)
    >>> check_case(paged.lower(case.spec, case.layout), case)
    """
    subject = Subject(lambda spec, layout: attention, case.spec, case.layout, (), weights, ROWS, patience)
    try:
        require_equal(subject, build(case))
    except CheckFailure:
        raise
    except AssertionError as error:
        raise CheckFailure("equals the reference", str(error).strip()) from error


def _fit(spec: AttentionSpec, layout: PageLayout) -> bool:
    return (spec.num_kv_heads, spec.head_dim) == (layout.num_kv_heads, layout.head_dim)


def run_check(name: str, subject: Subject, phase: Phase) -> str | None:
    """Run one of `LOWERING_CHECKS`: why it was left out, or None. Its phase alone needs no reason: an empty text."""
    check = LOWERING_CHECKS[name]
    if phase not in check.phases:
        return ""
    if check.needs is not None and not hasattr(subject.attention, check.needs):
        return f"the attention has no `{check.needs}`"
    try:
        check.run(subject, phase)
    except LeftOut as reason:
        return str(reason)
    except CheckFailure:
        raise
    except AssertionError as error:
        where = f"{subject.spec}, {subject.layout}, {phase}"
        raise CheckFailure(name, f"{str(error).strip()}\nin {where}") from error
    return None
