"""The loop of updates: what it writes when, where it goes on, and what it leaves where it stops."""

import dataclasses
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spa_jax import run as run_lib
from spa_jax.errors import UserError
from spa_jax.runtime import preemption
from spa_jax.training import metrics, partition
from spa_jax.training import state as state_lib
from spa_jax.training.checkpoint import Checkpoints
from spa_jax.training.loop import Loop, Outcome
from tests import programs

OPTIMIZER = state_lib.Guarded(*optax.sgd(0.1, momentum=0.9))  # momentum: a state of its own
TOTAL = 7


def _loss(params, frozen, batch, counts):
    """(w - x)^2 of a microbatch's numbers x."""
    del frozen
    error = jnp.sum(jnp.square(params["w"] - batch)) / counts["n"]
    return error, {"error": error}


class _Stage:
    """A tiny stage: four numbers follow the updates' targets; a running sum is carried along."""

    def __init__(self, folder, *, every=3, carried=True):
        self.trainer = partition.Pmap(_loss, OPTIMIZER, 1)
        self.updates: list[int] = []  # those that were made
        self.lines: list[int] = []  # lines of metrics that stood there when they began
        self.loop = Loop(
            folder,
            trainer=self.trainer,
            params={"w": np.zeros(4, np.float32)},
            carry={"sum": np.zeros(2)} if carried else None,
            every=every,
            max_skipped_share=0.3,
        )
        self._file = folder / metrics.METRICS_FILE
        self._carried = carried

    def step(self, update, state, carry):
        self.updates.append(update)
        self.lines.append(len(_lines(self._file)))
        batches = [np.full((1, 4), np.sin(update), np.float32)]
        state, sums = self.trainer.update(state, batches, {"n": 4.0})
        if not self._carried:
            return Outcome(state, {"error": sums["error"]})
        total = carry["sum"] + [sums["error"], 1]
        return Outcome(state, {"error": sums["error"], "sum": total[0]}, carry={"sum": total})

    def run(self, **kwargs):
        """The last state, on the host."""
        kwargs = {"step": self.step, "total": TOTAL, "title": "tiny"} | kwargs
        return jax.device_get(self.trainer.unreplicate(self.loop.run(**kwargs)))


def _lines(file) -> list[dict]:
    return metrics.read_metrics(file) if file.exists() else []


def _records(folder) -> list[dict]:
    lines = _lines(folder / metrics.METRICS_FILE)
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def _saved(folder) -> int | None:
    names = [path.name for path in run_lib.checkpoints(folder).iterdir()]
    return max((int(name) for name in names if name.isdigit()), default=None)


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(folder, last state) of a stage that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, _Stage(folder).run()


def test_every_update_has_its_line_before_its_checkpoint(tmp_path, monkeypatch):
    seen, save = [], Checkpoints.maybe_save

    def watched(self, update, make, **when):
        tree = make()
        seen.append((update, _records(tmp_path)[-1]["update"], when["last"], when["force"]))
        assert int(tree["state"].update) == update and tree["sum"][1] == update
        save(self, update, make, **when)

    monkeypatch.setattr(Checkpoints, "maybe_save", watched)
    stage = _Stage(tmp_path)
    state = stage.run()
    assert stage.updates == stage.lines == list(range(TOTAL))
    assert seen == [(n, n, n == TOTAL, False) for n in range(1, TOTAL + 1)]
    assert int(state.update) == _saved(tmp_path) == TOTAL
    assert [r["update"] for r in _records(tmp_path)] == list(range(1, TOTAL + 1))


def run_until_signalled(folder: str, every: int, number: int) -> None:
    """A stage that gets a signal in its fifth update; it ends the process that calls this."""
    stage = _Stage(pathlib.Path(folder), every=every)

    def step(update, state, carry):
        if update == 4:
            signal.raise_signal(number)
        return stage.step(update, state, carry)

    with preemption.handled():
        stage.run(step=step)


@pytest.mark.parametrize("every", [3, 0])
def test_a_signal_lets_the_update_finish_and_saves_it(every, unbroken, tmp_path):
    call = f"test_loop.run_until_signalled({str(tmp_path)!r}, {every}, {signal.SIGTERM:d})"
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.training import test_loop; {call}"],
        cwd=programs.ROOT,
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM after update 5 of 7, which is saved" in done.stderr
    assert _saved(tmp_path) == 5 and _records(tmp_path)[-1]["update"] == 5
    again = _Stage(tmp_path, every=every)
    assert again.loop.start == 5
    _same(again.run(), unbroken[1])
    assert again.updates == [5, 6]
    assert _records(tmp_path) == _records(unbroken[0])  # the carried sum among them


