import dataclasses
import itertools

import pytest

from spa_jax import attempts
from spa_jax.trajectory import Status
from tests import runs


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (4, 0, 3), (5, 5, 1), (6, 2, 4), (3, 2, 2)])
def test_pass_at_k_counts_the_choices_that_hold_a_win(n, c, k):
    outcomes = [True] * c + [False] * (n - c)
    choices = list(itertools.combinations(outcomes, k))
    share = sum(any(choice) for choice in choices) / len(choices)
    assert attempts.pass_at_k([n], [c], k) == pytest.approx(share)


def test_more_attempts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="pass@3 of 2 attempts"):
        attempts.pass_at_k([4, 2], [1, 1], 3)


def _games(wins, of):
    """Episodes of a game for each entry of `wins`: so many won, of so many."""
    one = runs.episodes(1)[0]
    return [
        dataclasses.replace(
            one, task=f"game {game}", attempt=attempt,
            status=Status.SUCCESS if attempt < won else Status.FAILURE,
        )
        for game, won in enumerate(wins)
        for attempt in range(of)
    ]


def test_a_games_attempts_are_not_games():
    """Games that are won always or never: four attempts say no more of them than one."""
    found = attempts.summarize(_games([4] * 10 + [0] * 10, of=4))
    assert (found.games, found.attempts) == (20, 4)
    assert list(found.pass_at_k) == [1, 2, 4]
    for share in found.pass_at_k.values():
        assert share.rate == 0.5
        assert share.high - share.low == pytest.approx(2 * 1.96 * (0.25 / 20) ** 0.5, rel=0.15)


def test_what_the_environment_broke_is_no_attempt():
    games = _games([1, 2], of=3)
    games[0] = dataclasses.replace(games[0], status=Status.ENV_ERROR)
    found = attempts.summarize(games)
    assert (found.attempts, list(found.pass_at_k)) == (3, [1, 2])  # one game has two attempts left
    assert found.pass_at_k[1].rate == pytest.approx((0 / 2 + 2 / 3) / 2)
    assert attempts.summarize(games[:1]) is None
