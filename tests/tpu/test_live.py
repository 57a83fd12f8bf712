"""NaN or infinity in live keys and values reaches no other sequence: on both kernels, in every page order."""

import pytest

from paged.lower import DecodeSchedule, RaggedSchedule
from paged.spec import PAGE_ORDERS
from paged.testing import Corner
from paged.testing.lowerings import run_check
from paged.testing.promises import ROWS as ROWS_OF_CASES
from paged.testing.promises import Subject
from tests.support import Case
from tests.support.specs import PLAIN

from .interpreter import interpreted

# The first, the third and the last sequence have one stage of the ring after the other: a short block, a whole one, and
# a short one again, beside which the stage keeps a page of the whole one.
CORNER = Corner(lengths=((3, 0), (2, 1), (4, 0), (4, -1), (3, 0)), rows=(2, 4, 2, 3, 2))
SINGLE = DecodeSchedule(pages_per_block=4, buffers=2)
KERNELS = {
    "decode": ({"page_size": 8, "phase": "decode"}, SINGLE),
    "ragged": ({"page_size": 64}, RaggedSchedule(pages_per_block=4, rows_per_tile=16, buffers=2, single_rows=SINGLE)),
}
FAST = (("decode", "packed"),)
ROWS = [
    pytest.param(kernel, order, marks=[pytest.mark.kernels] * ((kernel, order) not in FAST))
    for kernel in KERNELS
    for order in PAGE_ORDERS
]


@pytest.mark.parametrize(("kernel", "order"), ROWS)
def test_what_is_bad_reaches_no_other_sequence(kernel, order):
    facts, schedule = KERNELS[kernel]
    case = Case(spec=PLAIN, order=order, **facts)

    def lower(spec, layout):
        return interpreted(case, schedule, generation="v6e").state

    subject = Subject(lower, PLAIN, case.layout, (CORNER,), 0.0, ROWS_OF_CASES)
    assert run_check("bad values stay in their sequence", subject, case.phase) is None
