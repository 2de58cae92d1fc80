"""Training tokens a second of one PPO update with values: 16 episodes in rows of 1,024 tokens."""

import jax
import numpy as np

from experiments import train_ppo
from experiments.bench import floor, updates
from spa_jax.config import PpoConfig
from spa_jax.models import heads
from spa_jax.training import partition, ppo_update

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
    table = train_ppo.StepTable(noise[0], noise[1], noise[2], noise[3], mask)
    chosen = np.arange(_BATCH)
    packed, batches, counts = train_ppo.make_batches(
        played, table, chosen, updates.ROWS, trainer.devices
    )
    seconds = updates.time_update(
        trainer, optimizer, {"policy": params, "value": value}, lambda: batches, counts
    )
    updates.report(config, params, name, packed, seconds)
