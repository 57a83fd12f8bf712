"""Writing a step's keys and values by kernels, in place, where XLA's scatter would copy the pool."""

from .launch import write_rows as write_rows
from .pipeline import pipeline as pipeline
from .plan import refuses_write as refuses_write
