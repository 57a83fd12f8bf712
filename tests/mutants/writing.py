"""Planted bugs of the TPU kernels that write new tokens into pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from paged.lower.tpu.write import partial as partial_module
from paged.lower.tpu.write import whole as whole_module
from paged.lower.tpu.write.granules import GRANULE
from paged.lower.tpu.write.partial import Partial
from paged.lower.tpu.write.whole import Whole

from .base import Mutant
from .planting import attribute, method, never_awaited, nothing


def _everything_is_new(original):
    return lambda self, *at: original(_changed(self, begin=lambda i: 0, end=lambda i: GRANULE), *at)


def _one_token_more(original):
    def put(self, *at):
        end = self.scratch.noted.end
        return original(_changed(self, end=lambda i: jnp.minimum(end[i] + 1, GRANULE)), *at)

    return put


def _changed(kernel, **lists):
    class Looked:
        def __init__(self, look):
            self.look = look

        def __getitem__(self, i):
            return self.look(i)

    noted = kernel.scratch.noted._replace(**{name: Looked(look) for name, look in lists.items()})
    return dataclasses.replace(kernel, scratch=kernel.scratch._replace(noted=noted))


def _never_shared(original):
    def note(self):
        count, is_shared = original(self)
        return count, is_shared & False

    return note


def _read_too_early(original):
    def pipeline(first, end, await_sent, **stages):
        original(first, end, await_sent=lambda i: None, **stages)
        jax.lax.fori_loop(first, end, lambda i, _: await_sent(i), None)

    return pipeline


def _next_row(original):
    def note(self, block, i):
        original(self, block, i)
        row, at = self.scratch.noted.row, self._noted(block, i)
        row[at] = jnp.minimum(row[at] + 1, self.new[0].shape[0] - GRANULE)

    return note


def _granule_too_many(original):
    def granules_of(self, seq):
        position, count = original(self, seq)
        return position, count + 1

    return granules_of


_write = functools.partial(Mutant, "write", trial="write", killed_by="writes", in_every_run=False)
WRITE = (
    _write("no wait for blocks", method(Whole, "_reads", never_awaited), in_every_run=True),
    _write("no wait for what blocks write", method(Whole, "_await_writes", nothing)),
    _write("no wait for partial granules", method(Partial, "_reads", never_awaited)),
    _write("no wait for what partial ones write", method(Partial, "_writes", never_awaited)),
    _write("partial granules are not kept", method(Partial, "_put", _everything_is_new)),
    _write("one token more", method(Partial, "_put", _one_token_more)),
    _write("neighbours at once", method(Partial, "_note", _never_shared), trial="write, neighbours"),
    _write("a buffer is read into too early", attribute(partial_module, "pipeline", _read_too_early)),
    dataclasses.replace(
        _write("a buffer of blocks is filled too early", attribute(whole_module, "pipeline", _read_too_early)),
        killed_by="no races",
    ),
    _write("the next row", method(Whole, "_note", _next_row)),
    _write("a granule too many", method(Whole, "_granules_of", _granule_too_many)),
)  # fmt: skip
