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
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tqdm

from spa_jax import run as run_lib
from spa_jax.runtime import distributed, preemption
from spa_jax.training import partition
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.metrics import MetricsWriter
from spa_jax.training.state import TrainState


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
        state: TrainState,
        carry: Mapping[str, Any] | None = None,
        every: int,
    ) -> None:
        """Restores the newest checkpoint, if there is one.

        Args:
          folder: the stage's: gets metrics.jsonl and checkpoints.
          trainer: makes the updates.
          state: before the first one, on the host.
          carry: host arrays by name that the stage carries from update to update beside the
            state; they are in its checkpoints.
          every: updates between checkpoints; 0: only when the stage is stopped.

        Raises:
          UserError: the checkpoint is of another model or optimiser.
        """
        self._trainer = trainer
        self._carries = bool(carry)
        self._checkpoints = Checkpoints(run_lib.checkpoints(folder), every=every)
        saved = self._checkpoints.restore(self._tree(state, carry or {}))
        if saved is not None:
            state = saved["state"] if self._carries else saved
        self._carry = {
            name: saved[name] if saved else value for name, value in (carry or {}).items()
        }
        self.start = int(state.update)
        self._writer = MetricsWriter(folder, enabled=distributed.is_first())
        self._writer.truncate_after(self.start)
        self._state = trainer.replicate(state)

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
                if made.metrics is not None:
                    writer.write(done, made.metrics)
                if made.shown:
                    bar.set_postfix(made.shown)
                asked = preemption.asked()
                last = done == total or made.last
                self._checkpoints.maybe_save(
                    done,
                    self._tree(self._trainer.unreplicate(state), carry),
                    last=last,
                    force=asked,
                )
                if asked:
                    preemption.stop(done, total)
                if made.last:
                    break
        self._checkpoints.close()
        return state

    def _tree(self, state: TrainState, carry: Mapping[str, Any]) -> Any:
        """What a checkpoint holds."""
        return {"state": state, **carry} if self._carries else state
