"""Stage 1: clones a base agent from demonstrations.

    python -m experiments.sft --workdir=W --policy=models/smollm2-135m-instruct

Reads W/demos/{train,valid}/trajectories.jsonl; writes W/sft/policy (a Hugging Face folder: the
last weights, with --sft_ema their average, with --sft_patience those of the best held-out loss),
metrics.jsonl and checkpoints.  Run again, it continues.
"""

from experiments import stage
from spa_jax.config import ChatConfig, ComputeConfig, LoraConfig, RowsConfig
from spa_jax.stage_config import SftConfig
from spa_jax.stages import sft

if __name__ == "__main__":
    reads = (SftConfig, RowsConfig, LoraConfig, ChatConfig, ComputeConfig)
    stage.run("sft", sft.run, reads=reads)
