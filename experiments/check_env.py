"""Compares one of our environments with recordings of the original one.

    python -m experiments.check_env --env=webshop --data=DIR --cases=DIR

Prints what agrees and what differs, and ends with 1 if anything falls below its threshold.
"""

import importlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax.envs.conformance import Report

_ENV = flags.DEFINE_enum(
    "env", None, ["virtualhome", "webshop"], "Which environment.", required=True
)
_DATA = flags.DEFINE_string("data", None, "The environment's data.", required=True)
_CASES = flags.DEFINE_string("cases", None, "The folder of the case files.", required=True)


def main(argv: Sequence[str]) -> None:
    """Checks, prints and says by its exit code how it went."""
    del argv
    # Imported here: each environment has its own optional dependencies.
    module = importlib.import_module(f"spa_jax.envs.{_ENV.value}.conformance")
    report: Report = module.check(_DATA.value, _CASES.value)
    for line in report.lines:
        print(line)
    print(f"RESULT agreement={report.agreement:.6f} ok={int(report.ok)}")
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    flags_lib.run(main)
