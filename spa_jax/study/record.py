"""What a study has found so far, as `study.json` has it: arms, their runs, and the differences."""

import dataclasses
import datetime
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spa_jax import machine
from spa_jax import settings as settings_lib
from spa_jax.stage_config import RFT
from spa_jax.study import statistics, workdir
from spa_jax.study.arms import Chosen
from spa_jax.study.plan import Study
from spa_jax.study.runner import Results, Runner

VERSION = 1
COSTS = ("episodes", "tokens", "seconds", "estimator_seconds")
# Of estimator.json, what a study shows: whether step credit is right comes first.
CREDIT = (
    "subgoal_auc",
    "subgoal_auc_within",
    "first_step_share",
    "step_correlation",
    "advantage_correlation",
    "mse_over_var",
    "auc",
)
_WON, _LOST, _BROKEN = "1", "0", "-"


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a study was started, for its record.

    Attributes:
      preset: the flagfiles that were given, or "".
      argv: of the program.
    """

    preset: str
    argv: Sequence[str]


def record(study: Study, runner: Runner, ran: Ran) -> dict[str, Any]:
    """All that is known so far."""
    games = sorted(
        {task for found in runner.results.values() for part in _parts(found) for task in part}
    )
    by_arm = {chosen.name: _results(study, chosen, runner.results) for chosen in study.arms}
    finished, every = runner.arms()
    return {
        "version": VERSION,
        "preset": ran.preset,
        "command": shlex.join(["python", "-m", "experiments.study", *ran.argv[1:]]),
        **machine.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": _machine(runner.results),
        "base": _base(study, runner.results),
        "seeds": list(study.seeds),
        "games": games,
        "panel_games": study.panel or len(games),
        "reference": study.against,
        "runs": {"finished": finished, "all": every, "failed": dict(runner.failed)},
        "preset_settings": {
            flag: value
            for flag, (field, value) in settings_lib.by_flag(study.preset.settings).items()
            if value != field.default
        },
        "arms": {
            chosen.name: _arm(study, chosen, by_arm[chosen.name], games) for chosen in study.arms
        },
        "differences": {
            name: difference
            for name, results in by_arm.items()
            if name != study.against
            and (difference := _difference(results, by_arm[study.against], games))
        },
    }


def _parts(result: Mapping[str, Any]) -> list[list[str]]:
    return [result[part] for part in ("won", "lost") if part in result]


def _results(study: Study, chosen: Chosen, results: Results) -> dict[int, dict[str, Any]]:
    """What the runs of an arm left, by seed; those of its twin where it has none of its own."""
    found = {}
    for seed in study.seeds:
        run = (
            study.start(seed) if chosen.arm.kind == "base" else study.run(study.twin(chosen), seed)
        )
        name = run.workdir.relative_to(study.files.root).as_posix()
        if name in results:
            found[seed] = results[name]
    return found


def _base(study: Study, results: Results) -> dict[str, Any]:
    """Which base the runs start from: one digest, or one a seed."""
    digests = {
        seed: found["made_from"]["base"]
        for seed in study.seeds
        if (found := results.get(f"{workdir.START}/seed_{seed}"))
    }
    given = study.preset.settings.method.base
    if study.base_per_seed:
        return {"digest": {str(seed): digest for seed, digest in digests.items()}}
    where = given or str(study.base(study.seeds[0]).relative_to(study.files.root))
    return {"digest": next(iter(digests.values()), None), "policy": where}


def _machine(results: Results) -> dict[str, Any] | None:
    """Where the first run ran."""
    return next((found["machine"] for found in results.values()), None)


def outcomes(result: Mapping[str, Any], games: Sequence[str]) -> np.ndarray:
    """[G] 1 where the game was won, 0 where it was lost, nan where it is in neither list."""
    won, lost = set(result["won"]), set(result["lost"])
    return np.array([1.0 if g in won else 0.0 if g in lost else math.nan for g in games])


def _arm(
    study: Study, chosen: Chosen, results: Mapping[int, dict[str, Any]], games: Sequence[str]
) -> dict[str, Any]:
    estimate = statistics.hierarchical([outcomes(found, games) for found in results.values()])
    twin = study.twin(chosen)
    settings = chosen.settings
    return {
        "what": chosen.arm.what,
        "same_as": None if twin is chosen else twin.name,
        "settings": dict(chosen.changed),
        # Whether the credit that its policy learned from is the estimator's.
        "estimator_is_used": chosen.arm.kind == "rounds"
        and settings.credit.credit == "spa"
        and settings.ppo.objective != RFT,
        "success": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "error": estimate.error,
        "grounding": _mean(found["grounding"] for found in results.values()),
        "steps": _mean(found["steps"] for found in results.values()),
        "curve": _curve(list(results.values()), games),
        "credit": _credit([found["credit"] for found in results.values() if found["credit"]]),
        "seeds": {str(seed): _run(found, games) for seed, found in results.items()},
    }


def _run(result: Mapping[str, Any], games: Sequence[str]) -> dict[str, Any]:
    """A run as the record has it: a game's outcome is a character."""
    won = outcomes(result, games)
    known = ~np.isnan(won)
    last = result["curve"][-1]
    return {
        "success": float(won[known].mean()) if known.any() else None,
        "games": int(known.sum()),
        "outcomes": "".join(_BROKEN if math.isnan(w) else _WON if w else _LOST for w in won),
        "grounding": result["grounding"],
        "steps": result["steps"],
        **{name: last[name] for name in COSTS},
        "wall_s": result["wall_s"],
        "curve": [
            {
                "round": point["round"],
                **{name: point[name] for name in COSTS},
                "success": len(point["won"]) / max(1, len(point["won"]) + len(point["lost"])),
                "games": len(point["won"]) + len(point["lost"]),
            }
            for point in result["curve"]
        ],
        "credit": result["credit"],
    }


