"""Training tokens a second of one SFT update: 4 demonstrations in rows of 1,024 tokens."""

from experiments.bench import floor, updates
from spa_jax import batching
from spa_jax.training import partition, sft_update

_BATCH = 4


def run() -> None:
    """Prints the figures and a last RESULT line."""
    config, params, name = floor.model()
    rows, optimizer = updates.ROWS, updates.adamw()
    trainer = partition.make(rows, sft_update.make_loss(config), optimizer)
    packed = batching.pack(updates.episodes(_BATCH, config.vocab_size), **rows.packing)
    seconds = updates.time_update(
        trainer,
        optimizer,
        {"policy": params},
        lambda: [
            sft_update.SftBatch(batch)
            for batch in batching.microbatches(packed, rows.rows_per_device, trainer.devices)
        ],
        {"tokens": float(packed.token_mask.sum())},
    )
    updates.show_result(updates.report(config, params, name, packed, seconds))
