"""`TuningWarning`: something in a tuning file was passed over. Said once in a process, never raised as an error."""

import functools
import warnings


class TuningWarning(UserWarning):
    """A tuning file, or an entry of one, is not heeded; the text says which and why. Attention is right without it."""


@functools.lru_cache(maxsize=1024)
def warn_once(text: str) -> None:
    """Warn, unless this process has warned in the same words."""
    warnings.warn(text, TuningWarning, stacklevel=3)
