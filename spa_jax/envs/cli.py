"""The command line that the generators of games share."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from spa_jax.errors import UserError
from spa_jax.runtime import children, interrupt


def generator(env: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m spa_jax.envs.ENV.generate`, still without flags."""
    parser = argparse.ArgumentParser(
        prog=f"python -m spa_jax.envs.{env}.generate",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(children.FLAG, action="store_true", help="end when standard input closes")
    return parser


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    generate: Callable[[argparse.Namespace], str],
) -> int:
    """Generates, and prints the RESULT line, the user's mistake or Ctrl-C; returns the exit status.

    Args:
      parser: has a flag --out.
      argv: the arguments; None: the process's own.
      generate: does the work of its flags, and says what it made ("games=3").
    """
    flags = parser.parse_args(argv)
    if flags.exit_with_parent:
        children.at_end_of_parent(children.end_session)
    start = time.monotonic()
    try:
        made = generate(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupt.say(interrupt.STOPPED)
        return interrupt.EXIT_CODE
    print(f"RESULT {made} seconds={time.monotonic() - start:.1f} out={flags.out}")
    return 0
