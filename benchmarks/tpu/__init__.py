"""What the benchmarks of TPU kernels share: compile with the real TPU compiler, model without a TPU, print."""

from .command import GENERATIONS as GENERATIONS
from .command import described as described
from .command import measured as measured
from .command import parser as parser
from .command import rows_of as rows_of
from .command import write as write
from .measure import measure as measure
from .model import BUILD as BUILD
from .model import model as model
from .model import print_row as print_row
from .own import OWN as OWN
from .own import PAGED as PAGED
from .own import PAGED_UPDATE as PAGED_UPDATE
from .own import PAGED_WRITE as PAGED_WRITE
from .own import WRITING as WRITING
from .own import paged_call as paged_call
from .peers import Call as Call
from .row import Row as Row
from .shape import Shape as Shape
