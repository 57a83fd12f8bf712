"""Ways to plant a bug in a kernel, and to tell how it shows."""

import dataclasses

import jax.numpy as jnp

from paged.lower.tpu import CHIPS
from paged.lower.tpu.references import Copies
from paged.testing import CheckFailure
from tests.support import build, exact_state
from tests.support.mutants import plant_method

from .interpreter import assert_equals_reference, interpreted, params


class Shifted:
    """A reference to integers whose reads are off by a constant."""

    def __init__(self, ref, by):
        self.ref, self.by = ref, by

    @property
    def shape(self):
        """The shape of the reference."""
        return self.ref.shape

    def __getitem__(self, index):
        return self.ref[index] + self.by

    def __setitem__(self, index, value):
        self.ref[index] = value


class Elsewhere:
    """Buffers or semaphores, of which another one is given than was asked for."""

    def __init__(self, ref, place):
        self.ref, self.place = ref, place

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return self.ref.at[self.place(index)]


def nothing(original):
    """A function that does nothing."""
    return lambda *args, **kwargs: None


class _NeverAwaited(Copies):
    def wait(self):
        pass


def never_awaited(original):
    """A method that makes copies, which nobody waits for."""
    return lambda self, *args, **kwargs: _NeverAwaited(original(self, *args, **kwargs).each)


def page_too_few(original):
    """`TileVisits.of` without the last page of every list."""

    def of(cls, *args):
        visited = original(cls, *args)
        count = jnp.maximum(visited.visits.count - 1, 0)
        num_full = jnp.minimum(visited.visits.num_full, count)
        return visited._replace(visits=visited.visits._replace(count=count, num_full=num_full))

    return of


def all_full(original):
    """`TileVisits.of` with no page masked."""

    def of(cls, *args):
        visited = original(cls, *args)
        return visited._replace(visits=visited.visits._replace(num_full=visited.visits.count))

    return of


def none_filled(original):
    """A method of `Stream` that finds no entry of a stage filled."""

    def with_none(self, *args):
        return original(dataclasses.replace(self, filled=Shifted(self.filled, -self.pages_per_block)), *args)

    return with_none


def method(cls, name, mutant):
    """Plants ``mutant(original)`` in place of a method."""
    return lambda patch: plant_method(patch, cls, name, mutant)


def all_of(*plants):
    """Plants several bugs together."""
    return lambda patch: [plant(patch) for plant in plants]


def attend_with(planted, case, schedule, mode):
    """The case's attention on a chip named after the bug, so that no cached trace of another kernel is used."""
    attend = interpreted(case.replace(corner="mixed"), schedule, mode)
    chip = dataclasses.replace(CHIPS["v4"], generation=planted)
    lowerings = tuple(
        dataclasses.replace(low, chip=chip, interpret=params(mode, schedule.cores)) for low in attend.lowerings
    )
    return dataclasses.replace(attend, lowerings=lowerings)


_SEEN = {"no races": "race", "semaphores end at zero": "semaphore"}


def what_is_seen(attend, built):
    """How a bug shows, or None."""
    try:
        assert_equals_reference(attend, built, patience=20.0)
    except CheckFailure as fault:
        return _SEEN.get(fault.check, f"exception: {fault}")
    except AssertionError as error:
        return "nan" if "not finite" in str(error) or "has NaN" in str(error) else "wrong"
    except Exception as error:
        return f"exception: {error}"
    return None


def built_of(suite):
    """The arrays of a suite's cases. Their exact states are computed here, before any bug is planted."""
    builts = {name: build(case) for name, (case, _, _) in suite.items()}
    return {name: (built, exact_state(built))[0] for name, built in builts.items()}


def assert_sound(name, suite, builts):
    """Assert that a case passes without a bug."""
    assert what_is_seen(attend_with("sound", *suite[name]), builts[name]) is None


def assert_killed(bug, suite, builts, planted, monkeypatch):
    """Assert that a bug's case sees it, and in the expected way."""
    plant, name, expected = planted
    plant(monkeypatch)
    assert (what_is_seen(attend_with(bug, *suite[name]), builts[name]) or "nothing").startswith(expected)
