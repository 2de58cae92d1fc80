"""Stage 4: gives every step its contribution and its reward.

    python -m experiments.annotate --workdir=W

Reads W/iteration_I/explore/trajectories.jsonl and W/iteration_I/progress; writes
W/iteration_I/annotated.jsonl: the same episodes with contributions, fused rewards
(alpha * c + beta * grounding) and the reference policy's log-probabilities.
"""

import pathlib

from absl import flags

from experiments import flags as flags_lib
from experiments import stage
from spa_jax.config import ComputeConfig, RowsConfig
from spa_jax.run import Run
from spa_jax.stage_config import CreditConfig
from spa_jax.stages import annotate


def main(run: Run) -> None:
    number, data = flags.FLAGS.iteration, flags.FLAGS.data
    annotated = annotate.run(
        run, number, base=flags_lib.stage_policy(), data=pathlib.Path(data) if data else None
    )
    print(f"RESULT annotated={len(annotated)} out={run.round(number).annotated}")


if __name__ == "__main__":
    stage.define_round()
    flags.DEFINE_string("data", "", "Episodes; empty: those of W/iteration_I/explore.")
    reads = (CreditConfig, RowsConfig, ComputeConfig)
    stage.run("annotate", main, reads=reads, stage_policy=True)
