"""`python -m qwenvl_jax.cli` is `qwenvl`."""

import sys

from qwenvl_jax.cli import main

sys.exit(main())
