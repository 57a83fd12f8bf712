"""Who picks the schedule of a call: the caller, then a context, then the tuning file, then the lowering itself.

Read in this order: `choice` decides, `advice` is what contexts and files proposed, `context` is where they come from,
`file`, `key`, `text` and `lock` are the tuning file, and `grid` lists neighbours of a schedule that are worth timing.
"""

from .advice import NO_ADVICE as NO_ADVICE
from .advice import Advice as Advice
from .advice import Proposal as Proposal
from .choice import HEURISTIC as HEURISTIC
from .choice import Choice as Choice
from .choice import choose as choose
from .choice import choose_for_any_call as choose_for_any_call
from .context import in_force as in_force
from .context import schedules as schedules
from .file import Entry as Entry
from .file import TuningFile as TuningFile
from .grid import around as around
from .grid import grid as grid
from .grid import powers_up_to as powers_up_to
from .key import Key as Key
from .key import device_kind as device_kind
from .warning import TuningWarning as TuningWarning
from .warning import warn_once as warn_once
