"""`python -m fgattn_jax` is the command line `fgattn`."""

import sys

from fgattn_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
