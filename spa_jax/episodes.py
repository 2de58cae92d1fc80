"""Episodes of a file as a training stage takes them: read, filtered and checked, once for all."""

import hashlib
import pathlib
from collections.abc import Iterable, Sequence

from spa_jax import batching, store
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import limits
from spa_jax.models.config import ModelConfig
from spa_jax.runtime import distributed
from spa_jax.trajectory import Status, Trajectory


def load(path: pathlib.Path) -> list[Trajectory]:
    """The completed episodes of a file, sorted by key; every process must read the same.

    Args:
      path: the JSON lines of a stage.

    Returns:
      N trajectories; there may be none.

    Raises:
      UserError: the file is missing or broken, or another process reads other episodes.
    """
    trajectories = completed(store.read(path))
    assert_same_everywhere(trajectories, path)
    return trajectories


def completed(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """The episodes that were played to an end.

    An environment error is nobody's outcome, and an episode without a step teaches nothing.
    """
    return [t for t in trajectories if t.status is not Status.ENV_ERROR and t.steps]


def assert_same_everywhere(trajectories: Sequence[Trajectory], source: object) -> None:
    """Makes sure that all processes read the same episodes, and so make the same updates.

    A collective of all processes.

    Args:
      trajectories: those that this process read.
      source: where it read them, for the message.

    Raises:
      UserError: another process read others.
    """
    if distributed.count() == 1:
        return
    digest = hashlib.sha256()
    for t in trajectories:
        digest.update(repr((t.key, t.token_ids, [step.reward for step in t.steps])).encode())
    distributed.assert_equal(f"episodes in {source}", digest.hexdigest())


def check_fit(
    config: ModelConfig, trajectories: Sequence[Trajectory], source: object, rows: RowsConfig
) -> None:
    """Refuses, before any work, episodes that the model cannot read or that fit no row.

    Args:
      config: the model's shape.
      trajectories: encoded episodes.
      source: their file, for the message.
      rows: the static shape.

    Raises:
      UserError: names the first episode that is too long, and the flag to raise, or that has a
        token which the model has not; or no episode has a token that the policy wrote.
    """
    for t in trajectories:
        what = f"{source}: task {t.task!r} (seed {t.seed}, attempt {t.attempt})"
        limits.check_length(config, len(t.token_ids), what)
        if max(t.token_ids, default=0) >= config.vocab_size:
            raise UserError(
                f"{what}: token_ids holds {max(t.token_ids)}, and the model's vocab_size is "
                f"{config.vocab_size}: another model played it; give that, or remove the line"
            )
    if trajectories and all(max(t.step_id, default=-1) < 0 for t in trajectories):
        raise UserError(
            f"{source}: no episode holds a token that the policy wrote, so there is nothing to "
            "learn from; explore with the policy, and not with the expert"
        )
    batching.check_fit(
        trajectories,
        row_length=rows.row_length,
        policy_slots=rows.policy_slots,
        step_slots=rows.step_slots,
    )
