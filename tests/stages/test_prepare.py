"""Nothing that is held out is trained on."""

import pytest

from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError
from spa_jax.stages import prepare


def test_a_shared_layout_or_seed_is_refused():
    def task(split: str, layout: str, seed: int | None) -> Task:
        return Task(task=f"{split}/{layout}", split=split, task_type="", layout=layout, seed=seed)

    held_out = [task("heldout", "a", 4)]
    prepare.assert_disjoint({"train": [task("train", "b", 1)], "heldout": held_out}, "heldout")
    for bad in (task("train", "a", 1), task("train", "b", 4)):
        with pytest.raises(UserError, match="held-out"):
            prepare.assert_disjoint({"train": [bad], "heldout": held_out}, "heldout")
