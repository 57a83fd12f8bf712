"""`TuningWarning`: something in a tuning file is ignored. Each text is shown once per process."""

import functools
import warnings


class TuningWarning(UserWarning):
    """A tuning file, or an entry of one, is ignored; the text says which one and why. Results are right without it."""


@functools.lru_cache(maxsize=1024)
def warn_once(text: str) -> None:
    """Warn, unless this process has shown the same text before."""
    warnings.warn(text, TuningWarning, stacklevel=3)
