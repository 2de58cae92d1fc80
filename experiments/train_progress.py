"""Stage 3: trains the progress estimator on exploration episodes.

    python -m experiments.train_progress --workdir=W

The trunk is the frozen base policy (W/sft/policy); a head reads its last hidden state at the
last token of every step.  With --lora_rank the trunk gets adapters, which are trained with the
head (in a whole run if --lora_stages names progress).  Reads W/iteration_I/explore of all rounds
up to --iteration; writes W/iteration_I/progress/{heads.safetensors,metrics.jsonl} and adapter/.
"""

import dataclasses

from absl import flags

from experiments import flags as flags_lib
from experiments import stage
from spa_jax.config import ComputeConfig, LoraConfig, RowsConfig
from spa_jax.run import Run
from spa_jax.stage_config import ProgressConfig
from spa_jax.stages import train_progress


def main(run: Run) -> None:
    if flags_lib.given("lora_rank") and not flags_lib.given("lora_stages"):
        method = dataclasses.replace(run.settings.method, lora_stages=("progress",))
        run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, method=method))
    train_progress.run(run, flags.FLAGS.iteration, trunk=flags_lib.stage_policy())


if __name__ == "__main__":
    stage.define_round()
    reads = (ProgressConfig, RowsConfig, LoraConfig, ComputeConfig, "lora_stages")
    stage.run("train_progress", main, reads=reads, stage_policy=True)
