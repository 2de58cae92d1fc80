"""When a stage's state is saved."""

import numpy as np
import pytest

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
        checkpoints.maybe_save(update, state, last=end and last, force=end and force)
    checkpoints.close()
    again = Checkpoints(tmp_path, every=every)
    found = again.restore({"update": np.int32(0)})
    again.close()
    assert (found and int(found["update"])) == saved
