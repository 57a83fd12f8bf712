"""Who picks the schedule of a call: the caller, then a context, then the tuning file, then the lowering's heuristic.

Read in this order: `choice` decides; `advice` holds what contexts and tuning files proposed; `context` is where the
proposals come from; `file`, `key`, `text`, `lock` and `warning` are the tuning file; and `grid` lists the neighbours of
a schedule that are worth timing.
"""

from .advice import NO_ADVICE as NO_ADVICE
from .advice import Advice as Advice
from .advice import Proposal as Proposal
from .choice import EXPLICIT as EXPLICIT
from .choice import HEURISTIC as HEURISTIC
from .choice import PLANNED as PLANNED
from .choice import Choice as Choice
from .choice import choose as choose
from .choice import choose_for_any_call as choose_for_any_call
from .context import schedules as schedules
from .context import sources_fingerprint as sources_fingerprint
from .file import Entry as Entry
from .file import TuningFile as TuningFile
from .file import cache_folder as cache_folder
from .grid import around as around
from .grid import grid as grid
from .grid import halvings as halvings
from .grid import powers_up_to as powers_up_to
from .key import Key as Key
from .key import device_kind as device_kind
from .warning import TuningWarning as TuningWarning
from .warning import warn_once as warn_once
