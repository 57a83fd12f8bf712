"""What a batch brings, on either TPU kernel: terms that name it, arrays that bring it, and a watched comparison."""

import dataclasses
import functools

import numpy as np
import pytest

import paged
from paged.spec import (
    ALiBi,
    AttentionSpec,
    Bias,
    Chunk,
    Everything,
    PerHead,
    Prefix,
    Value,
    Where,
    Window,
    reference_state,
)
from paged.testing import build, interpreted
from tests.support.specs import real

from .interpreter import watched

PLAIN = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)


def by_head(p, j, h):
    return (p - j) % 5 != h % 4


def far(p, j, most):
    return p - j >= most


def _slanted(p, j, h, slope):
    return slope * real(j - p) * real(h + 1)


def ints(*rows):
    return np.array(rows, np.int32)


N, F = Value("n"), Value("f", dtype="float32")
FLOATS = {"f": np.array([2.0, 1.0, 0.5, 3.0, 30.0], np.float32)}
SLOPED = {"window": N, "scores": (ALiBi(Value("m", 4, "float32")), Bias(_slanted, values=(F,)))}
SLOPES = {"m": np.linspace(-1, 2, 20, dtype=np.float32).reshape(5, 4), **FLOATS}
BY_HEAD = {
    "where": Where(by_head),
    "per head": PerHead((Window(2), Everything(), Chunk(6), Window(20))),
    "per group": PerHead((Window(2), Prefix(9))),
    "not": ~PerHead((Window(2), Where(by_head), Prefix(3), Everything())),
}


def rows_of(table, fast=(), slow=()):
    """The rows of a table, of which few run always, and few run last."""
    rows, always, last = ([row if isinstance(row, tuple) else (row,) for row in of] for of in (table, fast, slow))
    later = [pytest.mark.slow if row in last else pytest.mark.kernels for row in rows]
    return [pytest.param(*row, marks=[] if row in always else mark) for row, mark in zip(rows, later, strict=True)]


def lowered(case, schedule, mode="on_wait", generation="v6e"):
    """The case's attention, interpreted, with copies that arrive as the mode says."""
    attend = paged.lower(case.spec, case.layout, "tpu", schedule=schedule).on_chip(generation)
    return interpreted(attend, mode)


@functools.cache
def plain(case):
    """The built arrays of a case without its terms."""
    sizes = {name: getattr(case.spec, name) for name in ("num_q_heads", "num_kv_heads", "head_dim")}
    return build(case.replace(spec=PLAIN.replace(**sizes)))


def arrays(case, **brought):
    """Queries, pages and a batch of a case, whose values do not depend on its terms."""
    built = plain(case)
    return built.q, built.pages, dataclasses.replace(built.batch, **brought)


def assert_close(got, want):
    """Two states within what float32 rounds."""
    np.testing.assert_allclose(got.out, want.out, rtol=1e-4, atol=5e-5)
    np.testing.assert_allclose(got.lse, want.lse, rtol=1e-4, atol=5e-5)


def assert_reference(attend, case, step):
    """A step gives the reference's numbers, watched."""
    assert_close(watched(attend.state, *step), reference_state(case.spec, *step))
