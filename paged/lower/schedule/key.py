"""`Key`: which call a tuned schedule is for, and where it was tuned, as texts that a file can hold."""

import dataclasses
import functools
import os
import pathlib
import platform
from collections.abc import Sequence

import jax

from paged._version import __version__
from paged.spec import PageLayout

from ..program import Call, Program
from .text import program_text


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Key:
    """What one entry of a tuning file is for.

    * ``paged``, ``jax``, ``device``: where it was tuned, the versions and the kind of device.
    * ``lowerings``: the names of the lowerings that could run the call, in order of preference.
    * ``program``, ``layout``: what was tuned.
    * ``shape``: the class of the call's shapes, see `shape_class`.
    """

    paged: str
    jax: str
    device: str
    lowerings: str
    program: str
    layout: str
    shape: str

    @classmethod
    def of(
        cls, program: Program, layout: PageLayout, lowerings: Sequence[str], call: Call, device: str | None = None
    ) -> "Key":
        """The key of a call in this process, or on another kind of device."""
        return cls(
            paged=__version__,  # kernels of another version may differ
            jax=jax.__version__,
            device=device_kind() if device is None else device,
            lowerings=", ".join(lowerings),
            program=program_text(program),
            layout=str(layout),
            shape=shape_class(call),
        )

    @property
    def subject(self) -> tuple[str, ...]:
        """What was tuned, without where it was tuned."""
        return self.lowerings, self.program, self.layout, self.shape


def shape_class(call: Call) -> str:
    """A call's shapes, each number rounded up to a power of two: calls of one class share a tuned schedule.

    >>> call = Call(tokens=6, slots=6, pages_per_seq=200, num_pages=999, query_rows=1, q_dtype=jnp.dtype("bfloat16"))
    >>> shape_class(call)
    'slots=8 pages_per_seq=256 tokens=8 query_rows=1 q=bfloat16'
    """
    rows = "vary" if call.query_rows is None else _up(call.query_rows)
    return (
        f"slots={_up(call.slots)} pages_per_seq={_up(call.pages_per_seq)} tokens={_up(call.tokens)} "
        f"query_rows={rows} q={call.q_dtype.name}"
    )


def _up(number: int) -> int:
    return 2 ** max(0, number - 1).bit_length()


def device_kind() -> str:
    """The kind of this process's device. JAX calls every CPU "cpu"; here it is named by model and usable cores."""
    device = jax.local_devices()[0]
    return _cpu() if device.platform == "cpu" else device.device_kind


@functools.cache
def _cpu() -> str:
    return f"cpu {_cpu_model()}, {_cores()} cores"


def _cpu_model() -> str:
    facts = pathlib.Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
