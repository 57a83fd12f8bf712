"""The XLA target: gather and online softmax in plain `jax.lax`, on any platform."""

from .copy import copy_pages as copy_pages
from .copy import copy_scales as copy_scales
from .cpu import at_index as at_index
from .dense import dense_attention as dense_attention
from .linear import Linear as Linear
from .linear import linear as linear
from .lowering import XLA_BLOCKS as XLA_BLOCKS
from .places import Places as Places
from .schedule import XlaSchedule as XlaSchedule
from .write import stored_at as stored_at
from .write import stored_rows as stored_rows
from .write import token_rows as token_rows
from .write import write_scales as write_scales
