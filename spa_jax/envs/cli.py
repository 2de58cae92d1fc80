"""The command line that the generators of games share."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from spa_jax.errors import UserError


def generator(env: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m spa_jax.envs.ENV.generate`, still without flags."""
    return argparse.ArgumentParser(
        prog=f"python -m spa_jax.envs.{env}.generate",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    generate: Callable[[argparse.Namespace], str],
) -> int:
    """Generates, and prints the RESULT line or the user's mistake; returns the exit status.

    Args:
      parser: has a flag --out.
      argv: the arguments; None: the process's own.
      generate: does the work of its flags, and says what it made ("games=3").
    """
    flags = parser.parse_args(argv)
    start = time.monotonic()
    try:
        made = generate(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"RESULT {made} seconds={time.monotonic() - start:.1f} out={flags.out}")
    return 0