def test_an_error_loses_the_updates_since_the_checkpoint(unbroken, tmp_path):
    stage = _Stage(tmp_path)

    def broken(update, state, carry):
        if update == 5:
            raise ValueError("a bug")
        return stage.step(update, state, carry)

    with pytest.raises(ValueError, match="a bug"):
        stage.run(step=broken)
    assert (_saved(tmp_path), _records(tmp_path)[-1]["update"]) == (3, 5)
    again = _Stage(tmp_path)
    assert again.loop.start == 3
    assert _records(tmp_path)[-1]["update"] == 3  # cut back to the checkpoint at once
    _same(again.run(), unbroken[1])
    assert again.updates == [3, 4, 5, 6]
    assert _records(tmp_path) == _records(unbroken[0])


def test_a_stage_without_a_carry_has_the_state_alone_in_its_checkpoints(unbroken, tmp_path):
    _same(_Stage(tmp_path, carried=False).run(), unbroken[1])
    template = state_lib.create({"w": np.zeros(4, np.float32)}, OPTIMIZER)
    checkpoints = Checkpoints(run_lib.checkpoints(tmp_path), every=1)
    _same(checkpoints.restore(template), unbroken[1])
    checkpoints.close()


def test_the_last_update_may_come_early(tmp_path):
    """As SFT's patience ends it; run again it has nothing to do, and leaves what is there."""
    stage = _Stage(tmp_path)

    def patient(update, state, carry):
        return dataclasses.replace(stage.step(update, state, carry), last=update == 3)

    state = stage.run(step=patient)
    assert stage.updates == [0, 1, 2, 3]
    assert int(state.update) == _saved(tmp_path) == 4
    again = _Stage(tmp_path)
    _same(again.run(end=again.loop.start), state)
    assert not again.updates and len(_records(tmp_path)) == 4


def test_end_stops_before_the_total(tmp_path):
    stage = _Stage(tmp_path)
    assert int(stage.run(end=2).update) == 2
    assert stage.updates == [0, 1] and _saved(tmp_path) is None


def test_an_update_may_have_no_line(tmp_path):
    stage = _Stage(tmp_path)

    def seldom(update, state, carry):
        made = stage.step(update, state, carry)
        return made if update % 2 else dataclasses.replace(made, metrics=None)

    stage.run(step=seldom)
    assert [r["update"] for r in _records(tmp_path)] == [2, 4, 6]


def test_skipped_updates_are_counted_and_too_many_stop_the_stage(tmp_path, capsys):
    trainer = partition.Pmap(_loss, state_lib.adamw(0.1, clip_norm=1.0, weight_decay=0.0), 1)

    def loop(folder, share):
        params = {"w": np.zeros(4, np.float32)}
        return Loop(folder, trainer=trainer, params=params, every=2, max_skipped_share=share)

    def step(update, state, carry):
        numbers = np.full((1, 4), np.nan if update in (1, 2, 5) else 1.0, np.float32)
        state, sums = trainer.update(state, [numbers], {"n": 4.0})
        return Outcome(state, {"error": sums["error"]})

    last = loop(tmp_path / "all", 3 / 7).run(step, total=7, title="tiny")
    assert np.isfinite(jax.device_get(trainer.unreplicate(last)).params["w"]).all()
    assert [r["skipped"] for r in _records(tmp_path / "all")] == [0, 1, 2, 2, 2, 3, 3]
    assert "skipped=3" in capsys.readouterr().err
    message = (
        "tiny: 3 of 6 updates .* not finite, more than --max_skipped_share=0.3 of 7 allows; the "
        "first now was update 2, whose error is not finite; give --compute_dtype=float32"
    )
    with pytest.raises(UserError, match=message):
        loop(tmp_path / "some", 0.3).run(step, total=7, title="tiny")
    # The same command goes on from the checkpoint, and ends there again.
    with pytest.raises(UserError, match="tiny: 3 of 6 updates"):
        loop(tmp_path / "some", 0.3).run(step, total=7, title="tiny")
