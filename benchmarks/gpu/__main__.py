"""Checks and times paged attention on a GPU: ``python -m benchmarks.gpu``; ``--dry-run`` compiles it without one."""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

import paged

from .exact import TOLERANCE, error_of
from .peers import PEERS, copy_of
from .shapes import SHAPES, Shape

TARGETS = ("xla", "gpu")
NO_GPU = (
    "No GPU is here, so nothing can be timed. `python -m benchmarks.gpu --dry-run` compiles every call for one, with "
    'the extra "gpu-compile".'
)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print; the exit status is 1 where a number was wrong or nothing could run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="compile every call for --chip; no GPU is needed")
    parser.add_argument("--chip", default="h200", help="what --dry-run compiles for: a100, h100, h200 or b200")
    parser.add_argument("--only", help="only shapes whose name has this in it")
    parser.add_argument("--json", type=pathlib.Path, help="write every row here")
    options = parser.parse_args(arguments)
    shapes = [shape for shape in SHAPES if options.only is None or options.only in shape.name]
    if not options.dry_run and jax.default_backend() != "gpu":
        print(NO_GPU)
        return 1
    run = (lambda shape: _compiled(shape, options.chip)) if options.dry_run else _timed
    rows = []
    for shape in shapes:
        for row in run(shape):
            rows.append({"shape": shape.name, **row})
            print(json.dumps(rows[-1]), flush=True)
    chip = options.chip if options.dry_run else jax.devices()[0].device_kind
    label = "compiled" if options.dry_run else "measured"
    if options.json:
        told = {"label": label, "chip": chip, "jax": jax.__version__, "rows": rows}
        options.json.write_text(json.dumps(told, indent=1))
    return int(any(row.get("is_wrong", False) for row in rows) or not rows)


def _attentions(shape: Shape) -> Iterator[tuple[str, paged.Attend | None, str]]:
    """Each target with its attention, or with the reason why it refuses."""
    q, _, pages = shape.abstract()
    for target in TARGETS:
        try:
            attend = paged.lower(shape.spec, shape.layout, target)
            attend.choice(paged.lower.Call.of(q, pages, shape.batch))
        except ValueError as refusal:
            yield target, None, str(refusal)
        else:
            yield target, attend, ""


def _compiled(shape: Shape, chip: str) -> Iterator[dict[str, Any]]:
    """Each target's call, compiled for a chip. The chip need not be here."""
    q, kv, pages = shape.abstract()
    for target, attend, reason in _attentions(shape):
        if attend is None:
            yield {"name": target, "refused": reason}
            continue
        made = paged.compile_for(attend, chip, q, pages, shape.batch, new=(kv, kv) if shape.writes else None)
        program: Any = made.gpu
        yield {
            "name": target,
            "schedule": str(made.schedule),
            "launches": program.launches,
            "launches_in_loops": program.launches_in_loops,
            "host_steered": program.host_steered,
            "temporary_mib": round(made.temporary_bytes / 2**20, 2),
            "spilled_bytes": sum(kernel.spilled_bytes for kernel in program.kernels),
            "most_registers": max((kernel.registers for kernel in program.kernels), default=0),
        }


def _timed(shape: Shape) -> Iterator[dict[str, Any]]:
    """Seconds of a copy, of each target's call after its numbers were checked, and of the peers."""
    size = shape.bytes_visible
    yield {"name": "copy of the same bytes", **_rate(_seconds(copy_of(size)), size)}
    for target, attend, reason in _attentions(shape):
        yield {"name": target, "refused": reason} if attend is None else {"name": target, **_of(shape, attend, size)}
    for name, peer in PEERS.items():
        try:
            call = peer(shape)
            call()
        except Exception as error:  # a peer's own; told, and no reason to stop
            yield {"name": name, "refused": f"{type(error).__name__}: {error}"[:300]}
        else:
            yield {"name": name, **_rate(_seconds(call), size)}


def _of(shape: Shape, attend: paged.Attend, size: int) -> dict[str, Any]:
    q, kv, pages = shape.arrays()
    batch = jax.device_put(shape.batch)
    if not shape.writes:
        run = jax.jit(attend.__call__)
        error = error_of(shape, run(q, pages, batch), q, pages)
        told = _rate(_seconds(lambda: run(q, pages, batch)), size)
    else:
        update, held = jax.jit(attend.update, donate_argnums=3), [pages]

        def step() -> Any:
            out, held[0] = update(q, kv, kv, held[0], batch)
            return out

        out = step()
        error = error_of(shape, out, q, held[0])
        told = _rate(_seconds(step), size)
    call = paged.lower.Call.of(q, pages, shape.batch)
    return {"schedule": str(attend.choice(call).schedule), "error": error, "is_wrong": not error <= TOLERANCE, **told}


def _rate(seconds: float, size: int) -> dict[str, float]:
    return {"microseconds": round(1e6 * seconds, 1), "gb_per_second": round(size / seconds / 1e9, 1)}


def _seconds(call: Callable[[], Any], repeats: int = 7, aim: float = 0.2) -> float:
    """The median time of one call: calls follow one another without a wait, ``aim`` seconds of them per repeat."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(3, min(1000, round(aim / max(1e-6, time.perf_counter() - start))))

    def once() -> float:
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        jax.block_until_ready(call())
        return (time.perf_counter() - start) / calls

    return statistics.median(once() for _ in range(repeats))


if __name__ == "__main__":
    sys.exit(main())
