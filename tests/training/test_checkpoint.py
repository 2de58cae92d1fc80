"""When a stage's state is saved."""

import functools
import shutil

import numpy as np
import pytest

from spa_jax.errors import UserError
from spa_jax.training.checkpoint import Checkpoints


@pytest.mark.parametrize(
    ("every", "last", "force", "saved"),
    [
        (5, False, False, 10),
        (5, True, False, 12),
        (5, False, True, 12),
        (0, False, False, None),
        (0, True, False, None),
        (0, True, True, 12),
    ],
)
def test_a_checkpoint_is_saved_every_few_updates_at_the_end_and_when_told(
    tmp_path, every, last, force, saved
):
    """Twelve updates; `last` and `force` are of the twelfth."""
    checkpoints = Checkpoints(tmp_path, every=every)
    for update in range(1, 13):
        end = update == 12
        state = {"update": np.int32(update)}
        keep = functools.partial(dict, state)
        checkpoints.maybe_save(update, keep, last=end and last, force=end and force)
    checkpoints.close()
    again = Checkpoints(tmp_path, every=every)
    found = again.restore({"update": np.int32(0)})
    again.close()
    assert (found and int(found["update"])) == saved


def test_a_damaged_checkpoint_is_said_to_be(tmp_path):
    state = {"w": np.arange(400.0, dtype=np.float32)}
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.maybe_save(1, lambda: state)
    checkpoints.close()
    held = tmp_path / "1" / "default"
    chosen = [held / "_METADATA", held / "manifest.ocdbt", *(held / "d").iterdir()]
    for file in chosen:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        again = Checkpoints(tmp_path, every=1)
        with pytest.raises(UserError, match=r"1: the checkpoint is damaged \(.*remove it, and"):
            again.restore(state)
        again.close()
        file.write_bytes(whole)
    again = Checkpoints(tmp_path, every=1)
    with pytest.raises(UserError, match="the checkpoint does not fit this run's model"):
        again.restore({"v": np.zeros(3, np.float32)})
    again.close()


def test_a_checkpoint_that_the_disk_cannot_hold_is_not_begun(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1)
    free = shutil.disk_usage(tmp_path).free
    large = np.broadcast_to(np.zeros(1, np.float64), (free // 4,))  # takes no memory
    with pytest.raises(UserError, match="the disk is full: a checkpoint takes .*, and .* are free"):
        checkpoints.maybe_save(1, lambda: {"w": large})
    checkpoints.close()
