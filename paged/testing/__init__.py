"""Proofs for masks, score operations, lowerings, layers and pools: yours, and ours."""

from .arrays import Built as Built
from .arrays import build as build
from .arrays import layers_of as layers_of
from .cases import CORNERS as CORNERS
from .cases import Case as Case
from .cases import Corner as Corner
from .failures import CheckFailure as CheckFailure
from .lowerings import LOWERING_CHECKS as LOWERING_CHECKS
from .lowerings import Checked as Checked
from .lowerings import check_lowering as check_lowering
from .masks import MASK_CHECKS as MASK_CHECKS
from .masks import check_mask as check_mask
from .scores import SCORE_CHECKS as SCORE_CHECKS
from .scores import check_score_op as check_score_op
from .specs import SPECS as SPECS
from .tolerances import ROUNDED_WEIGHTS as ROUNDED_WEIGHTS
from .tolerances import TOLERANCES as TOLERANCES
from .tolerances import assert_bitwise as assert_bitwise
from .tolerances import assert_output as assert_output
from .tolerances import assert_state as assert_state
from .tolerances import assert_states_close as assert_states_close
from .tolerances import exact_state as exact_state
