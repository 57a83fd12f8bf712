"""The text of a program: the same in every process, and different where another schedule may be faster."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp

import paged
from paged.lower import Program
from paged.lower.schedule.text import program_text
from tests.support import real

ROOT = pathlib.Path(__file__).parent.parent.parent
SPEC = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)


@dataclasses.dataclass(frozen=True)
class Striped(paged.Mask):
    """A mask of a user's own."""

    step: int

    def __call__(self, p, j):
        return (j // self.step) % 2 == 0

    def coverage(self, p0, p1, j0, j1):
        return paged.Coverage(True, False)


class Callable:
    """A callable object."""

    def __call__(self, p, j):
        return j <= p


def far(p, j):
    """A plain function."""
    return p - j > 3


def biased(table, p, j, h):
    """A bias over a table."""
    return table[h] * real(p - j)


def _recursive():
    def mask(p, j):
        return (j <= p) if mask else None

    return mask


def _over(value):
    return lambda p, j: p - j < value


def _of(spec):
    return program_text(Program.from_spec(spec))


def _where(fn):
    return _of(SPEC.replace(mask=paged.Where(fn)))


def _every_program():
    """One program of each kind, made anew."""
    table = jnp.arange(4.0)
    return {
        "plain": _of(SPEC),
        "window": _of(SPEC.replace(window=5)),
        "scores": _of(SPEC.replace(soft_cap=9.0, scores=(paged.ALiBi(),), sinks=True)),
        "own mask": _of(SPEC.replace(mask=Striped(4))),
        "own mask of 8": _of(SPEC.replace(mask=Striped(8) | paged.Window(3))),
        "function": _where(far),
        "lambda": _where(lambda p, j: p - j > 3),
        "other lambda": _where(lambda p, j: p - j > 4),
        "closure": _where(_over(3)),
        "other closure": _where(_over(4)),
        "closure over a function": _where(_over(far)),
        "itself": _where(_recursive()),
        "callable": _where(Callable()),
        "in a set": _where(lambda p, j: (j in {"a", "b", "c"}) | (j <= p)),
        "default": _where(lambda p, j, n=3: p - j < n),
        "bias": _of(SPEC.replace(scores=(paged.Bias(functools.partial(biased, table)),))),
        "wider bias": _of(SPEC.replace(scores=(paged.Bias(functools.partial(biased, jnp.arange(8.0))),))),
    }


def test_each_differs_from_all_others_and_is_one_line():
    texts = _every_program()
    assert len(set(texts.values())) == len(texts)
    assert all("\n" not in text and " at 0x" not in text and len(text) < 600 for text in texts.values())


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"}


def test_a_new_process_says_the_same():
    code = "from tests.tuning.test_text import _every_program as f\nfor text in f().values(): print(text)"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert printed.stdout.splitlines() == list(_every_program().values())


def test_arrays_count_by_shape_so_that_trained_tables_share_a_schedule():
    one, two = (functools.partial(biased, jnp.full(4, value)) for value in (1.0, 2.0))
    assert _of(SPEC.replace(scores=(paged.Bias(one),))) == _of(SPEC.replace(scores=(paged.Bias(two),)))
