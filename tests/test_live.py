"""NaN or infinity in live keys and values stays in its own sequence, in every page order: on XLA, and on the kernels.

`tests/test_lowerings.py` asks it of every runner, in that runner's own order.
"""

import pytest

from paged.spec import PAGE_ORDERS
from paged.testing import RUNNERS
from tests.support.specs import PLAIN

CHECK = "bad values stay in their sequence"


# Orders of two kinds, in two phases, run always.
FEW = [pytest.param(x, marks=[pytest.mark.kernels] * (x not in ("packed", "split"))) for x in PAGE_ORDERS]


@pytest.mark.parametrize("order", FEW)
def test_what_is_bad_reaches_no_other_sequence(order):
    runner = RUNNERS["xla"]
    phase = "decode" if order in ("packed", "joined") else "ragged"
    runner.check(specs=[PLAIN], layouts=[runner.layout.replace(order=order)], phases=[phase], checks=[CHECK])
