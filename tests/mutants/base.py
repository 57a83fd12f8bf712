"""A row of the list of planted bugs, and what came of it."""

import dataclasses
import time

from paged.testing import CheckFailure

from .planting import Plant, planted
from .trials import TRIALS


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A planted bug.

    * ``kind``: what it breaks: ``"masks"``, ``"visits"``, ``"softmax"``, ...
    * ``name``: the bug, in a few words.
    * ``plant``: puts it into the library.
    * ``trial``: the name in `TRIALS` of the check that it is tried on.
    * ``killed_by``: the name of the check that must fail.
    * ``sees``: words that the failure must say, such as ``"not finite"``; any, where it is empty.
    * ``in_every_run``: whether `make test` tries it too.
    """

    kind: str
    name: str
    plant: Plant = dataclasses.field(repr=False)
    trial: str
    killed_by: str
    sees: str = ""
    in_every_run: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a mutant: which check failed, or ``"nothing"`` where it survived; and what the check said."""

    mutant: Mutant
    killed_by: str
    said: str
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the check that must kill it did, and saw what it must see."""
        return self.killed_by == self.mutant.killed_by and self.mutant.sees in self.said


def run(mutant: Mutant) -> Result:
    """Plant a mutant, and try it."""
    start = time.process_time()
    with planted(mutant.plant):
        try:
            TRIALS[mutant.trial]()
            killed_by, said = "nothing", ""
        except CheckFailure as failure:
            killed_by, said = failure.check, str(failure)
        except Exception as error:
            killed_by, said = type(error).__name__, str(error)
    return Result(mutant, killed_by, said, time.process_time() - start)
