"""Writes the report of a run: one self-contained HTML page.

    python -m experiments.report --workdir=W [--out=FILE]

It shows whatever stages have run so far: the table of evaluations, learning
curves, how well the progress estimator judges unseen games, and transcripts
with each step's contribution beside its text.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import flags as flags_lib
from spa_jax.report.page import write_report


def main(argv: Sequence[str]) -> None:
    """Writes the page and prints where it is."""
    del argv
    run = flags_lib.from_flags()
    out = Path(_OUT.value) if _OUT.value else run.report
    write_report(run.workdir, out)
    print(f"RESULT report={out}")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", "", "The page to write; empty: WORKDIR/report.html.")
    flags_lib.run_program(main, stage=False)
