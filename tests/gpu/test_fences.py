"""Between a store to shared memory and the matrix unit or a copy there is a fence: read off the kernel's program."""

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import paged
from paged.lower import GpuDecodeSchedule
from paged.lower.gpu.kernel import Decode
from tests.mutants.planting import method, planted

from .fences import kernel_jaxpr, names_in, unfenced
from .running import needs_kernels

pytestmark = [needs_kernels, pytest.mark.kernels]

SPEC = paged.AttentionSpec(
    num_q_heads=8, num_kv_heads=2, head_dim=128, window=300, soft_cap=30.0, scores=(paged.ALiBi(),)
)
LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=128)


INT8 = LAYOUT.replace(dtype="int8", scales="head")
FLOAT8 = LAYOUT.replace(dtype="float8_e4m3fn", scales="head")


def _kernel(stages=4, layout=LAYOUT):
    schedule = GpuDecodeSchedule(pages_per_block=4, stages=stages, kv_splits=2)
    return kernel_jaxpr(paged.lower(SPEC, layout, "gpu", schedule=schedule))


@pytest.mark.parametrize(("stages", "layout"), [(3, LAYOUT), (4, LAYOUT), (3, INT8), (3, FLOAT8)])
def test_no_store_is_read_past_the_fence(stages, layout):
    assert unfenced(_kernel(stages, layout)) == []


@pytest.mark.parametrize(("layout", "fences"), [(LAYOUT, 2), (INT8, 2), (FLOAT8, 4)])
def test_a_step_and_the_end_have_a_fence_each(layout, fences):
    """Float8 pages have two more: for keys that are converted, and for what other warps are told of values."""
    names = names_in(_kernel(layout=layout))
    assert names.count("commit_smem") == fences
    assert names.count("wgmma_ref") == 2


def _without_fences(original):
    def unfenced_step(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plgpu, "commit_smem", lambda: None)
            return original(*args)

    return unfenced_step


@pytest.mark.parametrize(
    ("name", "reader", "layout"),
    [
        ("step", "wgmma_ref", LAYOUT),
        ("store", "copy_smem_to_gmem", LAYOUT),
        ("step", "wgmma_ref", INT8),
        ("step", "wgmma_ref", FLOAT8),
        ("step", "copy_gmem_to_smem", FLOAT8),
    ],
)
def test_a_fence_that_is_left_out_is_noticed(name, reader, layout):
    with planted(method(Decode, name, _without_fences)):
        assert any(reader in place for place in unfenced(_kernel(layout=layout)))


def test_pages_are_copied_while_others_are_used():
    """Of each tile one copy by each of four warps, for every stage before the loop and for two tiles in it."""
    names = names_in(_kernel(stages=4))
    assert names.count("copy_gmem_to_smem") == 1 + 4 + 2
