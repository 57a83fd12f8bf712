"""Public facts of the GPUs that the kernel is made for: what a schedule has to fit."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU, as one JAX device sees it.

    * ``device_kinds``: the names that ``jax.Device.device_kind`` has for it.
    * ``multiprocessors``: how many blocks of threads run side by side, with two on each.
    * ``shared_bytes``: shared memory of a multiprocessor.
    * ``hbm_bytes_per_second``: peak bandwidth.
    * ``cycles_per_second``: the clock.

    Sources: NVIDIA's data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU", and the CUDA C++ Programming Guide,
    "Technical Specifications per Compute Capability" 9.0.
    """

    generation: str
    device_kinds: tuple[str, ...]
    multiprocessors: int
    hbm_bytes_per_second: float
    shared_bytes: int = 228 * 2**10
    cycles_per_second: float = 1.98e9

    @property
    def shared_for_a_block(self) -> int:
        """Shared memory that one block of threads may occupy while two run on a multiprocessor. The system keeps 1 KiB
        for each."""
        return self.shared_bytes // 2 - 2**10


GPUS: dict[str, Gpu] = {
    gpu.generation: gpu
    for gpu in (
        Gpu("h100", ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"), 132, 3.35e12),
        Gpu("h200", ("NVIDIA H200",), 132, 4.8e12),
    )
}


def gpu_named(generation: str | Gpu) -> Gpu:
    """The facts of a GPU. Raises a ``ValueError`` that lists the known ones."""
    if isinstance(generation, Gpu):
        return generation
    if not isinstance(generation, str) or generation not in GPUS:
        raise ValueError(f"generation must be one of {sorted(GPUS)}; got {generation!r}.")
    return GPUS[generation]


def this_gpu() -> Gpu:
    """This process's first GPU, if it is known; else an H100."""
    kind = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""
    return next((gpu for gpu in GPUS.values() if kind in gpu.device_kinds), GPUS["h100"])


def another_gpu() -> str | None:
    """What this process's GPU is called, if it is no Hopper; None if it is one, and where there is no GPU."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    return None if str(getattr(device, "compute_capability", "")).startswith("9.") else device.device_kind
