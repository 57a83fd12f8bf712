"""How a bug is planted in place of a method."""

from collections.abc import Callable
from typing import Any

import pytest


def plant_method(patch: pytest.MonkeyPatch, cls: type, name: str, mutant: Callable[[Any], Any]) -> None:
    """Put ``mutant(original)`` in place of a method or class method of this very class."""
    raw = cls.__dict__[name]
    if isinstance(raw, classmethod):
        patch.setattr(cls, name, classmethod(mutant(raw.__func__)))
    else:
        patch.setattr(cls, name, mutant(raw))
