"""Tries every planted bug, and prints which check killed it: ``python -m tests.mutants [--kind masks] [--only j]``."""

import conftest  # noqa: F401  # the settings of all tests, which come before JAX

# isort: split
import argparse
import logging
import sys

from .base import Result, run
from .table import KINDS, MUTANTS


def main() -> int:
    """The exit status: 1 where a mutant survives, or dies by another check than its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Tries the planted bugs.")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only bugs of this kind; may be repeated")
    parser.add_argument("--only", metavar="TEXT", default="", help="only bugs whose name holds this text")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if m.kind in (options.kind or KINDS) and options.only in m.name]
    if not chosen:
        parser.error("no planted bug has such a kind and name")
    logging.getLogger("jax._src.callback").disabled = True  # it tells what a check then raises
    results = []
    for mutant in chosen:
        results.append(run(mutant))
        print(_line(results[-1]), flush=True)
    wrong = [result for result in results if not result.is_right]
    seconds = sum(result.seconds for result in results)
    killed = len(results) - len(wrong)
    print(f"{killed} of {len(results)} planted bugs die by their checks, {seconds:.0f} s of CPU time")
    return 1 if wrong else 0


def _line(result: Result) -> str:
    mutant = result.mutant
    line = f"{mutant.kind:<10} {mutant.name:<56} {result.killed_by:<32} {result.seconds:5.1f} s"
    if result.is_right:
        return line
    wanted = f"{mutant.killed_by!r}" + (f" that says {mutant.sees!r}" if mutant.sees else "")
    return f"{line}\n  WRONG: must be killed by {wanted}; it said: {result.said[:400]}"


if __name__ == "__main__":
    sys.exit(main())
