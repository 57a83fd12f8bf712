"""What the tests share: cases, an independent oracle, tolerances and the table of lowerings.

`docs/extending.md` lists the tables that a new mask, score operation, page order or lowering needs a row of.
"""

from .arrays import Built as Built
from .arrays import build as build
from .arrays import layers_of as layers_of
from .cases import CORNERS as CORNERS
from .cases import Case as Case
from .cases import Corner as Corner
from .compare import ROUNDED_WEIGHTS as ROUNDED_WEIGHTS
from .compare import TOLERANCES as TOLERANCES
from .compare import assert_bitwise as assert_bitwise
from .compare import assert_state as assert_state
from .compare import assert_states_close as assert_states_close
from .compare import exact_state as exact_state
from .lowerings import ALL_LOWERINGS as ALL_LOWERINGS
from .lowerings import every_lowering as every_lowering
from .lowerings import lowered as lowered
from .lowerings import state_of as state_of
from .specs import PHASES as PHASES
from .specs import SPECS as SPECS
from .specs import case_of as case_of
