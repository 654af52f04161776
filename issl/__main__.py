"""`python -m issl` is `issl`."""

import sys

from issl.cli import main

if __name__ == "__main__":
    sys.exit(main())
