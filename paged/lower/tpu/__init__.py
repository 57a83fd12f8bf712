"""Decode on TPUs by Pallas kernels: pages streamed from HBM, the next ones on their way while these are worked on."""

from .chips import CHIPS as CHIPS
from .chips import Chip as Chip
from .launch import Launch as Launch
