"""The GPUs that the kernel is made for, and what a schedule has to fit on one."""

import jax

from ..gpu_targets import GPU_TARGETS, GpuTarget

HOPPERS: dict[str, GpuTarget] = {name: gpu for name, gpu in GPU_TARGETS.items() if gpu.capability == (9, 0)}


def shared_for_a_block(gpu: GpuTarget) -> int:
    """Shared memory that a block of threads may occupy while two run on a multiprocessor. The system keeps 1 KiB for
    each (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" 9.0)."""
    return gpu.shared_bytes // 2 - 2**10


def this_gpu() -> GpuTarget:
    """This process's first GPU, if it is a Hopper that is known; else an H100."""
    kind = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""
    return next((gpu for gpu in HOPPERS.values() if kind in gpu.device_kinds), HOPPERS["h100"])


def another_gpu(gpu: GpuTarget | None) -> str | None:
    """What a GPU is called that is no Hopper, this process's if none is given; None for a Hopper, and without a GPU."""
    if gpu is not None:
        return None if gpu.name in HOPPERS else gpu.name
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    return None if str(getattr(device, "compute_capability", "")).startswith("9.") else device.device_kind
