"""Proofs for masks, score operations, lowerings, layers and pools: yours, and ours.

`strategies`, `check_pool` and `PoolMachine` need hypothesis, and `parametrize_with_checks` needs pytest; they are
imported when they are first used. ``pip install "paged[testing]"`` brings both.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .arrays import Built as Built
from .arrays import build as build
from .cases import CORNERS as CORNERS
from .cases import PAST_THE_TABLE as PAST_THE_TABLE
from .cases import Case as Case
from .cases import Corner as Corner
from .failures import CheckFailure as CheckFailure
from .interpreter import KERNEL_CHECKS as KERNEL_CHECKS
from .interpreter import interpret_gpu_params as interpret_gpu_params
from .interpreter import interpret_params as interpret_params
from .interpreter import interpreted as interpreted
from .interpreter import watched as watched
from .layers import check_layer as check_layer
from .layers import check_model as check_model
from .lowerings import Checked as Checked
from .lowerings import check_case as check_case
from .lowerings import check_lowering as check_lowering
from .masks import MASK_CHECKS as MASK_CHECKS
from .masks import check_mask as check_mask
from .pages import assert_in_place as assert_in_place
from .pages import assert_no_leak as assert_no_leak
from .pages import assert_pages_visited as assert_pages_visited
from .pages import poison as poison
from .pages import shuffle_pages as shuffle_pages
from .promises import LOWERING_CHECKS as LOWERING_CHECKS
from .runners import RUNNERS as RUNNERS
from .runners import Runner as Runner
from .runners import across_targets as across_targets
from .runners import mesh_runner as mesh_runner
from .scores import SCORE_CHECKS as SCORE_CHECKS
from .scores import check_score_op as check_score_op
from .specs import SPECS as SPECS
from .tolerances import ROUNDED_WEIGHTS as ROUNDED_WEIGHTS
from .tolerances import TOLERANCES as TOLERANCES
from .tolerances import assert_state_close as assert_state_close
from .writes import WRITES as WRITES
from .writes import check_write as check_write

if TYPE_CHECKING:
    from . import strategies as strategies
    from .parametrize import parametrize_with_checks as parametrize_with_checks
    from .pool import PoolMachine as PoolMachine
    from .pool import check_pool as check_pool
    from .pool_model import PoolModel as PoolModel

# Where the names are that need hypothesis or pytest.
_LATE = {
    "parametrize_with_checks": "parametrize",
    "check_pool": "pool",
    "PoolMachine": "pool",
    "PoolModel": "pool",
    "strategies": "strategies",
}


def __getattr__(name: str) -> Any:
    """What needs hypothesis or pytest, imported when it is first used."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LATE[name]}")
    return module if name == _LATE[name] else getattr(module, name)
