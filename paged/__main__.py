"""`python -m paged`: the command line, whose commands are in `paged/command`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
