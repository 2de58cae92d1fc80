"""Writes the report of a run: one self-contained HTML page.

    python -m experiments.report --workdir=W [--out=FILE]

It shows whatever stages have run so far: the table of evaluations, learning
curves, how well the progress estimator judges unseen games, and transcripts
with each step's contribution beside its text.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from spa_jax.errors import UserError
from spa_jax.report.page import write_report

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the run", required=True)
_OUT = flags.DEFINE_string("out", None, "the page to write; WORKDIR/report.html if not given")


def main(argv: Sequence[str]) -> None:
    """Writes the page and prints where it is."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; the flags are --workdir and --out")
    out = Path(_OUT.value or Path(_WORKDIR.value) / "report.html")
    try:
        write_report(Path(_WORKDIR.value), out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"RESULT report={out}")


if __name__ == "__main__":
    app.run(main)
