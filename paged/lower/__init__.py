"""How an attention runs: spec to `Program` to `Schedule` to a pure function, per target.

The package is also the function: ``paged.lower(spec, layout)`` is `paged.lower.lower`, so that ``paged.lower.Program``
and ``import paged.lower.tpu`` are what they say.
"""

import inspect
import sys
import types

from . import tree as tree
from ._ahead import first_rows as first_rows
from ._ahead import may_cut as may_cut
from ._ahead import seen_ahead as seen_ahead
from ._around import Around as Around
from ._around import operations_of as operations_of
from ._check import check as check
from ._check import check_values as check_values
from ._check import demands_of as demands_of
from ._compile_for import Compiled as Compiled
from ._compile_for import CompileError as CompileError
from ._compile_for import compile_for as compile_for
from ._explain import Explanation as Explanation
from ._explain import draw_with as draw_with
from ._pages_seen import PagesSeen as PagesSeen
from ._pages_seen import pages_seen as pages_seen
from .attend import Attend as Attend
from .base import Lowering as Lowering
from .base import Schedule as Schedule
from .door import copy_pages as copy_pages
from .door import lower as lower
from .door import write as write
from .gpu import GpuDecodeSchedule as GpuDecodeSchedule
from .gpu_targets import GPU_GRAPHS as GPU_GRAPHS
from .jax_version import MULTIPLIES_WHILE_READING as MULTIPLIES_WHILE_READING
from .jax_version import manual_axes as manual_axes
from .jax_version import on_devices as on_devices
from .jax_version import vary_alike as vary_alike
from .jax_version import whole_rows as whole_rows
from .mesh import ArraySpecs as ArraySpecs
from .mesh import Axes as Axes
from .mesh import ShardedAttend as ShardedAttend
from .mesh import entries_of as entries_of
from .mesh import mesh_axes as mesh_axes
from .mesh import require_mesh as require_mesh
from .plan import Plan as Plan
from .plan import Step as Step
from .program import Call as Call
from .program import Program as Program
from .program import QueryRows as QueryRows
from .program import Sequences as Sequences
from .program import implies as implies
from .program import is_ancestor as is_ancestor
from .program import normal_form as normal_form
from .program import page_coverage as page_coverage
from .program import visits_by_scatter as visits_by_scatter
from .program import visits_by_sort as visits_by_sort
from .registry import LOWERINGS as LOWERINGS
from .registry import TARGETS as TARGETS
from .registry import refusals as refusals
from .schedule import Key as Key
from .schedule import TuningFile as TuningFile
from .schedule import TuningWarning as TuningWarning
from .schedule import cache_folder as cache_folder
from .schedule import schedules as schedules
from .schedule import sources_fingerprint as sources_fingerprint
from .tpu import CHIPS as CHIPS
from .tpu import Chip as Chip
from .tpu import DecodeSchedule as DecodeSchedule
from .tpu import RaggedSchedule as RaggedSchedule
from .tuning import Shape as Shape
from .tuning import Timing as Timing
from .tuning import Trial as Trial
from .tuning import Tuned as Tuned
from .tuning import synthetic as synthetic
from .tuning import tune as tune
from .work import Work as Work
from .work import WorkItem as WorkItem
from .xla import XlaSchedule as XlaSchedule
from .xla import at_index as at_index
from .xla import dense_attention as dense_attention


class _CallableModule(types.ModuleType):
    """A module that is called as the function `lower`."""

    __call__ = staticmethod(lower)
    __signature__ = inspect.signature(lower)


sys.modules[__name__].__class__ = _CallableModule
