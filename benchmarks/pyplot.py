"""matplotlib, where it can be imported."""

import importlib
from typing import Any


def pyplot() -> Any:
    """``matplotlib.pyplot`` that draws into files. Raises ``ImportError`` where it is not installed."""
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")
