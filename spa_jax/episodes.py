"""Episodes for training, read and checked in one place."""

import hashlib
import pathlib
from collections.abc import Sequence

from spa_jax import batching, store
from spa_jax.config import RowsConfig
from spa_jax.models import transformer
from spa_jax.models.transformer import ModelConfig
from spa_jax.training import distributed
from spa_jax.trajectory import Status, Trajectory


def load(path: pathlib.Path) -> list[Trajectory]:
    """The completed episodes of a file, sorted by key; every process reads the same.

    Raises:
      UserError: as `store.read`, or the processes read different episodes.
    """
    trajectories = completed(store.read(path))
    assert_same_everywhere(trajectories, path)
    return trajectories


def completed(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Those that somebody played to an end: an environment error is no outcome."""
    return [t for t in trajectories if t.status is not Status.ENV_ERROR and t.steps]


def assert_same_everywhere(trajectories: Sequence[Trajectory], source: object) -> None:
    """Makes sure that all processes read the same episodes, and so make the same updates.

    Raises:
      UserError: if they do not.
    """
    if distributed.count() == 1:
        return
    digest = hashlib.sha256()
    for t in trajectories:
        digest.update(repr((t.key, t.token_ids, [step.reward for step in t.steps])).encode())
    distributed.agree(f"episodes in {source}", digest.hexdigest())


def check_lengths(
    config: ModelConfig, trajectories: Sequence[Trajectory], source: object, rows: RowsConfig
) -> None:
    """Refuses episodes that the model cannot attend over or that fit no row, before any work.

    Args:
      config: the model's shape.
      trajectories: the episodes.
      source: their file, for the message.
      rows: the static shape.

    Raises:
      UserError: names the first such episode, and the flag to raise.
    """
    for t in trajectories:
        what = f"{source}: task {t.task!r} (seed {t.seed}, attempt {t.attempt})"
        transformer.check_length(config, len(t.token_ids), what)
    batching.check_fit(
        trajectories,
        row_length=rows.row_length,
        policy_slots=rows.policy_slots,
        step_slots=rows.step_slots,
    )
