"""Which data an update sees, and at which learning rate: pure functions of its number.

Nothing is carried from update to update, so a resume needs the number alone.
"""

import numpy as np
import optax


def warmup_cosine(peak: float, updates: int, warmup_share: float) -> optax.Schedule:
    """Linear warm-up over a share of the updates, then a cosine to zero."""
    warmup = max(1, round(warmup_share * updates))
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup, peak_value=peak, warmup_steps=warmup, decay_steps=updates + 1
    )


def batch_of(update: int, count: int, batch_size: int, seed: int) -> np.ndarray:
    """The indices of an update's examples: every epoch is a permutation of its own.

        count 5, batch_size 2:   update 0  1  2 | 3  4  5
                                 epoch       0  |    1
                                 examples 2  2  1 2  2  1

    Args:
      update: from 0.
      count: examples.
      batch_size: examples an update; the last update of an epoch may have fewer.
      seed: of the order.

    Returns:
      [<= batch_size] int64.
    """
    per_epoch = -(-count // batch_size)
    epoch, index = divmod(update, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[index * batch_size : (index + 1) * batch_size]
