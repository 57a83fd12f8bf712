"""Bugs that are planted in the kernel for GPUs die, each by the check that must see it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from paged.lower import GpuDecodeSchedule
from paged.lower.gpu import kernel as kernel_module
from paged.lower.gpu import launch as launch_module
from paged.lower.gpu.kernel import Decode
from paged.spec import AttentionSpec, Prefix, Window
from paged.testing import CheckFailure, Corner, check_case
from tests.mutants.planting import Plant, attribute, method, planted
from tests.support import ROUNDED_WEIGHTS, Case

from .running import kernel_of, needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.slow]

PATIENCE = 60.0  # seconds, after which a kernel of a few pages will never end, on a busy machine too
# Lengths of several blocks, of part of a page, of none; the window begins within a page.
CORNER = Corner(((16, 0), (9, 3), (0, 0), (4, 1), (0, 1)), (1,) * 5)
CASE = Case(
    spec=AttentionSpec(num_q_heads=4, num_kv_heads=1, head_dim=64, window=150),
    page_size=16,
    dtype="bfloat16",
    q_dtype="bfloat16",
    phase="decode",
    corner=CORNER,
    pages_per_seq=16,
)
# What is seen are two runs of pages, so that they are listed.
LISTED = dataclasses.replace(CASE, spec=CASE.spec.replace(window=None, mask=Window(40) | Prefix(20)))
# Pages of 8 bits, of which no number is what is multiplied.
NARROW = {
    dtype: dataclasses.replace(CASE, spec=CASE.spec.replace(head_dim=128), dtype=dtype, scales="head")
    for dtype in ("int8", "float8_e4m3fn")
}
# In a ring of eight no stage comes twice.
STAGES, ONCE, ONCE_NARROW = 3, 8, 6


def _run(stages: int, case: Case = CASE) -> None:
    schedule = GpuDecodeSchedule(pages_per_block=4, stages=stages, kv_splits=2)
    check_case(kernel_of(case.spec, case.layout, schedule), case, weights=ROUNDED_WEIGHTS, patience=PATIENCE)


def _unwaited(original):
    return lambda self, refs, tile: jax.lax.rem(tile, jnp.int32(self.stages))


def _too_early(original):
    """The tile that comes next is fetched into the stage after the one that was used."""

    def refill(self, refs, item, i, kind, stage):
        return original(self, refs, item, i, kind, jax.lax.rem(stage + 1, jnp.int32(self.stages)))

    return refill


def _item(**changes):
    def mutant(original):
        def item(self, *args):
            found = original(self, *args)
            return found._replace(**{name: change(found) for name, change in changes.items()})

        return item

    return mutant


def _one_block_on(item):
    return item.blocks + jnp.where(item.split == 0, 1, 0)


def _one_more(item):
    return item.length + 1


def _one_further(item):
    return item.position + 1


def _always_whole(original):
    return lambda self, *args: original(self, *args)._replace(is_whole=jnp.bool_(True))


def _undecayed(original):
    def update(top, block, exp):
        new, origin, decay = original(top, block, exp)
        return new, origin, jnp.ones_like(decay)

    return update


def _one_page_on(original):
    """Of each page but the first one of a block the next one's place is taken."""
    return lambda self, *args: (columns := original(self, *args)) and [columns[0], *columns[2:], columns[-1]]


def _same_page(original):
    return lambda self, refs, item, block, kind, stage, place: original(self, refs, item, block, kind, stage, place * 0)


def _one_arrival_more(original):
    def scratch(layout, rows, schedule):
        found = original(layout, rows, schedule)
        arrivals = schedule.pages_per_block + 1
        return found._replace(arrived=plgpu.Barrier(num_arrivals=arrivals, num_barriers=schedule.stages))

    return scratch


def _low_digit_first(original):
    def joined(products, rows):
        turned = jnp.concatenate([products[:, i : i + rows] for i in range(2 * rows, -1, -rows)], axis=1)
        return original(turned, rows)

    return joined


