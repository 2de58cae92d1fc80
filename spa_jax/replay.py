"""The beginning of an episode, played again: up to a step, exactly."""

import dataclasses

from spa_jax.envs.client import Session
from spa_jax.envs.protocol import Observation
from spa_jax.errors import UserError
from spa_jax.trajectory import Trajectory


def cut(trajectory: Trajectory, step: int) -> Trajectory:
    """An episode as it was before a step k, from 0.

        token_ids  i i o o w w e o o w w ...      step_id  - - - - 0 0 - - - 1 1 ...
        step 1     i i o o w w e o o              and the policy writes next

    The final observation is what the policy reads before step k.
    """
    ids = trajectory.step_id
    end = next((at for at, k in enumerate(ids) if k >= step), len(ids))
    return dataclasses.replace(
        trajectory,
        steps=trajectory.steps[:step],
        final_observation=trajectory.steps[step].observation,
        token_ids=trajectory.token_ids[:end],
        step_id=ids[:end],
        log_probs=trajectory.log_probs[:end],
        ref_log_probs=None,
        final_reward=0.0,
    )


def play(session: Session, now: Observation, prefix: Trajectory) -> Observation:
    """Plays a prefix's actions after a reset that said `now`; returns what came last.

    Raises:
      UserError: the environment says something else than it did when the prefix was played.
      EnvError: it failed.
    """
    said = [*(step.observation for step in prefix.steps), prefix.final_observation]
    for k, text in enumerate(said):
        if k:
            now = session.step(prefix.steps[k - 1].action, parsed=True)
        same = now.text == text and not now.done
        same &= now.instruction == prefix.instruction if k == 0 else True
        same &= now.grounded == prefix.steps[k - 1].grounded if k else True
        if not same:
            after = f"after step {k} of {len(prefix.steps)}" if k else "after its reset"
            raise UserError(
                f"task {prefix.task!r} (seed {prefix.seed}): the environment is not "
                f"deterministic: the same actions played again, {after} it says {now.text[:200]!r} "
                f"and not {text[:200]!r}; credit can be judged by branches only where an episode "
                "can be played again exactly"
            )
    return now
