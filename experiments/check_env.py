"""Compares one of our environments with recordings of the original one.

    python -m experiments.check_env --env=webshop --data=DIR --cases=DIR

Prints what agrees and what differs, and ends with 1 if anything falls below its threshold.
"""

import importlib
import sys
from typing import NoReturn

from absl import app, flags

from spa_jax.envs.conformance import Report
from spa_jax.errors import UserError

_ENV = flags.DEFINE_enum("env", None, ["virtualhome", "webshop"], "Which environment.",
                         required=True)  # fmt: skip
_DATA = flags.DEFINE_string("data", None, "The environment's data.", required=True)
_CASES = flags.DEFINE_string("cases", None, "The folder of the case files.", required=True)


def main(argv: list[str]) -> None:
    """Checks, prints and says by its exit code how it went."""
    if len(argv) > 1:
        _refuse(f"unknown argument {argv[1]!r}; flags begin with --")
    # Imported here: each environment has its own optional dependencies.
    module = importlib.import_module(f"spa_jax.envs.{_ENV.value}.conformance")
    try:
        report: Report = module.check(_DATA.value, _CASES.value)
    except UserError as error:
        _refuse(str(error))
    for line in report.lines:
        print(line)
    print(f"RESULT agreement={report.agreement:.6f} ok={int(report.ok)}")
    sys.exit(0 if report.ok else 1)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(f"{error}; --help lists the flags")


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
