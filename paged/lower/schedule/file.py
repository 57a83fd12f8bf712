"""`TuningFile`: tuned schedules in one JSON file, which several processes may read and write at the same time."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..base import Schedule
from .key import Key
from .lock import locked
from .warning import warn_once

SETTING, OFF = "PAGED_TUNING", "off"
_FORMAT = {"paged_tuning": 1}
# The environment variables that name the folder of the process's file where `SETTING` is not set.
_FOLDERS, _FOLDERS_OF_WINDOWS = ("HOME", "XDG_CACHE_HOME"), ("USERPROFILE", "LOCALAPPDATA")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tuned schedule of a file.

    * ``key``: what it is for.
    * ``schedule``: its JSON.
    * ``seconds``: how long a call took with it.
    * ``ratio``: that time over the time of the heuristic's schedule.
    """

    key: Key
    schedule: str
    seconds: float
    ratio: float

    def parsed(self) -> Schedule:
        """The schedule. Raises ``ValueError`` or ``TypeError`` if the JSON is not a schedule's."""
        return Schedule.from_json(self.schedule)

    def __str__(self) -> str:
        try:
            return str(self.parsed())
        except (ValueError, TypeError) as error:
            return f"no schedule: {error}"

    def as_json(self) -> dict[str, Any]:
        """The values that the file holds."""
        return {**dataclasses.asdict(self), "schedule": json.loads(self.schedule)}

    @classmethod
    def from_json(cls, values: Any) -> "Entry":
        """The entry, from the values that a file holds. Raises ``ValueError`` that says what is wrong."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(f"an entry has {names}; got {sorted(values) if isinstance(values, dict) else values!r}")
        key, texts = values["key"], [field.name for field in dataclasses.fields(Key)]
        if not isinstance(key, dict) or sorted(key) != sorted(texts):
            raise ValueError(f"a key has {texts}; got {sorted(key) if isinstance(key, dict) else key!r}")
        if not all(isinstance(text, str) for text in key.values()):
            raise ValueError(f"a key is of texts; got {key}")
        times = (values["seconds"], values["ratio"])
        if not all(isinstance(time, int | float) and 0 < time < math.inf for time in times):
            raise ValueError(f"seconds and ratio are numbers above 0; got {times}")
        return cls(Key(**key), json.dumps(values["schedule"]), *times)


@dataclasses.dataclass(frozen=True)
class TuningFile:
    """Tuned schedules in one JSON file, written by `tune` and read by `lower`.

    Several processes may use one file at the same time. What cannot be read is ignored with a `TuningWarning`. A file
    that does not exist holds no entries.

    **Arguments:**

    - `path`: where the file is. `TuningFile.at` finds the process's own.

    >>> file = TuningFile.at("a_folder/tuned.json")
    >>> print(file)
    tuning file tuned.json
    >>> file.entries()
    ()
    """

    path: pathlib.Path

    @classmethod
    def at(cls, path: "str | os.PathLike[str] | TuningFile | None" = None) -> "TuningFile | None":
        """The file that a path means.

        **Arguments:**

        - `path`: a path; a `TuningFile`; ``"off"``; or None for the process's file. The environment variable
          ``PAGED_TUNING`` says which file that is, or ``"off"``. Where it is not set, the process's file is
          ``paged/tuning.json`` in the platform's cache folder.

        **Returns:** the file, which need not exist; None for ``"off"`` and where there is no cache folder.
        """
        if isinstance(path, TuningFile):
            return path
        if path:
            return _named(path)
        named = os.environ.get(SETTING)
        if named:
            return _named(named)
        first, second = _FOLDERS_OF_WINDOWS if sys.platform == "win32" else _FOLDERS
        return _of_process(sys.platform, os.environ.get(first), os.environ.get(second))

    def __str__(self) -> str:
        return f"tuning file {self.path.name}"

    def entries(self) -> tuple[Entry, ...]:
        """The entries of the file, sorted. The file is read again only when it has changed."""
        stamp = self.stamp()
        return () if stamp is None else _entries(self.path, stamp)

    def stamp(self) -> tuple[int, int, int] | None:
        """A value that changes when the file changes; None while there is no file that can be read."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            warn_once(f"The tuning file {self.path} is ignored: {error}.")
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def store(self, entries: Iterable[Entry]) -> None:
        """Add entries to the file. An entry with a new one's key is replaced; the entries of other processes stay.

        A process that reads meanwhile sees the old file or the new one, each whole. A damaged file is renamed to
        ``<name>.unreadable``, with a warning.

        **Arguments:**

        - `entries`: the entries to add.

        Raises ``OSError`` where the file cannot be written.
        """
        path = pathlib.Path(os.path.realpath(self.path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f"{path.name}.lock")):
            found = _parse(path)
            if found.fault is not None and path.is_file():
                aside = path.with_name(f"{path.name}.unreadable")
                os.replace(path, aside)
                warn_once(f"The tuning file {path} is now {aside}: {found.fault}.")
            every = {entry.key: entry for entry in (*found.entries, *entries)}
            _replace(path, [every[key] for key in sorted(every)])

    def clear(self) -> int:
        """Delete the file. Returns how many entries it had."""
        count = len(self.entries())
        if self.path.parent.is_dir():
            with locked(self.path.with_name(f"{self.path.name}.lock")):
                self.path.unlink(missing_ok=True)
        return count


