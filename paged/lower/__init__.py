"""How an attention runs: spec to `Program` to `Schedule` to a pure function, per target."""

from .attend import Attend as Attend
from .attend import lower as lower
from .attend import write as write
from .call import Call as Call
from .checks import check as check
from .compile_for import Compiled as Compiled
from .compile_for import CompileError as CompileError
from .compile_for import compile_for as compile_for
from .explain import Explanation as Explanation
from .lowering import Lowering as Lowering
from .mesh import ArraySpecs as ArraySpecs
from .mesh import Axes as Axes
from .mesh import ShardedAttend as ShardedAttend
from .program import Program as Program
from .schedule import Schedule as Schedule
from .select import LOWERINGS as LOWERINGS
from .select import refusals as refusals
from .sequences import Sequences as Sequences
from .simplify import normal_form as normal_form
from .visits import page_coverage as page_coverage
from .visits import visible_pages as visible_pages
from .xla import dense_attention as dense_attention
