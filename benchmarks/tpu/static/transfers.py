"""Transfers and semaphores: what was moved, and when it arrives by a simple model of the DMA engine."""

import collections
import dataclasses
import heapq

_LOCAL_BYTES_PER_CYCLE, _LOCAL_LATENCY = 512, 100  # transfers that don't touch HBM; an assumption


@dataclasses.dataclass(frozen=True)
class TransferModel:
    """All transfers of HBM share one engine. A transfer of ``n`` bytes takes ``overhead + n / bytes_per_cycle`` cycles
    of it, after those before it, and arrives ``latency`` cycles later.
    """

    bytes_per_cycle: float
    latency: float
    overhead: float


class Transfers:
    """The DMA engine of one core. Without a model every transfer arrives when it starts."""

    def __init__(self, granule_bytes: int, model: TransferModel | None):
        self.model = model
        self.flags: collections.defaultdict[int, int] = collections.defaultdict(int)  # semaphores, in granules
        self.count = self.all_bytes = self.read_bytes = self.written_bytes = 0
        self.hbm_sizes: collections.Counter[int] = collections.Counter()
        self._granule_bytes = granule_bytes
        self._under_way: collections.defaultdict[int, list[tuple[float, int]]] = collections.defaultdict(list)
        self._engine_free = 0.0

    def start(self, kind: str, granules: int, flag: int, now: float) -> None:
        """Begin a transfer, such as ``"hbm_to_vmem"``, that raises a semaphore by its size when it arrives."""
        size = max(0, granules) * self._granule_bytes
        self.count += 1
        self.all_bytes += size
        if "hbm" in kind:
            self.hbm_sizes[size] += 1
        if kind.startswith("hbm_to"):
            self.read_bytes += size
        elif kind.endswith("to_hbm"):
            self.written_bytes += size
        heapq.heappush(self._under_way[flag], (self._arrival(kind, size, now), granules))

    def flag(self, flag: int, now: float) -> int:
        """A semaphore's value at a time."""
        queue = self._under_way[flag]
        while queue and queue[0][0] <= now:
            self.flags[flag] += heapq.heappop(queue)[1]
        return self.flags[flag]

    def reached(self, flag: int, amount: int, now: float) -> float | None:
        """When a semaphore reaches a value, ``now`` or later; ``None`` where no transfer under way brings it there."""
        time, queue = now, self._under_way[flag]
        if self.flag(flag, now) < amount:
            while queue and self.flags[flag] < amount:
                time, granules = heapq.heappop(queue)
                self.flags[flag] += granules
        return time if self.flags[flag] >= amount else None

    def _arrival(self, kind: str, size: int, now: float) -> float:
        if self.model is None:
            return now
        if "hbm" not in kind:
            return now + size / _LOCAL_BYTES_PER_CYCLE + _LOCAL_LATENCY
        self._engine_free = max(now, self._engine_free) + size / self.model.bytes_per_cycle + self.model.overhead
        return self._engine_free + self.model.latency