class _Found(NamedTuple):
    """What a file holds, what is wrong with the file, and what is wrong with some of its entries."""

    entries: tuple[Entry, ...]
    fault: str | None
    faults: tuple[str, ...] = ()


@functools.lru_cache(maxsize=64)
def _entries(path: pathlib.Path, stat: tuple[int, int, int]) -> tuple[Entry, ...]:
    del stat
    found = _parse(path)
    if found.fault is not None:
        warn_once(f"The tuning file {path} is ignored: {found.fault}.")
    for fault in found.faults:
        warn_once(f"An entry of the tuning file {path} is ignored: {fault}.")
    return tuple(sorted(found.entries, key=lambda entry: entry.key))


def _parse(path: pathlib.Path) -> _Found:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return _Found((), None)
    except (OSError, ValueError, RecursionError) as error:
        return _Found((), f"it cannot be read: {error}")
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        return _Found((), "it is not one of paged's")
    if any(content.get(name) != value for name, value in _FORMAT.items()):
        return _Found((), f"it is of another format than {_FORMAT}")
    entries, faults = [], []
    for values in content["entries"]:
        try:
            entries.append(Entry.from_json(values))
        except ValueError as error:
            faults.append(str(error))
    return _Found(tuple(entries), None, tuple(faults))


def _replace(path: pathlib.Path, entries: list[Entry]) -> None:
    """Write a whole new file, then put it in the place of the old one. The caller holds the lock."""
    new = path.with_name(f"{path.name}.new")
    text = json.dumps({**_FORMAT, "entries": [entry.as_json() for entry in entries]}, indent=1)
    with open(new, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


@functools.lru_cache(maxsize=16)
def _of_process(*where: str | None) -> TuningFile | None:
    """The process's file, cached by the platform and the environment: every call outside of ``jax.jit`` asks for it."""
    del where
    folder = cache_folder()
    return None if folder is None else TuningFile(folder / "paged" / "tuning.json")


def _named(path: "str | os.PathLike[str]") -> TuningFile | None:
    return None if path == OFF else TuningFile(pathlib.Path(path).expanduser())


def cache_folder() -> pathlib.Path | None:
    """The platform's folder for caches of this user; None where there is none."""
    home = pathlib.Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        named, default = os.environ.get("LOCALAPPDATA", ""), home / "AppData" / "Local"
    elif sys.platform == "darwin":
        named, default = "", home / "Library" / "Caches"
    else:
        named, default = os.environ.get("XDG_CACHE_HOME", ""), home / ".cache"
    folder = pathlib.Path(named) if os.path.isabs(named) else default
    return folder if folder.is_absolute() else None
