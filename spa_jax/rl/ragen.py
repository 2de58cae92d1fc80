"""RAGEN's StarPO-S: the tasks whose rollouts differ most, and a wider clip upwards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.rl import losses
from spa_jax.rl.losses import PolicyStats

SHARE = 0.25  # of the tasks that are trained on
CLIP_HIGH = 0.28


def most_uncertain(
    final_reward: np.ndarray, group: np.ndarray, *, share: float = SHARE
) -> np.ndarray:
    """The rollouts of the tasks whose rewards are spread the most.

        U(task) = std of R over the task's rollouts;  the ceil(share * tasks) largest are kept

    Source: RAGEN, arXiv 2504.20073, section 3.2 (uncertainty-based filtering; the share 25% is
    that of its main results).  Of equally uncertain tasks those with the lower number are kept.

    Args:
      final_reward: [N] R.
      group: [N] int: the trajectories of a task have the same number.
      share: of the tasks, above 0.

    Returns:
      [N] bool.
    """
    tasks = np.unique(group)
    spread = np.array([final_reward[group == task].std() for task in tasks])
    kept = tasks[np.argsort(-spread, kind="stable")[: int(np.ceil(share * len(tasks)))]]
    return np.isin(group, kept)


def clip_higher_policy_loss(
    log_probs: chex.Array,
    old_log_probs: chex.Array,
    advantages: chex.Array,
    mask: chex.Array,
    *,
    clip: float,
    clip_high: float = CLIP_HIGH,
    truncate: float = 0.0,
) -> tuple[jax.Array, PolicyStats]:
    """PPO's clipped surrogate with more room upwards than downwards.

        L = - sum_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t)

    Only the upper bound can bind where A_t > 0, and only the lower where A_t < 0, so this is the
    symmetric loss of the two kinds of tokens, each with its own eps.

    Source: RAGEN, arXiv 2504.20073, section 3.2 (clip-higher, 0.28); DAPO, arXiv 2503.14476,
    section 3.1.

    Args:
      log_probs: [...] as `losses.clipped_policy_loss`, like old_log_probs, advantages and mask.
      old_log_probs: as there.
      advantages: as there.
      mask: as there.
      clip: eps, of the lower bound.
      clip_high: eps_high.
      truncate: as there.

    Returns:
      (the sum of the losses, `PolicyStats`).
    """
    mask, good = mask.astype(bool), advantages > 0
    parts = (
        losses.clipped_policy_loss(
            log_probs, old_log_probs, advantages, mask & tokens, clip=eps, truncate=truncate
        )
        for tokens, eps in ((good, clip_high), (~good, clip))
    )
    total: tuple[jax.Array, PolicyStats] = jax.tree.map(jnp.add, *parts)
    return total
