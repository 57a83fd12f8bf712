"""The child process: one section in one setting, its rows as JSON lines on standard output."""

import dataclasses
import json
import sys

import jax

from . import decode, gradient, invariants, prefill, write
from .measure import Setting

_SECTIONS = {
    "decode": decode.run,
    "invariants": invariants.run,
    "prefill": prefill.run,
    "gradient": gradient.run,
    "write": write.run,
}


def main(section: str, cores: str, speed: str) -> None:
    """Run it. The parent has set the affinity and the flags, which must be in place before JAX starts its threads."""
    jax.config.update("jax_platforms", "cpu")
    for row in _SECTIONS[section](Setting(cores, speed == "quick")):
        print(json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
