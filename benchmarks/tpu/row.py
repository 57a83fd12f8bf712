"""`Row`: one candidate on one shape and generation, and every figure that is modelled of it."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Row:
    """One candidate on one shape and generation. Every figure is modelled; all of the call's kernels are added up.

    ``cycles`` are those of the transfers' model or of the matrix unit, whichever are more; ``model_cycles`` and
    ``mxu_cycles`` are each alone, ``bundles`` those issued, all three of the busier core, ``all_bundles`` of both.
    ``needed_cycles`` are those of the needed bytes at the public peak of the device's HBM. ``error`` says why there is
    no figure, ``note`` what to know about those that there are. ``other_operations`` are XLA's beside the kernels, by
    name and size in bundles.

    ``whole_cycles`` are those of the whole call, kernels and XLA's operations; 0 where they are not known, and
    ``whole_note`` says why. ``before_cycles``, ``between_cycles`` and ``after_cycles`` are XLA's, before the first
    kernel, between kernels and after the last; ``operations`` is how many operations ran, and ``estimated_cycles`` are
    theirs by libtpu's own cost model. ``writes`` says whether the call also writes this step's keys and values.
    """

    shape: str
    generation: str
    candidate: str
    error: str = ""
    note: str = ""
    cycles: float = 0.0
    model_cycles: float = 0.0
    mxu_cycles: float = 0.0
    needed_cycles: float = 0.0
    bundles: int = 0
    all_bundles: int = 0
    read_bytes: int = 0
    visible_bytes: int = 0
    written_bytes: int = 0
    transfers: int = 0
    spills: int = 0
    vmem_bytes: int = 0
    compile_seconds: float = 0.0
    cores: int = 0
    kernels: list[str] = dataclasses.field(default_factory=list)
    other_operations: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    writes: bool = False
    whole_cycles: float = 0.0
    before_cycles: float = 0.0
    between_cycles: float = 0.0
    after_cycles: float = 0.0
    operations: int = 0
    estimated_cycles: float = 0.0
    whole_note: str = ""
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
