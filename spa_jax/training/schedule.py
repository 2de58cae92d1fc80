"""Which data an update sees, and at which learning rate: pure functions of its number.

Nothing is carried from update to update, so a resume needs the number alone.
"""

from collections.abc import Sequence

import numpy as np
import optax


def warmup_cosine(peak: float, updates: int, warmup_share: float) -> optax.Schedule:
    """Linear warm-up over a share of the updates, then a cosine to zero."""
    warmup = _warmup(updates, warmup_share)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup, peak_value=peak, warmup_steps=warmup, decay_steps=updates + 1
    )


def warmup_constant(peak: float, updates: int, warmup_share: float) -> optax.Schedule:
    """Linear warm-up over a share of the updates, then the peak: for averaged weights."""
    warmup = _warmup(updates, warmup_share)
    return optax.linear_schedule(peak / warmup, peak, warmup)


def _warmup(updates: int, share: float) -> int:
    """How many updates warm up: one at least."""
    return max(1, round(share * updates))


def batch_of(update: int, lengths: Sequence[int], batch_size: int, seed: int) -> np.ndarray:
    """The indices of an update's examples: every epoch is a random partition of its own.

        5 examples, batch_size 2:   update 0  1  2 | 3  4  5
                                    epoch       0  |    1
                                    examples 2  2  1 2  2  1

    The batches of an epoch have about the same number of tokens, so that packed rows which
    hold one batch hold every other: each batch gets one example of every stratum of length,
    the longest of one with the shortest of the next.

        lengths 9 8 7 | 3 2 1, batches (9, 1) (8, 2) (7, 3)

    Lengths are perturbed by up to 20% first, so that batches differ from epoch to epoch.

    Args:
      update: from 0.
      lengths: [N] tokens of each example.
      batch_size: examples an update; some updates of an epoch may have one fewer.
      seed: of the order.

    Returns:
      [<= batch_size] int64.
    """
    count = len(lengths)
    per_epoch = -(-count // batch_size)
    epoch, index = divmod(update, per_epoch)
    random = np.random.default_rng([seed, epoch])
    order = np.argsort(-np.asarray(lengths) * random.uniform(0.8, 1.2, count))
    batches = random.permutation(per_epoch)
    place = np.arange(count) % per_epoch
    backwards = np.arange(count) // per_epoch % 2 == 1
    place = np.where(backwards, per_epoch - 1 - place, place)
    return random.permutation(order[place == batches[index]])
