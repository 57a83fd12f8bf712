"""What is said of schedules besides `lower`'s own argument: by contexts, and by the file in which tuning keeps them."""

from .advice import NO_ADVICE as NO_ADVICE
from .advice import Advice as Advice
from .advice import Proposal as Proposal
from .context import in_force as in_force
from .context import schedules as schedules
from .file import Entry as Entry
from .file import TuningFile as TuningFile
from .key import Key as Key
from .key import device_kind as device_kind
from .warning import TuningWarning as TuningWarning
from .warning import warn_once as warn_once
