"""What the tests share: cases, an independent oracle, tolerances and the table of lowerings.

Properties are written once, and every table below is crossed with them. `docs/extending.md` says more.

- A new mask: `mask_by_rule` in `oracle.py`, `leaf_masks` in `paged/testing/strategies.py`; ``TABLE``, ``LEAVES`` and
  ``ERRORS`` in `tests/spec/test_masks.py`, ``EXAMPLES`` in `tests/lower/test_normal_form.py`, ``COUNTS`` in
  `tests/lower/test_pages_visited.py`, ``MASKS`` in `tests/test_pairs.py`.
- A new score operation: `_score` in `oracle.py`, ``SCORES`` in `tests/test_pairs.py`.
- A new page order: ``SHAPES`` and ``PLACES`` in `tests/spec/test_layout.py`. Other tests run over ``PAGE_ORDERS``.
- A new lowering: ``SMALL_SCHEDULES`` in `lowerings.py`. `ALL_LOWERINGS` finds it, unless its target is ``"tpu"``.
- A new way to run an attention: ``ROWS`` in `tests/test_live.py`.
- A new term or page order on the TPU kernels: the tables of `tests/tpu/test_interpreted.py` and of `test_compiles.py`.
- A new corner of lengths and rows: ``CORNERS`` in `paged/testing/cases.py`. A new dtype: ``TOLERANCES`` in
  `paged/testing/tolerances.py`.
"""

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
