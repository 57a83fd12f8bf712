"""Invariants of decode: cost follows what is visible, whatever the lengths, the window and the number of slots."""

from collections.abc import Iterator

import numpy as np

import paged

from .inputs import Inputs, decode_inputs, even, layout, spec, uneven
from .measure import Candidate, Row, Setting, compiled, interleaved, progress

UNEVEN = "uneven over even lengths, a visible token"
WINDOW = "window 128 at context 16384 over context 128"
SLOTS = "32 slots, 8 live, over 8 slots"


def run(setting: Setting) -> Iterator[Row]:
    """The ratios, each of two candidates timed in turns."""
    dtypes = ("float32",) if setting.is_quick else ("float32", "bfloat16")
    points = [(dtype, page_size) for dtype in dtypes for page_size in ((16,) if setting.is_quick else (16, 64))]
    for dtype, page_size in progress("invariants", setting, points):
        pages = layout(dtype, page_size)
        for name, (above, below, tokens) in _pairs(pages).items():
            samples = interleaved({"above": above, "below": below}, setting)
            yield Row(
                "invariants",
                f"{dtype}, page {page_size}",
                name,
                setting.cores,
                samples.median("above"),
                samples.ratio("above", "below") * tokens,
                others=samples.others,
            )


def _pairs(pages: paged.PageLayout) -> dict[str, tuple[Candidate, Candidate, float]]:
    """For each invariant what is timed, what it is compared with, and the factor between their visible tokens."""
    lengths = uneven(8, 4096)
    factor = even(8, 4096).sum() / lengths.sum()
    return {
        UNEVEN: (_attend(decode_inputs(pages, lengths)), _attend(decode_inputs(pages, even(8, 4096))), float(factor)),
        WINDOW: (_attend(decode_inputs(pages, even(8, 16384)), 128), _attend(decode_inputs(pages, even(8, 128))), 1.0),
        SLOTS: (_attend(decode_inputs(pages, _eight(), 32)), _attend(decode_inputs(pages, _eight())), 1.0),
    }


def _eight() -> np.ndarray:
    return even(8, 1024)


def _attend(inputs: Inputs, window: int | None = None) -> Candidate:
    attend = paged.lower(spec(window), inputs.pages.layout, target="xla")
    return compiled(attend, inputs.q, inputs.pages, inputs.batch)
