"""``python -m gatdist``."""

import sys

from gatdist.cli import main

if __name__ == "__main__":
    sys.exit(main())
