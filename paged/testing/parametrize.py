"""`parametrize_with_checks`: every check of every subject is one test of pytest."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from paged.spec import Mask, ScoreOp

from .masks import MASK_CHECKS
from .scores import SCORE_CHECKS

_HEADS = 6


def parametrize_with_checks(subjects: Iterable[Any], *, expected_failures: Mapping[str, str] | None = None) -> Any:
    """A decorator for a test ``def test(subject, check): check(subject)``: one test for each subject and check.

    **Arguments:**

    - `subjects`: masks and score operations.
    - `expected_failures`: reasons by name, such as ``{"p - j < 4: coverage": "known to be loose"}``. The name is the
      subject's text and the check's name. Such a test must fail; one that passes is an error.

    **Returns:** the decorator, of ``pytest.mark.parametrize``.

    **Raises:** ``TypeError`` for a subject that is neither a mask nor a score operation; ``ValueError`` for an expected
    failure that names no test.

    >>> @parametrize_with_checks([Window(4), SoftCap(3.0)])
    ... def test_terms(subject, check):
    ...     check(subject)
    """
    rows, expected = [], dict(expected_failures or {})
    for subject in subjects:
        for name, check in _checks_of(subject).items():
            title = f"{subject}: {name}"
            reason = expected.pop(title, None)
            marks = () if reason is None else (pytest.mark.xfail(reason=reason, strict=True),)
            rows.append(pytest.param(subject, check, id=title, marks=marks))
    if expected:
        raise ValueError(f"expected_failures names {sorted(expected)}; there are {[row.id for row in rows]}.")
    return pytest.mark.parametrize(("subject", "check"), rows)


def _checks_of(subject: Any) -> dict[str, Callable[[Any], None]]:
    if isinstance(subject, Mask):
        return dict(MASK_CHECKS)
    if isinstance(subject, ScoreOp):
        return {name: _bound(check) for name, check in SCORE_CHECKS.items()}
    raise TypeError(f"subjects must be masks or score operations; got {subject!r}. For a lowering, use check_lowering.")


def _bound(check: Callable[[ScoreOp, int], None]) -> Callable[[ScoreOp], None]:
    return lambda op: check(op, _HEADS)
