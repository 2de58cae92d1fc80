"""Stage 2: plays episodes of a split and records each of them exactly once.

    python -m experiments.explore --workdir=W --policy=W/sft/policy --alfworld_data=DIR
    python -m experiments.explore --workdir=W --policy=expert --out=W/demos/train ...

Appends to OUT/trajectories.jsonl as episodes end (OUT is W/iteration_I/explore by default).
Killed and run again, it plays what is missing.  Of several processes each plays its own tasks, in
its own environments, and appends to OUT/trajectories.process_I.jsonl; in the end all are in one.
"""

import pathlib
import time

from absl import flags

from experiments import flags as flags_lib
from experiments import stage
from spa_jax.config import ChatConfig, ComputeConfig, EnvConfig, SamplingConfig
from spa_jax.run import Run
from spa_jax.stage_config import ExploreConfig
from spa_jax.stages import explore


def main(run: Run) -> None:
    started = time.time()
    played = explore.run(
        run,
        flags.FLAGS.iteration,
        policy=flags_lib.stage_policy(),
        out=pathlib.Path(flags.FLAGS.out) if flags.FLAGS.out else None,
    )
    summary = played.summary()
    print(
        f"RESULT success={summary.success_rate:.4f} grounding={summary.grounding:.4f} "
        f"episodes={summary.games} failed={summary.env_errors} left_out={summary.left_out} "
        f"seconds={time.time() - started:.1f}"
    )


if __name__ == "__main__":
    stage.define_round()
    flags.DEFINE_string("out", "", "Folder to write; empty: W/iteration_I/explore.")
    reads = (EnvConfig, SamplingConfig, ExploreConfig, ChatConfig, ComputeConfig)
    stage.run("explore", main, reads=reads, stage_policy=True)