def _curve(results: Sequence[Mapping[str, Any]], games: Sequence[str]) -> list[dict[str, Any]]:
    """Success on the panel after each round that all seeds have: means, and the interval."""
    found = []
    rounds = [{point["round"]: point for point in result["curve"]} for result in results]
    for number in sorted(set.intersection(*map(set, rounds))) if rounds else []:
        points = [one[number] for one in rounds]
        estimate = statistics.hierarchical([outcomes(point, games) for point in points])
        found.append(
            {
                "round": number,
                **{name: _mean(point[name] for point in points) for name in COSTS},
                "success": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
            }
        )
    return found


def _credit(judged: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Each figure of the estimator, and the ends of its interval: means over the seeds."""
    names = [f"{name}{end}" for name in CREDIT for end in ("", "_low", "_high")]
    means = {name: _mean(one.get(name) for one in judged) for name in names}
    return {name: mean for name, mean in means.items() if mean is not None}


def _difference(
    arm: Mapping[int, dict[str, Any]],
    reference: Mapping[int, dict[str, Any]],
    games: Sequence[str],
) -> dict[str, Any] | None:
    """An arm against the reference, over the seeds that both have."""
    seeds = [seed for seed in arm if seed in reference]
    if not seeds:
        return None
    return statistics.difference(
        [outcomes(arm[seed], games) for seed in seeds],
        [outcomes(reference[seed], games) for seed in seeds],
    ).to_dict()


def _mean(values: Any) -> float | None:
    """The mean of the numbers among them; None without one."""
    numbers = [float(v) for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(numbers)) if numbers else None


# --- in the terminal --------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> str:
    """Arms and differences as a Markdown table."""
    head = f"against {found['reference']}"
    lines = [
        f"| arm | seeds | success | 95% interval | {head} | 95% interval | gained, lost | p |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in found["arms"].items():
        other = found["differences"].get(name)
        cells = [name, str(len(arm["seeds"])), _percent(arm["success"]), _range(arm)]
        cells += (
            [
                _points(other["difference"]),
                _range(other),
                f"{other['gained']}, {other['lost']}",
                f"{other['p']:.2g}",
            ]
            if other
            else ["", "", "", ""]
        )
        lines.append("| " + " | ".join(cells) + " |")
    for name, other in found["differences"].items():
        seen = other["could_see"]
        if math.isfinite(seen):
            lines.append(
                f"{name}: a difference of {100 * seen:.1f} points from {found['reference']} would "
                "be seen four times out of five"
            )
    return "\n".join(lines)


def result_line(found: Mapping[str, Any]) -> str:
    """The last line: the mean success of each arm."""
    rates = {name: arm["success"] for name, arm in found["arms"].items()}
    return "RESULT " + " ".join(f"{name}={rate:.4f}" for name, rate in rates.items())


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if math.isfinite(value) else "-"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}" if math.isfinite(value) else "-"


def _range(found: Mapping[str, Any]) -> str:
    low, high = found["low"], found["high"]
    return f"{100 * low:.1f} to {100 * high:.1f}" if math.isfinite(low) else "-"
