"""A bar of progress on stderr."""

import importlib
import importlib.util
import sys
from typing import Any


class Bar:
    """Progress on stderr: a bar where tqdm is installed, else a line for each step, or nothing.

    * ``unit``: what is counted.
    * ``has_lines``: whether steps are told in lines where there is no tqdm.
    """

    def __init__(self, unit: str = "step", has_lines: bool = True):
        self._bar: Any = None
        if importlib.util.find_spec("tqdm") is not None:
            self._bar = importlib.import_module("tqdm").tqdm(total=0, unit=unit, leave=False, dynamic_ncols=True)
        self._has_lines, self._last = has_lines, ""

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, total: int, what: str) -> None:
        """Show that ``done`` of ``total`` steps are done, and what is being done now."""
        if self._bar is None:
            if what != self._last and self._has_lines:
                print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)
        else:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if what != self._last:
                self._bar.set_description(what)
        self._last = what

    def write(self, text: str) -> None:
        """Print to stdout, above the bar where both are on a terminal."""
        if self._bar is None or not sys.stdout.isatty():
            print(text, end="", flush=True)
            return
        with self._bar.external_write_mode(file=sys.stdout):
            print(text, end="", flush=True)
