"""`Estimate`: a kernel's cycles per KV token beside the cycles that the token's bytes take from HBM."""

import dataclasses
from collections.abc import Mapping

from .chips import CHIPS
from .report import Kernel


@dataclasses.dataclass
class Estimate:
    """Modelled cycles per KV token, all heads of the kernel together.

    ``ratio`` is ``compute_cycles`` over ``hbm_cycles``: below 1 the kernel's own work can hide behind its transfers.
    ``model_cycles`` has the waits for transfers too; it is known of kernels that were run.
    """

    compute_cycles: float
    hbm_cycles: float
    model_cycles: float | None

    @property
    def ratio(self) -> float:
        """Compute cycles over the cycles that the bytes take."""
        return self.compute_cycles / self.hbm_cycles


def estimate_run(kernel: Kernel, generation: str, *, tokens: int, bytes_per_token: float) -> Estimate:
    """The estimate of a kernel that was run on ``tokens`` KV tokens of ``bytes_per_token`` bytes, keys and values.

    Cores of one device work side by side, so the slower one counts. Raises ``ValueError`` where the kernel was not run.
    """
    if not kernel.runs:
        raise ValueError(f"{kernel.name} was not run: there are no cycles to divide by the tokens")
    compute = max(max(run.issue_cycles, run.matrix_cycles) for run in kernel.runs) / tokens
    return Estimate(compute, _hbm(generation, bytes_per_token), max(run.model_cycles for run in kernel.runs) / tokens)


def estimate_loop(
    kernel: Kernel,
    generation: str,
    loop: str,
    *,
    tokens_per_iteration: float,
    bytes_per_token: float,
    trips: Mapping[str, float] | None = None,
) -> Estimate:
    """The estimate of one loop, without running it: its longest path, and that of each nested loop ``trips`` times."""
    paths = {other.name: other.path_max for other in kernel.loops}
    cycles = paths[loop] + sum(count * paths[name] for name, count in (trips or {}).items())
    return Estimate(cycles / tokens_per_iteration, _hbm(generation, bytes_per_token), None)


def _hbm(generation: str, bytes_per_token: float) -> float:
    return bytes_per_token / CHIPS[generation].bytes_per_cycle
