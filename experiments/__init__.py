"""The programs: `python -m experiments.NAME`."""

import sys

# Python's name for a program that it is about to look for: this package is imported before it, and
# before its own imports, which take seconds.
if sys.argv[0] == "-m":
    from spa_jax.runtime import interrupt

    interrupt.install()
