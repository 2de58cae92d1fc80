"""What a set of played episodes says: success, grounding, and how good the estimator is.

Everything here is a pure function of trajectories or of arrays.  An episode
that the environment broke (`Status.ENV_ERROR`) is nobody's outcome: it is left
out of every figure and counted on its own.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from spa_jax.trajectory import Status, Trajectory

EXAMPLES = 4  # won episodes, and as many lost ones, that are annotated and shown
# A final reward this close to 1 is the full reward (rewards travel as JSON floats).
_FULL_REWARD = 1.0 - 1e-6
# The confidence of z = 1.96, which every table says 95% of.
_CONFIDENCE = math.erf(1.96 / math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class Proportion:
    """`successes` of `games`; the rate and its 95% Wilson interval follow from them."""

    successes: int
    games: int

    @property
    def rate(self) -> float:
        """successes / games; nan without a game."""
        return self.successes / self.games if self.games else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval, in [0, 1]."""
        return wilson_interval(self.successes, self.games)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a rate that does not exist is None."""
        low, high = self.interval
        return {
            "successes": self.successes,
            "games": self.games,
            "rate": _json_number(self.rate),
            "low": low,
            "high": high,
        }


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of one policy on one set of games.

    Attributes:
      success: won games, out of all that the environment did not break.
      reward_sum: the sum of the final rewards R over those games.
      grounded_steps: steps whose action the environment could execute.
      steps: all environment steps; grounding accuracy is over steps, so a long
        episode weighs more than a short one.
      env_errors: episodes that the environment broke; in no other figure.
      left_out: episodes whose openings do not fit into the context; in no other figure.
      by_status: how the games ended, `Status` value -> games.
      by_task_type: task type -> won and played games.
    """

    success: Proportion
    reward_sum: float
    grounded_steps: int
    steps: int
    env_errors: int
    by_status: Mapping[str, int]
    by_task_type: Mapping[str, Proportion]
    left_out: int = 0

    @property
    def asked(self) -> int:
        """Episodes that were asked for: those that count, and those that do not."""
        return self.games + self.env_errors + self.left_out

    @property
    def games(self) -> int:
        """Episodes that count."""
        return self.success.games

    @property
    def success_rate(self) -> float:
        """Share of the games that were won; nan without a game."""
        return self.success.rate

    @property
    def mean_reward(self) -> float:
        """Mean final reward R; nan without a game."""
        return _ratio(self.reward_sum, self.games)

    @property
    def grounding(self) -> float:
        """Share of the steps whose action could be executed; nan without a step."""
        return _ratio(self.grounded_steps, self.steps)

    @property
    def mean_steps(self) -> float:
        """Mean environment steps a game; nan without a game."""
        return _ratio(self.steps, self.games)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the sums, and the figures that follow from them."""
        return {
            "asked": self.asked,
            "games": self.games,
            "success": self.success.to_dict(),
            "mean_reward": _json_number(self.mean_reward),
            "grounding": _json_number(self.grounding),
            "mean_steps": _json_number(self.mean_steps),
            "reward_sum": self.reward_sum,
            "grounded_steps": self.grounded_steps,
            "steps": self.steps,
            "env_errors": self.env_errors,
            "left_out": self.left_out,
            "by_status": dict(self.by_status),
            "by_task_type": {name: part.to_dict() for name, part in self.by_task_type.items()},
        }


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two policies on the same games: how many games which of them won."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: the games that both or neither won say nothing.

        p = min(1, 2 * P[Binomial(n, 1/2) <= min(only_first, only_second)]),
        n = only_first + only_second (McNemar 1947, in its exact form).  1 if n is 0.
        """
        count = self.only_first + self.only_second
        return float(_stats().binomtest(self.only_first, count).pvalue) if count else 1.0


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion (Wilson 1927, JASA 22:209).

    Unlike p +- z sqrt(p (1 - p) / n) it stays inside [0, 1] and keeps its
    coverage close to 0 and 1, where a good or a hopeless agent lives.

    Args:
      successes: how many succeeded, 0 <= successes <= n.
      n: how many there were.  0 gives (0, 1): nothing is known.

    Returns:
      (low, high), both in [0, 1].

    Raises:
      ValueError: if not 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    interval = _stats().binomtest(successes, n).proportion_ci(_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def summarize(trajectories: Iterable[Trajectory], *, failed: int = 0, left_out: int = 0) -> Summary:
    """The figures of one policy's episodes; episodes that the environment broke only counted.

    Args:
      trajectories: what was played.
      failed: how many more the environment broke.
      left_out: how many more did not fit.
    """
    everything = list(trajectories)
    played = [t for t in everything if t.status is not Status.ENV_ERROR]
    types = sorted({t.task_type for t in played})
    return Summary(
        success=_won(played),
        reward_sum=math.fsum(t.final_reward for t in played),
        grounded_steps=sum(step.grounded for t in played for step in t.steps),
        steps=sum(len(t.steps) for t in played),
        env_errors=len(everything) - len(played) + failed,
        left_out=left_out,
        by_status={
            status.value: count
            for status in Status
            if (count := sum(t.status is status for t in played))
        },
        by_task_type={name: _won([t for t in played if t.task_type == name]) for name in types},
    )


def paired(first: Iterable[Trajectory], second: Iterable[Trajectory]) -> Paired | None:
    """Counts who won which game, over the games that both played; None if there is none.

    Games are matched by the trajectory's key, and those that the environment
    broke for either policy are left out.
    """
    one, two = (
        {t.key: t for t in trajectories if t.status is not Status.ENV_ERROR}
        for trajectories in (first, second)
    )
    wins = [(one[key].success, two[key].success) for key in one.keys() & two.keys()]
    if not wins:
        return None
    return Paired(
        both=wins.count((True, True)),
        only_first=wins.count((True, False)),
        only_second=wins.count((False, True)),
        neither=wins.count((False, False)),
    )


def examples(
    trajectories: Iterable[Trajectory], number: int = EXAMPLES
) -> tuple[list[Trajectory], list[Trajectory]]:
    """The episodes of an evaluation to read: `number` won and `number` lost ones.

    They are chosen by a hash of their keys, which knows nothing of the text or the outcome: nobody
    picked the pretty ones, and the same games give the same choice.

    Args:
      trajectories: all episodes of the evaluation; those without a step or that the environment
        broke are not chosen.
      number: of each outcome, at most.

    Returns:
      (won, lost).
    """
    played = by_hash(t for t in trajectories if t.status is not Status.ENV_ERROR and t.steps)
    won = [t for t in played if t.success]
    lost = [t for t in played if not t.success]
    return won[:number], lost[:number]


def by_hash(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """The episodes in the order of a hash of their keys: any first part is a fair choice."""
    return sorted(
        trajectories,
        key=lambda t: hashlib.sha256(repr(t.key).encode("utf-8", "replace")).digest(),
    )


def table(rows: Mapping[str, Summary]) -> str:
    """A Markdown table that also reads well in a terminal: one row a policy, in the given order.

    Games are those that were asked for; figures are of those that were played.
    """
    figures = ["success", "95% interval", "reward", "grounding", "steps"]
    cells = [["policy", "games", "played", "failed", *figures]]
    for name, summary in rows.items():
        low, high = summary.success.interval
        cells.append(
            [
                name.replace("|", "\\|"),
                str(summary.asked),
                str(summary.games),
                str(summary.env_errors),
                _percent(summary.success_rate),
                f"{100 * low:.1f} - {100 * high:.1f}%",
                _decimals(summary.mean_reward, 3),
                _percent(summary.grounding),
                _decimals(summary.mean_steps, 1),
            ]
        )
    # What did not fit is shown only where there was some.
    if any(summary.left_out for summary in rows.values()):
        cells[0].append("left out")
        for line, summary in zip(cells[1:], rows.values(), strict=True):
            line.append(str(summary.left_out))
    return markdown(cells)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties half.

    From the rank sum (Mann and Whitney 1947; Hanley and McNeil 1982), where
    equal scores share their mean rank:

        AUC = (sum of the positives' ranks - P (P + 1) / 2) / (P N)

    Args:
      scores: [n] float.
      positive: [n] bool.

    Returns:
      The area in [0, 1]; nan unless both classes are there and all scores are numbers.
    """
    scores = np.asarray(scores, np.float64)
    positive = np.asarray(positive, bool)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives or np.isnan(scores).any():
        return math.nan
    rank_sum = _stats().rankdata(scores)[positive].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def estimator_validity(
    predicted: Sequence[float] | np.ndarray,
    final_reward: Sequence[float] | np.ndarray,
    contributions: Sequence[Sequence[float]],
) -> dict[str, float]:
    """Whether contributions know anything about the outcome, and about the steps.

    The estimator is trained on (sum_k c_k - R)^2 (SPA-RL, arXiv 2505.20732), so
    on unseen games its error is held against Var(R), the error of the best
    constant.  A right sum says nothing about the steps: spreading it evenly,
    c_k = (sum c) / n, leaves mse and auc as they are and has spread 0.

    Args:
      predicted: [N] float, sum_k c_k of each trajectory.
      final_reward: [N] float, R in [0, 1].
      contributions: N sequences of floats, the c_k of each trajectory's steps.

    Returns:
      trajectories: N.
      mse: mean (sum c - R)^2.
      var: Var(R), population.
      mse_over_var: below 1 is better than a constant; nan if Var(R) is 0.
      auc: area under the ROC curve of sum c for success (R = 1).
      spread: mean over trajectories of at least two steps of the (population)
        standard deviation of c within the trajectory.
      correlation: Pearson's, between sum c and R; nan if either is constant.
      Whatever is not defined for the data is nan.

    Raises:
      ValueError: if the three differ in length.
    """
    predicted = np.asarray(predicted, np.float64)
    final_reward = np.asarray(final_reward, np.float64)
    if not len(predicted) == len(final_reward) == len(contributions):
        raise ValueError(
            f"{len(predicted)} predictions, {len(final_reward)} rewards and "
            f"{len(contributions)} trajectories of contributions"
        )
    some = len(predicted) > 0
    mse = float(np.mean((predicted - final_reward) ** 2)) if some else math.nan
    var = float(np.var(final_reward)) if some else math.nan
    spreads = [float(np.std(np.asarray(c, np.float64))) for c in contributions if len(c) > 1]
    return {
        "trajectories": len(predicted),
        "mse": mse,
        "var": var,
        "mse_over_var": mse / var if var > 0 else math.nan,
        "auc": auc(predicted, final_reward >= _FULL_REWARD),
        "spread": float(np.mean(spreads)) if spreads else math.nan,
        "correlation": _correlation(predicted, final_reward),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(_stats().pearsonr(x, y).statistic)


def _stats() -> ModuleType:
    """scipy.stats, which takes two seconds to load: not before something is evaluated."""
    from scipy import stats

    return stats


def _won(played: Sequence[Trajectory]) -> Proportion:
    return Proportion(sum(t.success for t in played), len(played))


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if math.isfinite(value) else "-"


def _decimals(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right, padded to one width."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for line in [cells[0], rule, *cells[1:]]:
        padded = [line[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)
