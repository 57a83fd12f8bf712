"""The command line, `python -m paged`: generate from a checkpoint, explain an attention, and tune it."""

import argparse
import sys
from collections.abc import Sequence

from . import explain as _explain
from . import generate as _generate
from . import tune as _tune
from .compiled import keep_compiled as keep_compiled


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    **Arguments:**

    - `arguments`: what stands behind ``python -m paged``; those of this process by default.

    **Returns:** the exit status: 0, or 2 where an argument or a file is wrong, which one sentence on stderr says. 130
    where the user ended it.

    >>> main(["tune", "--list", "--cache", "off"])
    There is no tuning file: tuning is off.
    0
    """
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"python -m paged {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npython -m paged {options.command}: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands.

    >>> parser().parse_args(["generate", "--model", "a.gguf", "--prompt", "Hello"]).max_new_tokens
    128
    """
    whole = argparse.ArgumentParser(prog="python -m paged", description="Attention over a paged KV cache.")
    commands = whole.add_subparsers(dest="command", required=True)
    for room in (_generate, _explain, _tune):
        room.add_parser(commands)
    return whole
