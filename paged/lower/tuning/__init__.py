"""Tuning: time the schedules that a call could have on this process's device, and store the fastest."""

from ._tune import tune as tune
from .result import Trial as Trial
from .result import Tuned as Tuned
from .synthetic import Arrays as Arrays
from .synthetic import Shape as Shape
from .synthetic import synthetic as synthetic
from .timing import Timing as Timing
