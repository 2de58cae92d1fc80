"""Orbax checkpoints of a training stage: the newest is kept, and a resume is bit-equal.

Of several processes every one calls `restore`, `maybe_save` and `close`: arrays that one process
holds all of are written by the first, and each writes its parts of those cut over processes.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from spa_jax.errors import UserError
from spa_jax.runtime import distributed

_COMPRESSED = 0.9  # of its size is what a checkpoint takes at the least: Orbax compresses it


class Checkpoints:
    """The checkpoints of one stage's folder."""

    def __init__(self, folder: pathlib.Path, *, every: int) -> None:
        """Opens (and makes) the folder; `every` updates `maybe_save` saves, 0: when it must."""
        self._folder = pathlib.Path(folder).resolve()
        self._every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def restore(self, template: Any) -> Any | None:
        """The newest checkpoint, in the shape of `template`, on the host; None if there is none.

        Args:
          template: a pytree of (host or device) arrays without a device axis.

        Raises:
          UserError: if the checkpoint is of another shape, or damaged.
        """
        step = distributed.broadcast("the newest checkpoint", self._manager.latest_step)
        if step is None:
            return None
        # Numpy arrays and not shapes: Orbax would put arrays that are described by their shapes
        # onto the devices that they were saved from.
        shapes = jax.tree.map(np.asarray, jax.device_get(template))
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # of Orbax, JSON, TensorStore, zstd or the file system
            damaged = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | OSError)
            if damaged or re.match("DATA_LOSS|NOT_FOUND|OUT_OF_RANGE", str(error)):
                raise UserError(
                    f"{self._folder / str(step)}: the checkpoint is damaged "
                    f"({str(error).splitlines()[0][:200]}); remove it, and the stage starts anew"
                ) from error
            if isinstance(error, ValueError | KeyError | TypeError):
                raise self._mismatch(step, error) from error
            raise
        same = jax.tree.map(lambda a, b: a.shape == b.shape, restored, shapes)
        if not all(jax.tree.leaves(same)):
            raise self._mismatch(step, "an array has another shape")
        return jax.device_get(restored)

    def maybe_save(
        self, update: int, make: Callable[[], Any], *, last: bool = False, force: bool = False
    ) -> None:
        """Saves after every `every` updates, and the last; returns when it is on the disk.

        Args:
          update: how many there have been.
          make: gives what is saved, as a trainer's `unreplicate` does; not called if none is due,
            because a small state has many small arrays.
          last: no update follows.
          force: save it, whatever `every` is.

        Raises:
          UserError: the disk has no room for it.
        """
        due = self._every and update and (last or update % self._every == 0)
        if not due and not force:
            return
        tree = make()
        self._check_room(tree)
        self._manager.save(update, args=ocp.args.StandardSave(jax.tree.map(_host, tree)))
        self._manager.wait_until_finished()

    def _check_room(self, tree: Any) -> None:
        """Refuses to begin what the disk cannot hold: Orbax's threads would each tell of it."""
        needed = sum(int(x.nbytes) for x in jax.tree.leaves(tree))
        free = shutil.disk_usage(self._folder).free
        if free < _COMPRESSED * needed:
            raise UserError(
                f"{self._folder}: the disk is full: a checkpoint takes {needed / 2**20:.1f} MiB, "
                f"and {free / 2**20:.1f} MiB are free; make room and give the same command again: "
                "it goes on where it was"
            )

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()

    def _mismatch(self, step: int, error: Any) -> UserError:
        return UserError(
            f"{self._folder / str(step)}: the checkpoint does not fit this run's model or "
            f"optimiser ({str(error).splitlines()[0]}); continue with the flags it was made "
            "with, or choose another --workdir"
        )


def _host(x: Any) -> Any:
    """An array on the host; one that lies on several processes' devices stays there."""
    cut = isinstance(x, jax.Array) and not x.is_fully_addressable
    return x if cut else np.asarray(jax.device_get(x))
