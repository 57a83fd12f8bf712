"""NaN or infinity in live keys and values stays in its own sequence: in every page order, on a mesh, and in compat.

`tests/tpu/test_live.py` asks it of the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.spec import PAGE_ORDERS, AttentionState, Pages
from tests.compat.entries import ENTRIES, results
from tests.mesh.placing import mesh_of, needs_devices, placed
from tests.support import ALL_LOWERINGS, Case, build, case_of, lowered
from tests.support.live import assert_reaches_no_other_sequence

PLAIN = case_of("plain", "decode").spec


def _state(lowering, built):
    attend = lowered(lowering, built.case)
    return attend.state(built.q, built.pages, built.batch, built.sinks), None


def _update(lowering, built):
    attend = lowered(lowering, built.case)
    return attend.update_state(built.q, built.k, built.v, built.pages, built.batch, built.sinks)


@functools.cache
def _sharded(case, field):
    mesh, axes = mesh_of({field: 2})
    attend = paged.lower(case.spec, case.layout, "xla", mesh=mesh, axes=axes)
    return attend, jax.jit(attend.update_state)


def _on_mesh(field, built):
    attend, update = _sharded(built.case, field)
    q, k, v, pages, batch, sinks = placed(attend, [built])
    return update(q, k, v, pages, batch, sinks)


def _by_entry(name, built):
    found = results(name, built)
    out, cache = found if ENTRIES[name].writes else (found, None)
    pages = None if cache is None else Pages((cache,), None, None, built.case.layout)
    return AttentionState(out, jnp.zeros(out.shape[:2])), pages


# Every way to run, with the page orders and phases that it is tried on; a new page order or runner is one more row.
ROWS = [
    *((_state, name, order, "decode") for name in ALL_LOWERINGS for order in ("packed", "joined")),
    *((_update, name, order, "ragged") for name in ALL_LOWERINGS for order in ("split", "interleaved")),
    *((_on_mesh, field, "packed", "decode") for field in ("kv_heads", "context")),
    *((_by_entry, name, ENTRIES[name].order, ENTRIES[name].phase) for name in ("page", "v3")),
]


@needs_devices
@pytest.mark.parametrize(("run", "how", "order", "phase"), ROWS, ids=lambda x: getattr(x, "__name__", x))
def test_a_live_nan_or_infinity_reaches_no_other_sequence(run, how, order, phase):
    case = Case(spec=PLAIN, phase=phase, order=order)
    writes = run in (_update, _on_mesh) or (run is _by_entry and ENTRIES[how].writes)
    built = build(case, hold_new=not writes)
    for bad in (np.nan, np.inf):
        assert_reaches_no_other_sequence(functools.partial(run, how), built, bad)


def test_every_page_order_is_tried():
    assert {order for _, _, order, _ in ROWS} == set(PAGE_ORDERS)
