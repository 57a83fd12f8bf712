"""`benchmarks.gpu`: its check knows a right output from a wrong one, and without a GPU it says what to do."""

import dataclasses

import jax
import pytest

import paged
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.exact import TOLERANCE, error_of
from benchmarks.gpu.shapes import Shape

SMALL = Shape("small", 2, 48, rows=3, window=20, q_heads=4, kv_heads=2, head_dim=8)


def test_its_check_knows_a_right_output_from_one_of_another_window():
    q, _, pages = SMALL.arrays()
    out = paged.lower(SMALL.spec, SMALL.layout, "xla")(q, pages, SMALL.batch)
    assert error_of(SMALL, out, q, pages) < TOLERANCE
    assert error_of(dataclasses.replace(SMALL, window=19), out, q, pages) > TOLERANCE


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_without_a_gpu_nothing_is_timed(capsys):
    assert main(["--only", "window"]) == 1
    assert "No GPU is here" in capsys.readouterr().out
