"""`TuningFile`: tuned schedules on disk, in one JSON file, which processes may read and write at the same time."""

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
# What of the environment, beside that, says where the process's file is.
_FOLDERS, _FOLDERS_OF_WINDOWS = ("HOME", "XDG_CACHE_HOME"), ("USERPROFILE", "LOCALAPPDATA")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tuned schedule, as JSON, what it is for, its seconds, and their ratio to the heuristic's."""

    key: Key
    schedule: str
    seconds: float
    ratio: float

    def parsed(self) -> Schedule:
        """The schedule. Raises ``ValueError`` or ``TypeError`` for what is none."""
        return Schedule.from_json(self.schedule)

    def __str__(self) -> str:
        try:
            return str(self.parsed())
        except (ValueError, TypeError) as error:
            return f"no schedule: {error}"

    def as_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {**dataclasses.asdict(self), "schedule": json.loads(self.schedule)}

    @classmethod
    def from_json(cls, values: Any) -> "Entry":
        """From what the file has. Raises ``ValueError`` that says what is wrong."""
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
    """Tuned schedules at ``path``. What cannot be read of it is passed over with a `TuningWarning`; see `tune`."""

    path: pathlib.Path

    @classmethod
    def at(cls, path: "str | os.PathLike[str] | TuningFile | None" = None) -> "TuningFile | None":
        """The file at a path; for None what the environment variable ``PAGED_TUNING`` names, and where it is not set,
        ``paged/tuning.json`` in the platform's cache folder. None for ``"off"``, and where there is no such folder."""
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
        """What the file holds, sorted; read again only when it has changed."""
        stamp = self.stamp()
        return () if stamp is None else _entries(self.path, stamp)

    def stamp(self) -> tuple[int, int, int] | None:
        """A value that changes when the file does; None while there is none that can be read."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            warn_once(f"The tuning file {self.path} is passed over: {error}.")
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def store(self, entries: Iterable[Entry]) -> None:
        """Put entries in, in place of those with the same keys; all that other processes put in stays. A reader sees
        the file as it was or as it will be. Raises ``OSError`` where it cannot be written."""
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
        """Delete it, and say how many entries it had."""
        count = len(self.entries())
        if self.path.parent.is_dir():
            with locked(self.path.with_name(f"{self.path.name}.lock")):
                self.path.unlink(missing_ok=True)
        return count


class _Found(NamedTuple):
    """What a file holds, what is wrong with the whole of it, and with some entries."""

    entries: tuple[Entry, ...]
    fault: str | None
    faults: tuple[str, ...] = ()


@functools.lru_cache(maxsize=64)
def _entries(path: pathlib.Path, stat: tuple[int, int, int]) -> tuple[Entry, ...]:
    del stat
    found = _parse(path)
    if found.fault is not None:
        warn_once(f"The tuning file {path} is passed over: {found.fault}.")
    for fault in found.faults:
        warn_once(f"An entry of the tuning file {path} is passed over: {fault}.")
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
    """Write all of a new file, and only then put it in the place of the old. Whoever calls holds the lock."""
    new = path.with_name(f"{path.name}.new")
    text = json.dumps({**_FORMAT, "entries": [entry.as_json() for entry in entries]}, indent=1)
    with open(new, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


@functools.lru_cache(maxsize=16)
def _of_process(*where: str | None) -> TuningFile | None:
    """Remembered for what the platform and the environment say: calls outside of ``jax.jit`` ask every time."""
    del where
    folder = _cache_folder()
    return None if folder is None else TuningFile(folder / "paged" / "tuning.json")


def _named(path: "str | os.PathLike[str]") -> TuningFile | None:
    return None if path == OFF else TuningFile(pathlib.Path(path).expanduser())


def _cache_folder() -> pathlib.Path | None:
    """Where programs of this platform keep what they can compute again."""
    home = pathlib.Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        named, default = os.environ.get("LOCALAPPDATA", ""), home / "AppData" / "Local"
    elif sys.platform == "darwin":
        named, default = "", home / "Library" / "Caches"
    else:
        named, default = os.environ.get("XDG_CACHE_HOME", ""), home / ".cache"
    folder = pathlib.Path(named) if os.path.isabs(named) else default
    return folder if folder.is_absolute() else None
