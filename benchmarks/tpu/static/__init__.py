"""Models the cost of Pallas TPU kernels without a TPU, from the final program that the real compiler makes."""

from .bundles import parse_bundles as parse_bundles
from .chips import CHIPS as CHIPS
from .chips import Chip as Chip
from .estimate import Estimate as Estimate
from .estimate import estimate_loop as estimate_loop
from .estimate import estimate_run as estimate_run
from .flow import Program as Program
from .loops import Loop as Loop
from .loops import loops_of as loops_of
from .overlays import delay_slots as delay_slots
from .report import Kernel as Kernel
from .report import Report as Report
from .report import model as model
from .report import read_dumps as read_dumps
from .run import Run as Run
from .run import run_program as run_program
from .scalars import kernel_scalars as kernel_scalars
from .text import described as described
from .transfers import TransferModel as TransferModel
from .units import parse_utilization as parse_utilization
from .unknowns import unknown_control as unknown_control
from .whole import Whole as Whole
from .whole import whole_call as whole_call
