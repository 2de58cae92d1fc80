"""One of several processes of `test_distributed`: python -m tests.runtime.member FOLDER PORT N I.

Makes updates with the devices of all processes, in both partitions, and saves, restores and
gathers on the way; process 0 writes FOLDER/NAME.npz for the test to compare.  What is trained is a
progress head, which compiles in a second; `tests/experiments/test_pod.py` trains policies.
"""

import functools
import pathlib
import sys

import jax
import numpy as np

from spa_jax.config import DistributedConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.runtime import distributed
from spa_jax.training import estimator_update, partition
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from tests.training import test_updates

OPTIMIZER = state_lib.adamw(1e-2, clip_norm=1.0, weight_decay=0.01)


def trainer_of(name: str, devices: int) -> partition.Trainer:
    """The trainer of a head: on all devices, or on the first of a single process."""
    rows = RowsConfig(partition=name, mesh=f"fsdp:{devices}" if name == "mesh" else "")
    if devices == 1:
        return partition.Pmap(estimator_update.make_loss(0.7), OPTIMIZER, 1)
    return partition.make(rows, estimator_update.make_loss(0.7), OPTIMIZER)


def updates(trainer: partition.Trainer, folder: pathlib.Path | None = None) -> dict:
    """Three updates; with a folder, saved after the second and restored.

    Returns:
      name -> array: the parameters, the metrics, and the contributions of a forward pass.
    """
    _, params, batches, counts = test_updates._estimator(trainer.devices, test_updates.ROWS)
    fresh = state_lib.create(params, OPTIMIZER)
    state = trainer.replicate(fresh)
    for _ in range(2):
        state, _ = trainer.update(state, batches, counts)
    checkpoints = folder and Checkpoints(folder, every=2)
    if checkpoints:
        saved = trainer.unreplicate(state)
        checkpoints.maybe_save(2, lambda: saved)
    state, metrics = trainer.update(state, batches, counts)
    last = trainer.fetch(state)
    if checkpoints:
        again = trainer.replicate(checkpoints.restore(fresh))
        again = trainer.fetch(trainer.update(again, batches, counts)[0])
        jax.tree.map(np.testing.assert_array_equal, again, last)
        checkpoints.close()
    forward = trainer.forward(lambda params, _, batch: _contributions(params, batch))
    rows = [forward(trainer.replicate(params), batch) for batch in batches]
    found = {"contributions": np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows])[:9]}
    flat = jax.tree_util.tree_flatten_with_path(last.params)[0]
    found |= {jax.tree_util.keystr(path): leaf for path, leaf in flat}
    return found | {f"metric {name}": np.array(value) for name, value in metrics.items()}


def _contributions(params: dict, batch: estimator_update.StepFeatures) -> jax.Array:
    return estimator_update.contributions(params["progress"], batch)[0]


def talk(index: int, count: int) -> None:
    """What processes tell each other."""
    assert (distributed.index(), distributed.count()) == (index, count)
    assert distributed.broadcast("who", lambda: f"process {index}") == "process 0"
    distributed.assert_equal("a number", 7)
    if index == 1:
        try:
            distributed.assert_equal("their own number", index)
        except UserError as error:
            assert "process 1 has other their own number than process 0 (1, not 0)" in str(error)
            distributed.barrier("their own number")
        else:
            raise AssertionError("not refused")
    else:
        distributed.assert_equal("their own number", 0)
    gathered = distributed.gather({"x": np.full((2, 3), index, np.int32)})["x"]
    assert gathered[:, 0].tolist() == [p for p in range(count) for _ in range(2)]


def main() -> None:
    folder, port, count, index = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:5])
    distributed.initialize(
        DistributedConfig(
            coordinator_address=f"127.0.0.1:{port}",
            num_processes=count,
            process_id=index,
            connect_timeout_s=120,
            meet_timeout_s=120,
        )
    )
    with distributed.ending_together():
        distributed.check_devices()
        talk(index, count)
        for name in ("pmap", "mesh"):
            found = updates(trainer_of(name, jax.device_count()), folder / name)
            if distributed.is_first():
                np.savez(folder / f"{name}.npz", **found)
        if sys.argv[5:]:
            end_badly(index, sys.argv[5])


def end_badly(index: int, why: str) -> None:
    """Process 1 fails; the others wait for it in a collective, which never answers."""
    if index == 1 and why == "mistake":
        raise UserError("the dog ate it")
    if index == 1 and why == "full disk":
        pathlib.Path("/dev/full").write_text("x")
    run = jax.pmap(functools.partial(jax.lax.psum, axis_name="d"), axis_name="d")
    jax.block_until_ready(run(np.ones((jax.local_device_count(), 1))))
    raise AssertionError("the collective answered")


if __name__ == "__main__":
    main()
