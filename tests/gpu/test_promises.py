"""The kernel for GPUs keeps every promise of `LOWERING_CHECKS` in decode, interpreted and watched."""

import jax.numpy as jnp
import pytest

import paged
from paged.lower import GpuDecodeSchedule
from paged.spec import AttentionSpec, PageLayout
from paged.testing import LOWERING_CHECKS, ROUNDED_WEIGHTS, check_lowering, interpreted

from .running import PATIENCE, needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.slow]

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=64, window=20, soft_cap=20.0)
LAYOUT = PageLayout(page_size=16, num_kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
# What it cannot pass, and why.
WITHOUT = {
    "update in place": "Pallas's interpreter copies; a compiled program is looked at in `test_compiles.py`",
    "starts that lie": "it refuses batches that bring the first row of each sequence",
    "the output has the queries' dtype": "it refuses queries of another dtype than the pages'",
}
CHECKS = [name for name, check in LOWERING_CHECKS.items() if "decode" in check.phases and name not in WITHOUT]


def _lower(spec, layout):
    schedule = GpuDecodeSchedule(pages_per_block=4, stages=3)
    return interpreted(paged.lower(spec, layout, "gpu", schedule=schedule))


@pytest.mark.parametrize("check", CHECKS)
def test_promise(check):
    checked = check_lowering(
        _lower,
        specs=[SPEC],
        layouts=[LAYOUT],
        phases=["decode"],
        checks=[check],
        weights=ROUNDED_WEIGHTS,
        patience=PATIENCE,
    )
    assert checked.passed, checked.left_out
