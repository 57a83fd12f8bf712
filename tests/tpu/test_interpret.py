"""`interpret=True` is the interpreter of TPU kernels with its default settings, wherever `interpret` is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import paged
from paged.lower.mesh import Axes

SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16)
LAYOUT = paged.PageLayout(page_size=8, num_kv_heads=2, head_dim=16, dtype=jnp.float32)
# Fewer rows than the prefill kernel copies at once. Pallas's interpreter of kernels in general refuses that.
BATCH = paged.RaggedBatch(lengths=[5], block_tables=[[0]], query_starts=[0, 5])


def test_true_and_the_default_settings_are_one_attention():
    one, other = (paged.lower(SPEC, LAYOUT, "tpu", interpret=how) for how in (True, pltpu.InterpretParams()))
    assert one == other and hash(one) == hash(other)
    assert one != paged.lower(SPEC, LAYOUT, "tpu", interpret=False)
    mesh = jax.make_mesh((1,), ("x",))
    on_mesh = [
        paged.lower(SPEC, LAYOUT, "tpu", mesh=mesh, axes=Axes(kv_heads="x"), interpret=how)
        for how in (np.True_, pltpu.InterpretParams())
    ]
    assert on_mesh[0] == on_mesh[1]


@pytest.mark.parametrize("how", ["yes", 1, {"detect_races": True}])
def test_other_settings_are_refused_by_name(how):
    for call in (lambda: paged.lower(SPEC, LAYOUT, "tpu", interpret=how), lambda: _written("tpu", interpret=how)):
        with pytest.raises(TypeError, match=r"interpret must be True, False or a .*InterpretParams; got"):
            call()


def _written(target, **how):
    kv = jnp.zeros((5, 2, 16))
    return paged.write(kv, kv, LAYOUT.init(num_pages=1), BATCH, target, **how)


@pytest.mark.kernels
def test_true_interprets_prompts_of_few_rows_and_their_write():
    """JAX makes an interpreted kernel a program when it lowers it. Values with ``True`` are in `test_double`."""
    attend, kv = paged.lower(SPEC, LAYOUT, "tpu", interpret=True), jnp.zeros((5, 2, 16))
    jax.jit(attend.update).lower(jnp.zeros((5, 4, 16)), kv, kv, LAYOUT.init(num_pages=1), BATCH)
