"""TPU generations: their public peaks, and the constants with which cycles and transfers are modelled."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation's constants. None of them was measured on a TPU.

    ``hbm_bytes_per_second`` is the public peak of a whole chip. ``clock_hz`` follows from the public bfloat16 peak:
    operations per second over ``2 * mxus * mxu_size**2 * rows_per_cycle`` of all cores. ``rows_per_cycle`` is the
    interval at which libtpu issues ``vmatmul``, read from its bundle profile.

    The intervals are cycles between two instructions of one matrix unit, read from the same profile: ``push_interval``
    to load a stationary vector register, ``matmul_interval`` and ``matmul_f32_interval`` to stream one.

    ``dma_bytes_per_cycle``, ``dma_latency`` and ``dma_overhead`` are libtpu's own model of transfers, read from the
    estimate that it makes of kernels with a known number of transfers (``model(..., simulate=True)``). Its v5p gives
    one core the whole chip's bandwidth; two cores at work share it.

    ``delay_slots`` is how many bundles issue after a branch before it is taken; ``None`` where every branch encodes
    its own number.
    """

    topology: str  # of the smallest slice, for the ahead-of-time compiler
    clock_hz: float
    hbm_bytes_per_second: float
    cores: int  # of a chip, which share its HBM
    is_megacore: bool  # one JAX device is all cores of a chip
    mxus: int  # matrix units of a core
    mxu_size: int
    rows_per_cycle: int  # bfloat16 rows that a matrix unit accepts per cycle
    push_interval: int
    matmul_interval: int
    matmul_f32_interval: int
    dma_bytes_per_cycle: float
    dma_latency: int  # cycles
    dma_overhead: float  # cycles of the engine per transfer
    delay_slots: int | None
    granule_bytes: int = 32  # the unit of a transfer's size

    @property
    def bytes_per_cycle(self) -> float:
        """HBM bytes per cycle at the public peak, for one JAX device."""
        return self.hbm_bytes_per_second / self.clock_hz / (1 if self.is_megacore else self.cores)


def _v5(topology: str, clock: float, hbm: float, cores: int, dma: tuple[float, int, float]) -> Chip:
    return Chip(topology, clock, hbm, cores, cores > 1, 4, 128, 1, 4, 16, 8, *dma, delay_slots=4)


CHIPS = {
    "v4": Chip("v4:2x2x1", 1.05e9, 1228e9, 2, True, 4, 128, 1, 8, 16, 8, 470.0, 700, 4.0, 1, granule_bytes=512),
    "v5e": _v5("v5e:2x2", 1.503e9, 819e9, 1, (490.0, 785, 4.0)),
    "v5p": _v5("v5p:2x2x1", 1.751e9, 2765e9, 2, (1248.0, 645, 2.5)),
    "v6e": Chip("v6e:2x2", 1.755e9, 1640e9, 1, False, 2, 256, 2, 4, 8, 4, 774.0, 500, 2.5, 4),
    "tpu7x": Chip("tpu7x:2x2x1", 2.203e9, 7380e9, 2, False, 2, 256, 2, 4, 8, 4, 1682.0, 642, 2.5, None),
}
