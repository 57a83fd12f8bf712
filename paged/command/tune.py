"""`python -m paged tune`: tune an attention, and show or clear what tuning has stored."""

import argparse
import functools
from typing import Any

from paged.lower import TARGETS, Shape, Timing, Tuned, TuningFile, lower, synthetic, tune

from .attention import add_attention, layout_of, q_dtype_of, spec_of
from .progress import Bar

_EXAMPLE = """\
example:
  python -m paged tune --q-heads 32 --kv-heads 8 --head-dim 128 --page-size 16 --slots 8 --context 4096

This makes random arrays of that shape, times the schedules worth trying in turns, and stores the fastest. From then on
`paged.lower` uses it, in every process that does not set PAGED_TUNING to "off" or to another file. One run serves one
class of shapes: each number rounded up to a power of two. Exit status 2: this attention cannot be tuned.
"""


def add_parser(commands: Any) -> None:
    """Add the command ``tune``."""
    tuning = commands.add_parser(
        "tune",
        help="time the schedules of an attention on this device, and store the fastest",
        description="Time the schedules of an attention on this device, and store the fastest.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tuning.set_defaults(run=run)
    add_attention(tuning.add_argument_group("the attention"))
    _add_batch(tuning.add_argument_group("the batch"))
    timing = tuning.add_argument_group("timing")
    timing.add_argument("--target", default="auto", choices=TARGETS, help='default: "auto"')
    timing.add_argument("--seconds", type=float, default=10.0, help="time to spend, without compiling (default: 10)")
    timing.add_argument("--again", action="store_true", help="time it even if the tuning file has an entry for it")
    stored = tuning.add_argument_group("the tuning file")
    stored.add_argument(
        "--cache", metavar="PATH", help='the tuning file, or "off" (default: PAGED_TUNING, or your cache folder)'
    )
    stored.add_argument("--list", action="store_true", help="show the entries of the file, and do nothing else")
    stored.add_argument("--clear", action="store_true", help="delete the file, and do nothing else")


def run(options: argparse.Namespace) -> int:
    """Tune, list or clear. Returns the exit status."""
    file = TuningFile.at(options.cache)
    if options.list or options.clear:
        return _show_or_clear(file, options.clear)
    print(_tune(options, file))
    return 0


def _add_batch(group: Any) -> None:
    number = functools.partial(group.add_argument, type=int, metavar="N")
    number("--slots", default=8, help="sequences (default: 8)")
    number("--context", default=4096, help="tokens per sequence (default: 4096)")
    number("--max-context", default=0, help="tokens that a block table has room for (default: the context)")
    number(
        "--query-rows",
        default=1,
        help="query rows per sequence: 1 to decode, more for a chunk of a prompt (default: 1)",
    )
    group.add_argument(
        "--mixed", action="store_true", help="only the first sequence has --query-rows, the others decode"
    )


def _show_or_clear(file: TuningFile | None, is_clearing: bool) -> int:
    if file is None:
        print("There is no tuning file: tuning is off.")
    elif is_clearing:
        print(f"{file.path}: {file.clear()} entries deleted")
    else:
        entries = file.entries()
        print(f"{file.path}: {len(entries)} entries")
        for entry in entries:
            key = entry.key
            print(f"\n{entry} at {entry.ratio:.2f} of the heuristic's time, {1e3 * entry.seconds:.3g} ms")
            print(f"  on {key.device} with paged {key.paged} and jax {key.jax}, among {key.lowerings}")
            print(f"  {key.program}\n  {key.layout}\n  {key.shape}")
    return 0


def _tune(options: argparse.Namespace, file: TuningFile | None) -> str:
    shape = Shape(
        slots=options.slots,
        context=options.context,
        query_rows=options.query_rows,
        max_context=options.max_context,
        is_mixed=options.mixed,
    )
    spec, layout = spec_of(options), layout_of(options)
    attend, arrays = lower(spec, layout, options.target), synthetic(spec, layout, shape, q_dtype_of(options))
    with Bar() as bar:
        tuned = tune(
            attend,
            *arrays,
            file="off" if file is None else file,
            again=options.again,
            timing=Timing(seconds=options.seconds),
            progress=bar.show,
        )
    return f"{tuned}\n{_where_stored(tuned, file)}"


def _where_stored(tuned: Tuned, file: TuningFile | None) -> str:
    if tuned.stored is None:
        return "not stored: tuning is off" if file is None else "not stored"
    return f"stored in {tuned.stored}" if tuned.trials else f"found in {tuned.stored}; --again times it anew"
