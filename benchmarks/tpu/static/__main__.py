"""The command for one kernel: `python -m benchmarks.tpu.static module:builder --generation v6e --run`."""

import argparse
import dataclasses
import json
import pathlib
import sys

from .chips import CHIPS
from .estimate import estimate_run
from .report import Report, model
from .text import described
from .transfers import TransferModel


def main() -> int:
    """Parse, model, print. The status is 1 where the call doesn't compile."""
    options = _parser().parse_args()
    if (options.tokens is None) != (options.bytes_per_token is None) or (options.tokens and not options.run):
        raise SystemExit("cycles per token take all of --run, --tokens and --bytes-per-token.")
    report = model(
        options.target,
        options.generation,
        options.kwargs,
        is_run=options.run,
        only=options.kernel,
        transfers=options.transfers,
        simulate=options.simulate,
        flags=options.flags,
        keep=options.keep,
    )
    print(described(report))
    if options.tokens:
        _print_estimates(report, options.tokens, options.bytes_per_token)
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(report), indent=1))
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.tpu.static", description=__doc__)
    made.add_argument("target", help="file.py:builder or module:builder; builder(**kwargs) returns (function, args)")
    made.add_argument("--generation", choices=list(CHIPS), default="v6e", help="default v6e")
    made.add_argument("--kwargs", type=json.loads, default={}, help="the builder's arguments, as JSON")
    made.add_argument("--run", action="store_true", help="run the kernels' scalar programs")
    made.add_argument("--kernel", default="", help="run only kernels whose name contains this pattern")
    made.add_argument("--tokens", type=int, help="KV tokens that the call reads, for cycles per token")
    made.add_argument("--bytes-per-token", type=float, help="of keys and values, all heads")
    made.add_argument("--transfers", type=_transfer_model, help="BYTES_PER_CYCLE,LATENCY,OVERHEAD (default: libtpu's)")
    made.add_argument("--simulate", action="store_true", help="also libtpu's own estimate; it crashes on some kernels")
    made.add_argument("--flags", default="", help="more of libtpu's flags")
    made.add_argument("--json", type=pathlib.Path, help="write the report here")
    made.add_argument("--keep", type=pathlib.Path, help="keep the dumps in this folder, which is emptied first")
    return made


def _transfer_model(text: str) -> TransferModel:
    return TransferModel(*map(float, text.split(",")))


def _print_estimates(report: Report, tokens: int, bytes_per_token: float) -> None:
    for kernel in report.kernels:
        if kernel.runs:
            made = estimate_run(kernel, report.generation, tokens=tokens, bytes_per_token=bytes_per_token)
            print(
                f"{kernel.name}, cycles per KV token: compute {made.compute_cycles:.2f}, HBM {made.hbm_cycles:.2f}"
                f" (ratio {made.ratio:.2f}), modelled {made.model_cycles:.2f}"
            )


if __name__ == "__main__":
    sys.exit(main())
