"""Runs cases on TPU kernels, interpreted and watched: see `paged.testing.interpreter`."""

import dataclasses
import functools
from typing import Any

import jax

import paged
from paged.lower import Attend, Schedule
from paged.lower.tpu.decode.plan import compute_dtype
from paged.spec import AttentionState
from paged.testing import interpret_params
from paged.testing import interpreted as interpreted_attend
from paged.testing import watched as watched_call
from tests.support import ROUNDED_WEIGHTS, Built, Case, assert_state_close

params = interpret_params
# See `interpret_params`.
MODES = ("on_wait", "eager")


@functools.lru_cache(maxsize=64)
def interpreted(case: Case, schedule: Schedule | None = None, mode: str = "on_wait", generation: str = "v4") -> Attend:
    """The case's attention by a TPU kernel, interpreted as if on that chip (v4: the one with the least memory, and two
    cores)."""
    attend = paged.lower(case.spec, case.layout, "tpu", schedule=schedule).on_chip(generation)
    return interpreted_attend(attend, mode)


def watched(run: Any, *args: Any, **watch: Any) -> Any:
    """`paged.testing.watched`, of a call that interprets a kernel."""
    return watched_call(run, *args, must_interpret=True, **watch)


def state_of(attend: Attend, built: Built, **watch: float) -> AttentionState:
    """The attention state of built arrays, by a watched kernel."""
    return watched(attend.state, built.q, built.pages, built.batch, built.sinks, **watch)


def assert_equals_reference(attend: Attend, built: Built, **watch: float) -> AttentionState:
    """Assert that a watched kernel computes the reference's state."""
    got = state_of(attend, built, **watch)
    is_narrow = compute_dtype(built.pages.layout, built.q.dtype) == jax.numpy.bfloat16
    assert_state_close(got, built, weights=ROUNDED_WEIGHTS if is_narrow else 0.0)
    return got


def without_page(built, rows, page):
    """Built arrays in which the rows do not see a page of their sequence, because its table entry is a hole."""
    visible, by_head = list(built.visible), list(built.by_head)
    for row in rows:
        stays = visible[row] // built.case.page_size != page
        visible[row], by_head[row] = visible[row][stays], by_head[row][:, stays]
    return dataclasses.replace(built, visible=visible, by_head=by_head)
