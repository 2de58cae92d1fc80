"""The one resumable loop of updates, which SFT, the estimator and the policy's update share.

    restore the newest checkpoint, cut metrics.jsonl back to it
    for every update that is missing:
        step      one update, and what it says
        write     a line of metrics.jsonl
        save      a checkpoint, if one is due, or if SIGTERM or Ctrl-C came
        stop      if one came: the same command goes on from that checkpoint

What a stage has to do after an update (a held-out loss, a policy that is the best so far) it does
in its step, before the line is written.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.runtime import distributed, preemption
from spa_jax.training import partition
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.metrics import MetricsWriter
from spa_jax.training.state import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one update has made.

    Attributes:
      state: after it, on the devices.
      metrics: its line of metrics.jsonl; None: no line now.
      carry: what the next update is given, and a checkpoint holds; see `Loop`.
      shown: at the end of the progress bar.
      last: nothing is left to learn, whatever `total` says.
    """

    state: TrainState
    metrics: Mapping[str, float] | None
    carry: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    last: bool = False


# (number of the update from 0, state on the devices, carry) -> what it made.
Step = Callable[[int, TrainState, Mapping[str, Any]], Outcome]


class Skipped:
    """The updates of a stage that were skipped, because a gradient was not finite."""

    def __init__(self, limit: float, count: int) -> None:
        """Counts on from a checkpoint.

        Args:
          limit: the largest share of the updates that may be skipped.
          count: how many were before.
        """
        self._limit = limit
        self._count = count
        self._first = ""

    def after(self, done: int, count: int, metrics: Mapping[str, float] | None) -> int:
        """Notes how many there are after an update; returns it.

        Args:
          done: updates so far, the skipped ones among them.
          count: how many of them were skipped.
          metrics: of the last one; None: nobody asked for them.
        """
        if count > self._count and not self._first:
            odd = [name for name, value in (metrics or {}).items() if not math.isfinite(value)]
            self._first = f"the first now was update {done}" + (
                f", whose {', '.join(odd)} {'are' if len(odd) > 1 else 'is'} not finite"
                if odd
                else ""
            )
        self._count = count
        return count

    def check(self, title: str, done: int, total: int) -> None:
        """Refuses more than the limit allows.

        Args:
          title: of the stage.
          done: updates so far.
          total: updates that the stage will have made.

        Raises:
          UserError: says what was not finite, and what to do.
        """
        if self._count > self._limit * total:
            raise UserError(
                f"{title}: {self._count} of {done} updates were skipped because a gradient was not "
                f"finite, more than --max_skipped_share={self._limit:g} of {total} allows"
                + (f"; {self._first}" if self._first else "")
                + "; give --compute_dtype=float32 if that overflows, or a lower learning rate"
            )


class Loop:
    """The updates of one stage, from its newest checkpoint on.

    Attributes:
      start: how many updates the checkpoint has behind it; 0 without one.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        trainer: partition.Trainer,
        params: Params,
        carry: Mapping[str, Any] | None = None,
        every: int,
        max_skipped_share: float,
    ) -> None:
        """Restores the newest checkpoint, if there is one.

        Args:
          folder: the stage's: gets metrics.jsonl and checkpoints.
          trainer: makes the updates.
          params: what is trained, before the first one, on the host.
          carry: host arrays by name that the stage carries from update to update beside the
            state; they are in its checkpoints.
          every: updates between checkpoints; 0: only when the stage is stopped.
          max_skipped_share: of the stage's updates that may be skipped, because a gradient was
            not finite.

        Raises:
          UserError: the checkpoint is of another model or optimiser.
        """
        self._trainer = trainer
        self._carries = bool(carry)
        self._checkpoints = Checkpoints(run_lib.checkpoints(folder), every=every)
        saved = self._checkpoints.restore(
            self._in_a_checkpoint(_template(trainer, params), carry or {})
        )
        start = skipped = 0
        if saved is None:
            state = trainer.create(params)
        else:
            restored = saved["state"] if self._carries else saved
            start, skipped = int(restored.update), int(restored.skipped)
            state = trainer.replicate(restored)
        self._carry = {
            name: saved[name] if saved else value for name, value in (carry or {}).items()
        }
        self.start = start
        self._skipped = Skipped(max_skipped_share, skipped)
        self._writer = MetricsWriter(folder, enabled=distributed.is_first())
        self._writer.truncate_after(self.start)
        self._state = state

    def run(self, step: Step, *, total: int, title: str, end: int | None = None) -> TrainState:
        """Makes the updates that are missing.

        Args:
          step: makes one.
          total: how many there are to be, with those before the checkpoint.
          title: of the progress bar.
          end: stop after so many all the same; None: `total`.

        Returns:
          The state after the last one, on the devices.

        Raises:
          preemption.Stopped: SIGTERM or Ctrl-C came; the last update is saved.
          UserError: too many updates were skipped.
        """
        end = total if end is None else end
        bar = tqdm.tqdm(
            range(self.start, end), initial=self.start, total=total, desc=title, unit="update"
        )
        state, carry = self._state, self._carry
        del self._state  # the trainer's updates overwrite it
        with self._writer as writer, bar, preemption.deferred():
            for update in bar:
                made = step(update, state, carry)
                state, carry, done = made.state, dict(made.carry), update + 1
                last = done == total or made.last
                count = int(self._trainer.unreplicate(state.skipped))
                skipped = self._skipped.after(done, count, made.metrics)
                if made.metrics is not None:
                    writer.write(done, {**made.metrics, "skipped": skipped})
                shown = {**made.shown} | ({"skipped": str(skipped)} if skipped else {})
                if shown:
                    bar.set_postfix(shown)
                self._skipped.check(title, done, done if last else total)
                asked = preemption.asked()
                self._checkpoints.maybe_save(
                    done, functools.partial(self._tree, state, carry), last=last, force=asked
                )
                if asked:
                    preemption.stop(done, total)
                if made.last:
                    break
        self._checkpoints.close()
        return state

    def _tree(self, state: TrainState, carry: Mapping[str, Any]) -> Any:
        """What a checkpoint holds, of a state on the devices."""
        return self._in_a_checkpoint(self._trainer.unreplicate(state), carry)

    def _in_a_checkpoint(self, state: TrainState, carry: Mapping[str, Any]) -> Any:
        return {"state": state, **carry} if self._carries else state


def _template(trainer: partition.Trainer, params: Params) -> TrainState:
    """The state's shape, on the host: zeros, which take no memory before they are written."""
    make = functools.partial(state_lib.create, optimizer=trainer.optimizer)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(make, params))
