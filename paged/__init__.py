"""Attention over a paged KV cache, in pure JAX: one declaration, lowered to each target."""

import importlib
from typing import TYPE_CHECKING, Any

from . import lower as lower
from ._version import __version__ as __version__
from .lower import CHIPS as CHIPS
from .lower import GPU_GRAPHS as GPU_GRAPHS
from .lower import Around as Around
from .lower import ArraySpecs as ArraySpecs
from .lower import Attend as Attend
from .lower import Axes as Axes
from .lower import Chip as Chip
from .lower import Compiled as Compiled
from .lower import CompileError as CompileError
from .lower import DecodeSchedule as DecodeSchedule
from .lower import Explanation as Explanation
from .lower import GpuDecodeSchedule as GpuDecodeSchedule
from .lower import Plan as Plan
from .lower import Program as Program
from .lower import RaggedSchedule as RaggedSchedule
from .lower import Schedule as Schedule
from .lower import ShardedAttend as ShardedAttend
from .lower import Timing as Timing
from .lower import Trial as Trial
from .lower import Tuned as Tuned
from .lower import TuningFile as TuningFile
from .lower import TuningWarning as TuningWarning
from .lower import XlaSchedule as XlaSchedule
from .lower import check as check
from .lower import compile_for as compile_for
from .lower import copy_pages as copy_pages
from .lower import dense_attention as dense_attention
from .lower import schedules as schedules
from .lower import tree as tree
from .lower import tune as tune
from .lower import write as write
from .spec import ALiBi as ALiBi
from .spec import AttentionSpec as AttentionSpec
from .spec import AttentionState as AttentionState
from .spec import Bias as Bias
from .spec import Causal as Causal
from .spec import Chunk as Chunk
from .spec import Coverage as Coverage
from .spec import Everything as Everything
from .spec import Given as Given
from .spec import GroupedBatch as GroupedBatch
from .spec import Mask as Mask
from .spec import Nothing as Nothing
from .spec import PageLayout as PageLayout
from .spec import Pages as Pages
from .spec import PerHead as PerHead
from .spec import Prefix as Prefix
from .spec import RaggedBatch as RaggedBatch
from .spec import ScoreOp as ScoreOp
from .spec import Segments as Segments
from .spec import SoftCap as SoftCap
from .spec import Spans as Spans
from .spec import Tree as Tree
from .spec import Value as Value
from .spec import Where as Where
from .spec import Window as Window
from .spec import merge as merge
from .spec import presets as presets
from .spec import reference as reference

if TYPE_CHECKING:  # at run time `paged.lower` is the package, which is called like this function
    from .lower import lower as lower
    from .runtime import convert as convert


def __getattr__(name: str) -> Any:
    """The packages that are imported when they are first used: `paged.runtime`, `paged.pictures` and so on.

    So is `paged.convert`, which is `paged.runtime.convert`.
    """
    if name == "convert":
        return importlib.import_module(f"{__name__}.runtime").convert
    if name in ("compat", "models", "pictures", "runtime", "testing"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


lower.draw_with(lambda explanation: __getattr__("pictures").explained(explanation))
