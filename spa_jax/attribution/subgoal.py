"""Credit that sees the truth: what the environment says that each step brought."""

import chex
import jax.numpy as jnp


def subgoal_credit(progress: chex.Array, step_mask: chex.Array) -> chex.Array:
    """The rise of the task's progress over each step; an upper bound for learnt credits.

        c_k = p_k - p_{k-1},   p_{-1} = initial progress

    What is done again after it was undone is paid again, and undoing it costs as much, so going
    round in a circle pays nothing.  The credits add up to p_{n-1} - p_{-1}: 1 - p_{-1} for a won
    episode, and what was reached for a lost one (`--credit_residual` makes the sum R).

    Source: potential-based shaping (Ng, Harada and Russell 1999) with gamma = 1, the potential
    being progress; as the reward itself, so without the final one.

    Args:
      progress: [N, S + 1] p in [0, 1], before the first step and after each; anything after an
        episode's end.
      step_mask: [N, S] 1 (or True) where a step is.

    Returns:
      [N, S] c_k; 0 where the mask is 0.
    """
    chex.assert_rank([progress, step_mask], 2)
    chex.assert_shape(progress, (step_mask.shape[0], step_mask.shape[1] + 1))
    return jnp.where(step_mask.astype(bool), progress[:, 1:] - progress[:, :-1], 0.0)
