"""The tour: every stage of the method in a minute and a half, on a guessing game.

    python -m experiments.tour --flagfile=experiments/presets/tour.flags

A policy of two small layers is made on the spot: its tokenizer learns from the expert's episodes,
its weights are random.  The rest is what run_spa does, with every stage and every file.
"""

import time

from experiments import stage
from spa_jax import lab, method
from spa_jax.run import Run
from spa_jax.settings import sections
from spa_jax.stage_config import Settings
from spa_jax.stages import demonstrate, prepare

_POLICY = lab.LabConfig(layers=2, width=64, heads=2, feed_forward=192, vocabulary=320)


def main(run: Run) -> None:
    started = time.time()
    run = prepare.run(run)
    demonstrate.run(run)
    lab.write_start(run, _POLICY)
    done = method.run(run)
    print(f"\nHeld-out games of {done.base.games}, before and after\n")
    print(done.table())
    print(f"\nOpen {run.report}: curves, and episodes with each step's credit beside it.\n")
    print(done.line(time.time() - started))


if __name__ == "__main__":
    reads: list[type | str] = [type(part) for _, part in sections(Settings())]
    stage.run("tour", main, reads=reads)
