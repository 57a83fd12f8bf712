"""Runs cases on the kernel for GPUs, interpreted and watched; and says where that cannot be."""

import functools
import importlib.util

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import paged
from paged.lower import Attend, Schedule
from paged.lower.jax_version import HAS_GPU_KERNELS
from paged.spec import AttentionSpec, AttentionState, PageLayout
from paged.testing import Built, Case, assert_state_close, interpreted, watched
from tests.support import ROUNDED_WEIGHTS

PATIENCE = 120.0  # seconds that one interpreted kernel may run; those of the tests take 1 to 4

needs_kernels = pytest.mark.skipif(
    not HAS_GPU_KERNELS,
    reason=f"the kernel is written for JAX 0.11 or later, and this is JAX {jax.__version__}: `make test-gpu-proofs` "
    "makes an environment that has it.",
)
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"Pallas's interpreter of GPU kernels is in JAX 0.12 and later, and this is JAX {jax.__version__}: "
    "`make test-gpu-proofs` makes an environment that has it.",
)
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or jax.__version_info__ < (0, 12),
    reason="the compiler for GPUs is in jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc, beside JAX 0.12: "
    "`make test-gpu-proofs` makes an environment that has them.",
)


@functools.lru_cache(maxsize=64)
def kernel_of(spec: AttentionSpec, layout: PageLayout, schedule: Schedule | None = None) -> Attend:
    """The attention by the kernel for GPUs, interpreted."""
    return interpreted(paged.lower(spec, layout, "gpu", schedule=schedule))


def state_of(case: Case, built: Built, schedule: Schedule | None = None) -> AttentionState:
    """The state of built arrays, by a watched kernel."""
    attend = kernel_of(case.spec, case.layout, schedule)
    given = (built.q, built.pages, built.batch, built.sinks)
    return watched(attend.state, *given, must_interpret=True, patience=PATIENCE)


def assert_equals_reference(case: Case, built: Built, schedule: Schedule | None = None) -> None:
    """Assert that a watched kernel computes the reference's state, within the rounding of its weights."""
    assert_state_close(state_of(case, built, schedule), built, weights=ROUNDED_WEIGHTS)
