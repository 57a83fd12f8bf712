"""How a bug is put into the library, and taken out again so that no cached trace keeps it."""

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from paged.lower.tpu.references import Copies

Plant = Callable[[pytest.MonkeyPatch], Any]


@contextlib.contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """The library with a bug. Nothing that was traced or cached before is used with it, nor what it left afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        forget()
        try:
            plant(patch)
            yield
        finally:
            patch.undo()
            forget()


def forget() -> None:
    """Drop every trace and compiled program, and every cached result of a function of the library."""
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] == "paged":
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def method(owner: type | str, name: str, mutant: Callable[[Any], Any]) -> Plant:
    """Puts ``mutant(original)`` in place of a method, class method or property of this very class.

    A class is given by its place, such as ``"spec.masks.Window"``, where a name of it is gone with the next change.
    """
    cls = _find(owner) if isinstance(owner, str) else owner
    _require(name in cls.__dict__, f"{cls.__qualname__}.{name}")
    raw = cls.__dict__[name]

    def plant(patch: pytest.MonkeyPatch) -> None:
        if isinstance(raw, classmethod):
            patch.setattr(cls, name, classmethod(mutant(raw.__func__)))
        elif isinstance(raw, property):
            patch.setattr(cls, name, property(mutant(raw.fget)))
        else:
            patch.setattr(cls, name, mutant(raw))

    return plant


def attribute(owner: Any, name: str, mutant: Callable[[Any], Any]) -> Plant:
    """Puts ``mutant(original)`` in place of a name of a module, there alone."""
    _require(hasattr(owner, name), f"{getattr(owner, '__name__', owner)}.{name}")
    return lambda patch: patch.setattr(owner, name, mutant(getattr(owner, name)))


def function(place: str, mutant: Callable[[Any], Any]) -> Plant:
    """Puts ``mutant(original)`` in place of a function, such as ``"spec.state.merge"``, wherever it was imported."""
    original, name = _find(place), place.rpartition(".")[2]

    def plant(patch: pytest.MonkeyPatch) -> None:
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] == "paged" and vars(module).get(name) is original:
                patch.setattr(module, name, mutant(original))

    return plant


def _find(place: str) -> Any:
    module, _, name = place.rpartition(".")
    found = getattr(importlib.import_module(f"paged.{module}"), name, None)
    _require(found is not None, f"paged.{place}")
    return found


def _require(is_there: bool, place: str) -> None:
    if not is_there:
        raise AttributeError(f"{place} is gone: give the mutants that are planted there a new place.")


def all_of(*plants: Plant) -> Plant:
    """Plants several bugs together."""
    return lambda patch: [plant(patch) for plant in plants]


class Shifted:
    """A reference to integers whose reads are off by a constant."""

    def __init__(self, ref: Any, by: int):
        self.ref, self.by = ref, by

    @property
    def shape(self) -> Any:
        """The shape of the reference."""
        return self.ref.shape

    def __getitem__(self, index: Any) -> Any:
        return self.ref[index] + self.by

    def __setitem__(self, index: Any, value: Any) -> None:
        self.ref[index] = value


class Instead:
    """A kernel's work with some of its parts replaced."""

    def __init__(self, work: Any, **parts: Any):
        self.work, self.parts = work, parts

    def __getattr__(self, name: str) -> Any:
        return self.parts[name] if name in self.parts else getattr(self.work, name)


class Elsewhere:
    """Buffers or semaphores, of which another one is given than was asked for."""

    def __init__(self, ref: Any, place: Callable[[Any], Any]):
        self.ref, self.place = ref, place

    @property
    def at(self) -> "Elsewhere":
        """The references themselves."""
        return self

    def __getitem__(self, index: Any) -> Any:
        return self.ref.at[self.place(index)]


def nothing(original: Any) -> Any:
    """A function that does nothing."""
    return lambda *args, **kwargs: None


class _NeverAwaited(Copies):
    def wait(self) -> None:
        pass


def never_awaited(original: Any) -> Any:
    """A method that makes copies, which nobody waits for."""
    return lambda self, *args, **kwargs: _NeverAwaited(original(self, *args, **kwargs).each)


def page_too_few(original: Any) -> Any:
    """`TileVisits.of` without the last page of every list."""

    def of(cls, *args):
        visited = original(cls, *args)
        count = jnp.maximum(visited.visits.count - 1, 0)
        num_full = jnp.minimum(visited.visits.num_full, count)
        return visited._replace(visits=visited.visits._replace(count=count, num_full=num_full))

    return of


def all_full(original: Any) -> Any:
    """`TileVisits.of` with no page masked."""

    def of(cls, *args):
        visited = original(cls, *args)
        return visited._replace(visits=visited.visits._replace(num_full=visited.visits.count))

    return of


def none_filled(original: Any) -> Any:
    """A method of `Stream` that finds no entry of a stage filled."""

    def with_none(self, *args):
        return original(dataclasses.replace(self, filled=Shifted(self.filled, -self.pages_per_block)), *args)

    return with_none
