"""What lowerings read: the `Program` of a spec, and the parts of a call that every target computes alike."""

from .call import COMMON as COMMON
from .call import Call as Call
from .call import at_most as at_most
from .integers import floor_div as floor_div
from .intervals import PageIntervals as PageIntervals
from .program import Program as Program
from .results import Results as Results
from .results import Wanted as Wanted
from .sequences import Sequences as Sequences
from .sequences import count_up_to as count_up_to
from .simplify import implies as implies
from .simplify import normal_form as normal_form
from .softmax import Running as Running
from .softmax import select_values as select_values
from .softmax import update_maximum as update_maximum
from .terms import Terms as Terms
from .terms import kernel_terms as kernel_terms
from .terms import plain_terms as plain_terms
from .terms import refused_operations as refused_operations
from .visits import Visits as Visits
from .visits import most_pages_seen as most_pages_seen
from .visits import page_coverage as page_coverage
from .visits import visits_by_scatter as visits_by_scatter
from .visits import visits_by_sort as visits_by_sort
