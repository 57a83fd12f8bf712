"""Writing a step's keys and values by kernels, in place, where XLA's scatter would copy the pool."""

from .kernels import refuses_write as refuses_write
from .kernels import write_rows as write_rows
