"""Finished runs, paired by hand."""

import dataclasses

import numpy as np
import pytest

from spa_jax import store
from spa_jax.errors import UserError
from spa_jax.study import pairs
from spa_jax.trajectory import Status
from tests import tiny


def _write(folder, outcomes, attempt=0):
    rng = np.random.default_rng(0)
    played = [
        dataclasses.replace(
            tiny.random_trajectory(rng, f"game_{number}", final_reward=float(won)), attempt=attempt
        )
        for number, won in outcomes.items()
    ]
    path = folder / "trajectories.jsonl"
    store.write(path, [*(store.read(path) if path.exists() else []), *played])


def test_games_are_paired_and_counted(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    _write(a / "eval" / "spa", dict(enumerate([1, 1, 0, 0, 0, 1])))
    _write(b, dict(enumerate([1, 0, 1, 1, 1, 1, 1], 0)) | {6: 1})  # a folder of episodes itself
    (found,) = pairs.compare([str(a), str(b)], "spa")
    assert (found.reference, found.success) == (0.5, 5 / 6)
    counted = found.difference.pairs
    assert (counted.both, counted.only_first, counted.only_second, counted.neither) == (2, 1, 3, 0)
    assert found.difference.estimate.value == pytest.approx(2 / 6)
    assert found.difference.pairs.p_value == pytest.approx(0.625)  # 2 (1 + 4) / 16
    assert (found.only_here, found.missing) == (1, 0)
    assert "| +33.3% [" in pairs.table([found])


def test_attempts_of_a_game_stay_together(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for attempt in range(4):
        _write(a, {0: 0, 1: 0}, attempt)
        _write(b, {0: 1, 1: 0}, attempt)
    (found,) = pairs.compare([str(a), str(b)], "spa")
    estimate = found.difference.estimate
    assert estimate.value == 0.5 and estimate.games == 2
    assert (estimate.low, estimate.high) == (0.0, 1.0)  # eight episodes, but two games


def test_broken_games_are_nobodys_and_what_cannot_be_paired_is_said(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    _write(a / "eval" / "spa", {0: 1, 1: 1})
    _write(b / "eval" / "spa", {0: 0, 5: 1})
    path = b / "eval" / "spa" / "trajectories.jsonl"
    first, second = store.read(path)
    store.write(path, [dataclasses.replace(first, status=Status.ENV_ERROR), second])
    with pytest.raises(UserError, match="played no game in common"):
        pairs.compare([str(a), str(b)], "spa")
    with pytest.raises(UserError, match="has no evaluation 'sft'; --evaluation can be spa"):
        pairs.compare([str(a), str(b)], "sft")
    with pytest.raises(UserError, match="nowhere: has no evaluation 'spa' and no other"):
        pairs.compare([str(a), str(tmp_path / "nowhere")], "spa")
    with pytest.raises(UserError, match="two runs at least"):
        pairs.compare([str(a)], "spa")
