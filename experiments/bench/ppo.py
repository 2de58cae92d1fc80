"""Training tokens a second of one PPO update with values: 16 episodes in rows of 1,024 tokens."""

import jax
import numpy as np

from experiments.bench import floor, updates
from spa_jax.config import PpoConfig
from spa_jax.models import heads
from spa_jax.training import partition, ppo_data, ppo_update

_BATCH = 16


def run() -> None:
    """Prints the figures and a last RESULT line."""
    config, params, name = floor.model()
    optimizer, ppo = updates.adamw(), PpoConfig()
    trainer = partition.Pmap(ppo_update.make_loss(config, ppo, 1.0), optimizer)
    hidden = np.zeros((1, config.hidden_size), np.float32)
    value = jax.jit(heads.ValueHead().init)(jax.random.key(0), hidden)["params"]
    played = updates.episodes(_BATCH, config.vocab_size)
    steps = len(played[0].steps)
    noise = np.random.default_rng(0).normal(size=(4, _BATCH, steps)).astype(np.float32)
    mask = np.ones((_BATCH, steps), np.float32)
    table = ppo_data.Table(noise[0], noise[1], noise[2], noise[3], mask, mask)
    made = ppo_data.make_update(
        played, table, np.arange(_BATCH), updates.ROWS, ppo, trainer.devices
    )
    seconds = updates.time_update(
        trainer, optimizer, {"policy": params, "value": value}, lambda: made.batches, made.counts
    )
    updates.report(config, params, name, made.packed, seconds)
