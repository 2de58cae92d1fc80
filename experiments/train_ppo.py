"""Stage 5: one pass of the policy's update over annotated episodes.

    python -m experiments.train_ppo --workdir=W

--objective chooses PPO, an objective without a critic, or SFT on the won episodes (rft).  Reads
W/iteration_I/annotated.jsonl and the policy that played it (W/sft/policy in round 0, the
previous round's W/iteration_{I-1}/ppo/policy after it); writes W/iteration_I/ppo/policy with its
value head if there is one, metrics.jsonl and checkpoints.  Run again, it continues.
"""

from absl import flags

from experiments import flags as flags_lib
from experiments import stage
from spa_jax.config import ComputeConfig, LoraConfig, RowsConfig
from spa_jax.run import Run
from spa_jax.stage_config import PpoConfig
from spa_jax.stages import train_ppo


def main(run: Run) -> None:
    train_ppo.run(run, flags.FLAGS.iteration, policy=flags_lib.stage_policy())


if __name__ == "__main__":
    stage.define_round()
    reads = (PpoConfig, RowsConfig, LoraConfig, ComputeConfig)
    stage.run("train_ppo", main, reads=reads, stage_policy=True)
