"""Public facts of TPU generations: the memory that a schedule has to fit, and the bandwidth of its model."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation, as one JAX device sees it.

    * ``topology``: the smallest slice that the compiler can be asked for ahead of time.
    * ``device_kinds``: the names that ``jax.Device.device_kind`` has for it.
    * ``cores``: TensorCores that one device drives at once ("megacore"). A kernel splits its work over them.
    * ``vmem_bytes``, ``smem_bytes``: vector and scalar memory of a core.
    * ``hbm_bytes_per_second``: peak bandwidth of one JAX device.
    * ``has_tall_tiles``: vector memory holds 16-bit arrays in tiles of 16 rows, but HBM in tiles of 8. So rows of more
      than one register are copied by strides (seen in compiled code).

    Sources: cloud.google.com/tpu/docs, the pages "TPU v4", "v5e", "v5p", "v6e" and "TPU7x" (bandwidth per chip; a
    device of tpu7x is half a chip). Sizes of memory are in the table of JAX's ``pallas.tpu.get_tpu_info``.
    """

    generation: str
    topology: str
    device_kinds: tuple[str, ...]
    cores: int
    vmem_bytes: int
    hbm_bytes_per_second: float
    smem_bytes: int = 2**20
    has_tall_tiles: bool = False

    @property
    def words(self) -> str:
        """What messages call it."""
        known = CHIPS.get(self.generation)
        if known is None:
            return "a chip that is not known (the least of all generations is assumed)"
        if self.vmem_bytes < known.vmem_bytes:
            return f"{self.generation} with {self.vmem_bytes} bytes of vector memory allowed"
        return self.generation

    @property
    def vmem_for_buffers(self) -> int:
        """Vector memory that the buffers of a kernel may occupy; the compiler needs the rest for what it spills."""
        return int(_BUFFER_SHARE * self.vmem_bytes)

    @property
    def smem_for_lists(self) -> int:
        """Scalar memory that the lists of a kernel may occupy; the compiler needs the rest."""
        return int(_LIST_SHARE * self.smem_bytes)


_BUFFER_SHARE, _LIST_SHARE = 0.6, 0.6

# The shape of a vector register of 32-bit numbers: 8 rows of 128 lanes. Memory is laid out in tiles of this shape.
LANES, SUBLANES = 128, 8

_MIB = 2**20

CHIPS: dict[str, Chip] = {
    chip.generation: chip
    for chip in (
        Chip("v4", "v4:2x2x1", ("TPU v4",), 2, 16 * _MIB, 1228e9),
        Chip("v5e", "v5e:2x2", ("TPU v5 lite", "TPU v5e"), 1, 128 * _MIB, 819e9),
        Chip("v5p", "v5p:2x2x1", ("TPU v5", "TPU v5p"), 2, 64 * _MIB, 2765e9),
        Chip("v6e", "v6e:2x2", ("TPU v6 lite", "TPU v6e"), 1, 128 * _MIB, 1640e9),
        Chip("tpu7x", "tpu7x:2x2x1", ("TPU7x", "TPU7"), 1, 64 * _MIB, 3690e9, has_tall_tiles=True),
    )
}
"""The generations of TPUs that are known, by the name that `Attend.on_chip` and `compile_for` take."""

# For a machine that is none of these: one core, and no more memory than any of them has.
ANY_CHIP = Chip("any", "", (), 1, 16 * _MIB, 819e9)


def chip_named(generation: str | Chip) -> Chip:
    """The facts of a generation; a chip's are its own. Raises a ``ValueError`` that lists the known ones."""
    if isinstance(generation, Chip):
        return generation
    if not isinstance(generation, str) or generation not in CHIPS:
        raise ValueError(f"generation must be one of {sorted(CHIPS)}; got {generation!r}.")
    return CHIPS[generation]


def this_chip() -> Chip:
    """The chip of this process's first TPU; `ANY_CHIP` if there is none or it is not in the table."""
    return chip_of(jax.devices()[0]) if jax.default_backend() == "tpu" else ANY_CHIP


def chip_of(device: Any) -> Chip:
    """The chip of a device, or `ANY_CHIP`."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.device_kinds), ANY_CHIP)


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in vector memory, whose last two axes are padded to whole tiles.

    A tile has 128 lanes, and 8 rows of 32-bit, 16 of 16-bit or 32 of 8-bit numbers.
    """
    itemsize = jnp.dtype(dtype).itemsize
    rows = SUBLANES * (4 // itemsize)
    padded = (*shape[:-2], -(-shape[-2] // rows) * rows, -(-shape[-1] // LANES) * LANES)
    return math.prod(padded) * itemsize
