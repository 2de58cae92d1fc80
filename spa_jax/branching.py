"""The policy truth of an evaluation's steps: branches are played, and every credit judged by them.

Writes W/truth/{branches.jsonl,truth.json,credits.json}.  A branch is on disk when its line is, so
a run that was killed plays none twice; more episodes or branches are added to those that are there.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from spa_jax import (
    annotation,
    continuations,
    evaluation,
    files,
    judging,
    method,
    provenance,
    store,
    truth,
)
from spa_jax import episodes as episodes_lib
from spa_jax import policy as policy_lib
from spa_jax.config import fit_attention
from spa_jax.errors import UserError
from spa_jax.rl import critic
from spa_jax.run import BASE, EPISODES, Run
from spa_jax.stage_config import ExploreConfig
from spa_jax.stages import annotate, evaluate
from spa_jax.training import estimator_data, ppo_data
from spa_jax.trajectory import Trajectory
from spa_jax.truth import Key, StepTruth

_ESTIMATOR, _CRITIC, _TRUTH = "estimator", "ridge critic", "true advantage"

Figures = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """What came of it.

    Attributes:
      told: the truth of each chosen episode's steps, by its key.
      reliability: see `truth.reliability`.
      decided_at_start: see `truth.decided_at_start`.
      figures: whose credit -> `judging.judge` of it.
    """

    told: Mapping[Key, Sequence[StepTruth]]
    reliability: float
    decided_at_start: float
    figures: Figures


def run(run: Run, *, split: str, episodes: int, branches: int) -> Judged:
    """Finds the true advantages of the base policy's episodes and judges every credit by them.

    Args:
      run: a run with a base policy.
      split: whose games; those of another split than the evaluated one are played first.
      episodes: how many of the evaluation's episodes get branches, chosen by a hash of their
        keys; 0: all.
      branches: from before each step.

    Raises:
      UserError: the truth in W/truth is another policy's or was found with other settings, the
        policy is greedy, or the environment does not play an episode again as it was.
    """
    _check(run, branches)
    env = run.settings.env
    if not (env.data or env.env_address) and run.games.is_dir():
        run = run.on_its_games()
    name = _evaluated(run, split)
    played = episodes_lib.completed(store.read(run.evaluation(name) / EPISODES))
    chosen = evaluation.by_hash(played)[: episodes or None]
    if not chosen:
        raise UserError(f"{run.evaluation(name) / EPISODES}: holds no episode to judge")
    provenance.check_stage(
        run,
        "truth",
        run.truth,
        inputs={"base policy": provenance.policy_digest(run.base), "episodes": _digest(played)},
        settings={"split": split, "temperature": run.settings.method.eval_temperature},
        flags={"temperature": "eval_temperature"},
    )
    rewards = continuations.play(
        run,
        chosen,
        policy=str(run.base),
        count=branches,
        temperature=run.settings.method.eval_temperature,
        path=run.branches,
        log=run.truth / "server.log",
    )
    told = {t.key: truth.estimate(rewards[t.key], t.final_reward) for t in chosen}
    content = truth.to_json(told, evaluation=name, split=split, branches=branches)
    files.write_json(run.advantages, content)
    figures = judge(run, name)
    files.write_json(run.credits, {"evaluation": name, "credits": figures})
    if name == BASE and _ESTIMATOR in figures:
        files.write_json(run.estimator, method.judge_estimator(run))
    return Judged(told, content["reliability"], content["decided_at_start"], figures)


def _check(run: Run, branches: int) -> None:
    if not 2 <= branches < continuations.MOST:
        raise UserError(f"--branches={branches} must be at least 2 and below {continuations.MOST}")
    if run.settings.method.eval_temperature == 0:
        raise UserError(
            "--eval_temperature=0: a greedy policy goes on in one way only, so no step has an "
            "advantage; evaluate at a temperature above 0"
        )


def _evaluated(run: Run, split: str) -> str:
    """The name of the base policy's evaluation on the split, which is played unless it is there."""
    if split == run.settings.data.heldout_split:
        evaluate.run(run, BASE, policy=str(run.base))
        return BASE
    name = f"{BASE}_{split}"
    temperature = run.settings.method.eval_temperature
    evaluate.play_games(
        run,
        name,
        policy=str(run.base),
        games=ExploreConfig(split=split, games=run.settings.data.heldout_games, rollouts=1),
        sampling=dataclasses.replace(run.settings.sampling, temperature=temperature),
        flags={"games": "heldout_games", "temperature": "eval_temperature"},
    )
    return name


