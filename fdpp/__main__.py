"""`python -m fdpp`."""

import sys

from fdpp.cli import main

if __name__ == "__main__":
    sys.exit(main())
