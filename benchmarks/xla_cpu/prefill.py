"""Prefill: a chunk of one sequence, as a share of the speed of a large float32 matrix product."""

from collections.abc import Iterator

import paged

from . import peers
from .inputs import HEAD_DIM, Q_HEADS, layout, prefill_inputs, spec
from .measure import Row, Setting, compiled, interleaved, matmul, progress

_LENGTH = 4096


def run(setting: Setting) -> Iterator[Row]:
    """Chunks that end at 4096 tokens; only visible pairs count as work, ``4 * head_dim`` operations a query head."""
    chunks = (512,) if setting.is_quick else (512, 2048)
    cases = [(dtype, chunk) for dtype in ("float32", "bfloat16") for chunk in chunks]
    for dtype, chunk in progress("prefill", setting, cases):
        inputs = prefill_inputs(layout(dtype, 16), _LENGTH, chunk)
        attend = paged.lower(spec(), inputs.pages.layout, target="xla")
        square, operations_of_square = matmul(2048)
        candidates = {"MATMUL": square, "paged": compiled(attend, inputs.q, inputs.pages, inputs.batch)}
        absent = {}
        if not setting.is_quick:
            others, absent = peers.accept(peers.prefill(inputs, chunk), candidates["paged"].call())
            candidates |= others
        samples = interleaved(candidates, setting)
        operations = 4.0 * HEAD_DIM * Q_HEADS * _visible_pairs(_LENGTH, chunk)
        label = f"{dtype}, chunk {chunk} ending at {_LENGTH}"
        for name, candidate in candidates.items():
            factor = 1.0 if name == "MATMUL" else operations / operations_of_square
            yield Row(
                "prefill",
                label,
                name,
                setting.cores,
                samples.median(name),
                samples.ratio("MATMUL", name) * factor,
                candidate.temporaries,
                candidate.compile_seconds,
                samples.others,
            )
        for name, reason in absent.items():
            yield Row("prefill", label, name, setting.cores, note=reason)


def _visible_pairs(length: int, chunk: int) -> int:
    return sum(range(length - chunk + 1, length + 1))