def _digest(played: Iterable[Trajectory]) -> str:
    """Names episodes by what was read and written in them, annotated or not."""
    return hashlib.sha256(repr([(t.key, t.token_ids) for t in played]).encode()).hexdigest()[:16]


def judge(run: Run, name: str) -> Figures:
    """Every credit of an evaluation's episodes, judged by both truths: whose -> its figures.

    The estimator's, if the run has one; the placebos; the differences of a ridge critic's values;
    and the true advantages themselves, which have no other truth than the subgoals.

    Args:
      run: the run, with truth.json.
      name: of the evaluation.
    """
    path = run.evaluation(name) / EPISODES
    played = _annotated(run, name)
    advantages = truth.read_advantages(run.advantages, name)
    given = judging.contributions(played)
    credits: dict[str, list[np.ndarray]] = {}
    fakes = judging.placebos(given, [t.final_reward for t in played])
    if all(step.contribution is not None for t in played for step in t.steps):
        credits[_ESTIMATOR] = given
    else:
        fakes = {"terminal": fakes["terminal"]}  # the others share what an estimator gave
    if len({t.task for t in played}) > 1:
        credits[_CRITIC] = _critic_credit(run, path, played)
    credits |= fakes
    figures = {who: judging.judge_episodes(played, c, advantages) for who, c in credits.items()}
    told = [t for t in played if t.key in advantages]
    figures[_TRUTH] = judging.judge_episodes(told, [advantages[t.key] for t in told])
    return figures


def _annotated(run: Run, name: str) -> list[Trajectory]:
    """The evaluation's episodes, annotated if the run has an estimator."""
    played = episodes_lib.completed(store.read(run.evaluation(name) / EPISODES))
    if all(step.contribution is not None for t in played for step in t.steps):
        return played
    try:
        last = run.round(run.settings.method.iterations - 1)
        annotation.head_folder(last.progress, str(run.base))
    except UserError as error:
        print(f"no estimator is judged: {error}", flush=True)
        return played
    return annotate.run_evaluation(run, name)


def _critic_credit(run: Run, path: pathlib.Path, played: Sequence[Trajectory]) -> list[np.ndarray]:
    """What --critic=ridge pays a step for: r_k + V_{k+1} - V_k, with r the final reward at the end.

    The values are fitted on the other tasks' episodes of the evaluation.
    """
    settings = run.settings
    chat_format = policy_lib.recorded_chat_format(path.parent)
    compute = fit_attention(settings.compute, settings.rows)
    policy = policy_lib.load(str(run.base), chat_format, compute)
    scores = estimator_data.scores_of(policy, path, played, settings.rows)
    rewards = estimator_data.final_rewards(played)
    fold, folds = ppo_data.folds_of(played, "--critic=ridge", "more --heldout_games")
    values = critic.cross_fitted_values(
        scores.value_hidden,
        rewards[:, None] * scores.step_mask,
        scores.step_mask,
        fold,
        folds=folds,
    )
    return [
        np.diff(np.append(v[: len(t.steps)], t.final_reward)).astype(np.float64)
        for t, v in zip(played, np.asarray(values), strict=True)
    ]


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """A table of credits and their figures, each with its interval, for a terminal."""
    columns = (*judging.FIGURES, *judging.ADVANTAGE_FIGURES[:2])
    cells = [["credit", *(name.replace("_", " ") for name in columns)]]
    for who, found in figures.items():
        cells.append([who, *(_with_interval(found, name) for name in columns)])
    return evaluation.markdown(cells)


def _with_interval(found: Mapping[str, float], name: str) -> str:
    value = found.get(name, float("nan"))
    if not np.isfinite(value):
        return "-"
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
