"""Pages as kernels meet them: work lists, copies of pages, the stream of page blocks, and how a block is read."""

from .brought import Brought as Brought
from .brought import BroughtFor as BroughtFor
from .brought import least_and_most as least_and_most
from .brought import most_brought as most_brought
from .copies import copies_of_pages as copies_of_pages
from .intervals import Computed as Computed
from .intervals import Facts as Facts
from .intervals import IntervalWork as IntervalWork
from .intervals import PageTables as PageTables
from .stream import Holes as Holes
from .stream import Stream as Stream
from .stream import for_each as for_each
from .stream import hole_sign as hole_sign
from .transfer import Pool as Pool
from .transfer import Transfers as Transfers
from .transfer import pools_of as pools_of
from .transfer import refuses_layout as refuses_layout
from .views import Views as Views
from .views import compute_dtype as compute_dtype
from .views import dot as dot
from .work import TileVisits as TileVisits
from .work import WorkList as WorkList
from .work import kernel_slices as kernel_slices
from .work import rows_and_entries as rows_and_entries
