"""`python -m paged`: the command line, whose commands are in `paged/command`."""

import sys

from .command import keep_compiled, main

if __name__ == "__main__":
    keep_compiled()
    sys.exit(main())
