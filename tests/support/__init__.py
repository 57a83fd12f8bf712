"""What the tests share: cases, an independent oracle and tolerances. `tests/README.md` says where a test goes."""

from paged.testing import CORNERS as CORNERS
from paged.testing import ROUNDED_WEIGHTS as ROUNDED_WEIGHTS
from paged.testing import TOLERANCES as TOLERANCES
from paged.testing import Built as Built
from paged.testing import Case as Case
from paged.testing import Corner as Corner
from paged.testing import assert_state_close as assert_state_close
from paged.testing import build as build
from paged.testing.arrays import layers_of as layers_of
from paged.testing.tolerances import assert_bitwise as assert_bitwise
from paged.testing.tolerances import assert_states_close as assert_states_close
from paged.testing.tolerances import exact_state as exact_state

from .lowerings import ALL_LOWERINGS as ALL_LOWERINGS
from .lowerings import every_lowering as every_lowering
from .lowerings import lowered as lowered
from .lowerings import state_of as state_of
from .specs import PHASES as PHASES
from .specs import SPECS as SPECS
from .specs import case_of as case_of
from .specs import real as real