def _factorless(original):
    return lambda q, layout: (original(q, layout)[0], jnp.ones(q.shape[:-1], jnp.float32))


def _scaleless(original):
    return lambda scale: jnp.ones((1, 1, 1), jnp.float32)


def _unconverted(original):
    return lambda tile, wide: None


class Bug(NamedTuple):
    """A planted bug, the check that must see it, and the stages of the ring that it is planted in."""

    plant: Plant
    killed_by: str
    stages: int = STAGES
    case: Case = CASE


REFERENCE = "equals the reference"
BUGS = {
    "a wait is left out": Bug(method(Decode, "_await", _unwaited), "no races", ONCE),
    "a wait is left out of a ring": Bug(method(Decode, "_await", _unwaited), "barriers are awaited"),
    "a tile is fetched too early": Bug(method(Decode, "_refill", _too_early), "barriers are awaited"),
    "a page too few": Bug(method(Decode, "item", _item(end=lambda item: item.end - 1)), REFERENCE),
    "the window begins a page late": Bug(method(Decode, "item", _item(first=lambda item: item.first + 1)), REFERENCE),
    "<= for <": Bug(method(Decode, "item", _item(length=_one_more, position=_one_further)), REFERENCE),
    "a split goes on into the next": Bug(method(Decode, "item", _item(blocks=_one_block_on)), REFERENCE),
    "values are not silenced": Bug(method(Decode, "_present", _always_whole), REFERENCE),
    "no sum decays": Bug(attribute(kernel_module, "update_maximum", _undecayed), REFERENCE),
    "a list's pages have each other's places": Bug(method(Decode, "_columns", _one_page_on), REFERENCE, case=LISTED),
    "every warp copies a page to one place": Bug(method(Decode, "_copy", _same_page), "no races"),
    "float8: a wait is left out": Bug(
        method(Decode, "_await", _unwaited), "no races", ONCE_NARROW, NARROW["float8_e4m3fn"]
    ),
    "float8: a tile is fetched too early": Bug(
        method(Decode, "_refill", _too_early), "barriers are awaited", case=NARROW["float8_e4m3fn"]
    ),
    "float8: values are not silenced": Bug(
        method(Decode, "_present", _always_whole), REFERENCE, case=NARROW["float8_e4m3fn"]
    ),
    "float8: tiles are not converted": Bug(
        attribute(kernel_module, "widen", _unconverted), REFERENCE, case=NARROW["float8_e4m3fn"]
    ),
    "float8: the power of two of a query is left out": Bug(
        attribute(launch_module, "queries_of", _factorless), REFERENCE, case=NARROW["float8_e4m3fn"]
    ),
    "int8: a wait is left out": Bug(method(Decode, "_await", _unwaited), "no races", ONCE_NARROW, NARROW["int8"]),
    "int8: digits in the other order": Bug(
        attribute(kernel_module, "joined", _low_digit_first), REFERENCE, case=NARROW["int8"]
    ),
    "int8: scales are left out": Bug(attribute(launch_module, "_of_heads", _scaleless), REFERENCE, case=NARROW["int8"]),
    "an arrival that never comes": Bug(attribute(launch_module, "scratch_of", _one_arrival_more), "kernels end"),
}


SOUND = [(STAGES, CASE), (ONCE, CASE), (STAGES, LISTED)]
SOUND += [(stages, case) for stages in (STAGES, ONCE_NARROW) for case in NARROW.values()]


@pytest.mark.parametrize(("stages", "case"), SOUND)
def test_without_a_bug_the_trial_passes(stages, case):
    _run(stages, case)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_dies_by_its_check(name):
    with planted(BUGS[name].plant), pytest.raises(CheckFailure) as failure:
        kernel_of.cache_clear()
        _run(BUGS[name].stages, BUGS[name].case)
    kernel_of.cache_clear()
    assert failure.value.check == BUGS[name].killed_by, failure.value
