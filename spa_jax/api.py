"""spa_jax from Python: a policy plays, an estimator says what each step contributed.

    import spa_jax as spa

    policy = spa.load("runs/quickstart/sft/policy")
    episode = policy.play(Guess, "number_7")        a class of your own (docs/environments.md)
    episode = spa.credit(episode, "runs/quickstart")
    episode                                         in a notebook: the text, credit beside it
    episode.plot()
    spa.read("runs/quickstart").groupby("played_by").success.mean()

The stages of a run are functions too: `spa_jax.stages`, each of a `spa_jax.run.Run`.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jinja2

from spa_jax import annotation, play, provenance, rollout, store
from spa_jax import policy as policy_lib
from spa_jax import run as run_lib
from spa_jax.config import RowsConfig, SamplingConfig
from spa_jax.envs.client import EnvClient
from spa_jax.envs.inprocess import InProcessClient
from spa_jax.errors import UserError
from spa_jax.models.io import tensors
from spa_jax.report import transcripts
from spa_jax.training import scoring
from spa_jax.trajectory import Status, Step, Trajectory

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

_HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_EPISODE = _HTML.from_string("""\
<div style="max-width: 60em">
<p><b>{{ t.task }}</b>: {{ t.status.value }}, R = {{ "%.2f" | format(t.final_reward) }}
{% if view.total is not none %}, estimated {{ "%.2f" | format(view.total) }}{% endif %}</p>
<p style="white-space: pre-wrap">{{ t.instruction }}</p>
<table style="width: 100%; border-collapse: collapse">
{% for step in view.steps %}
<tr style="border-top: 1px solid #8884; vertical-align: top">
<td style="text-align: left; white-space: pre-wrap">{{ step.observation }}
<b>&gt; {{ step.action or step.thought }}</b>
{%- if not step.grounded %} (not executed){% endif %}</td>
<td style="width: 9em; text-align: left">
{% if step.contribution %}
<div style="height: 0.8em; width: {{ "%.1f" | format(50 * step.contribution.width) }}%;
 margin-left: {{ "%.1f" | format(50 - 50 * step.contribution.width
 if step.contribution.value < 0 else 50) }}%;
 background: {{ "#c0392b" if step.contribution.value < 0 else "#2471a3" }}"></div>
{{ "%+.3f" | format(step.contribution.value) }}
{% endif %}</td></tr>
{% endfor %}
</table>
<p style="white-space: pre-wrap">{{ t.final_observation }}</p>
</div>
""")


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode that was played.

    Attributes:
      trajectory: its record.
    """

    trajectory: Trajectory

    @property
    def success(self) -> bool:
        """Whether the task was solved."""
        return self.trajectory.success

    @property
    def steps(self) -> tuple[Step, ...]:
        """What was read, written and done, step by step."""
        return self.trajectory.steps

    @property
    def contributions(self) -> list[float]:
        """c_k of each step.

        Raises:
          UserError: nobody gave it credit yet.
        """
        if not transcripts.is_annotated(self.trajectory):
            raise UserError("the episode has no credit yet: give it some with spa_jax.credit")
        return [cast(float, step.contribution) for step in self.steps]

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draws each step's contribution, and their running sum.

        Args:
          axes: where; None: on a new figure.

        Raises:
          UserError: nobody gave it credit yet.
        """
        from matplotlib import pyplot

        given = self.contributions
        if axes is None:
            axes = pyplot.figure(figsize=(8, 0.3 * len(given) + 1.5)).subplots()
        numbers = range(1, len(given) + 1)
        colours = ["tab:red" if c < 0 else "tab:blue" for c in given]
        axes.barh(list(numbers), given, color=colours)
        sums = transcripts.running_sum(self.trajectory)
        axes.plot(sums[1:], list(numbers), color="0.4", marker=".", label="sum")
        labels = [f"{k}  {step.action[:40]}" for k, step in zip(numbers, self.steps, strict=True)]
        axes.set_yticks(list(numbers), labels)
        axes.invert_yaxis()
        axes.axvline(0, color="0.7", linewidth=0.8)
        axes.set_xlabel("contribution")
        axes.legend()
        return axes

    def _repr_html_(self) -> str:
        scale = transcripts.bar_scale([self.trajectory])
        return _EPISODE.render(t=self.trajectory, view=transcripts.view(self.trajectory, scale))

    def __repr__(self) -> str:
        t = self.trajectory
        return (
            f"<Episode {t.task}: {t.status.value} in {len(t.steps)} steps, R = {t.final_reward:g}>"
        )


class Agent:
    """A policy that plays.

    Attributes:
      policy: its weights, tokenizer and chat format.
      sampling: how it writes.
    """

    def __init__(self, policy: policy_lib.Policy, sampling: SamplingConfig, seed: int):
        self.policy, self.sampling, self._seed = policy, sampling, seed

    @functools.cached_property
    def _engine(self) -> Any:
        return play.make_engine(self.policy, self.sampling, 1, self._seed)

    def play(
        self,
        env: type,
        task: str = "",
        *,
        split: str = "",
        seed: int = 0,
        attempt: int = 0,
        max_steps: int = 40,
    ) -> Episode:
        """Plays a task of a class of your own, in this process.

        Args:
          env: the class (docs/environments.md).
          task: its name; "": the first of the split.
          split: of the task; "": the first that has it.
          seed: of the task.
          attempt: another number plays it with other random tokens.
          max_steps: that the episode may take.

        Raises:
          UserError: there is no such task, or its first prompt is longer than the context.
        """
        client = InProcessClient(env)
        found = [t for s in ([split] if split else client.splits()) for t in client.tasks(s)]
        chosen = next((t for t in found if task in ("", t.task)), None)
        if chosen is None:
            raise UserError(
                f"{env.__name__} has no task {task!r}{f' in {split!r}' if split else ''}"
            )
        played: list[Trajectory] = []
        player = rollout.Player(
            env="custom",
            policy=str(self.policy.folder),
            version=self.policy.version,
            max_steps=max_steps,
            prompt="",
            max_retries=0,
        )
        rollout.Rollout(
            self._engine,
            self.policy.chat,
            cast(EnvClient, client),
            player=player,
            on_done=played.append,
        ).play([rollout.Job(chosen, seed, attempt)])
        (trajectory,) = played
        if trajectory.status is Status.ENV_ERROR:
            raise UserError(f"{env.__name__} failed: {trajectory.final_observation}")
        return Episode(trajectory)


def load(
    folder: str | os.PathLike[str],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    context_length: int = 2048,
    seed: int = 0,
) -> Agent:
    """A policy of a folder (or a GGUF file, or a model of the hub), ready to play.

    Args:
      folder: of the policy.
      temperature: that it samples at; 0 is greedy.
      max_new_tokens: of a turn.
      context_length: of an episode; no longer than the model's.
      seed: of what it samples.

    Raises:
      UserError: the folder holds no policy that can be read.
    """
    policy = policy_lib.load(folder)
    longest = min(context_length, policy.config.max_position)
    sampling = SamplingConfig(
        slots=1,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        context_length=longest,
    )
    return Agent(policy, sampling, seed)


def credit(episode: Episode, estimator: str | os.PathLike[str]) -> Episode:
    """The same episode with what each step contributed, as a run's estimator says.

    Args:
      episode: one that its policy played.
      estimator: the workdir of a run, whose last estimator is taken; or the folder of one,
        W/iteration_I/progress.

    Raises:
      UserError: there is no estimator, or the run no base policy whose states it reads.
    """
    folder = pathlib.Path(estimator)
    workdir = folder
    if tensors.heads_file(folder):
        workdir = folder.parent.parent
    else:
        rounds = [r.progress for r in run_lib.at(workdir).rounds()]
        made = [path for path in rounds if tensors.heads_file(path)]
        if not made:
            raise UserError(f"{workdir}: holds no estimator; run train_progress first")
        folder = made[-1]
    run = run_lib.at(workdir)
    base = _base(str(provenance.made_with(run.json).get("base") or run.base))
    t = episode.trajectory
    length = len(t.token_ids)
    rows = RowsConfig(
        row_length=min(_power(length + 512), base.config.max_position),
        policy_slots=_power(sum(k >= 0 for k in t.step_id)),
        step_slots=_power(len(t.steps)),
        rows_per_device=1,
    )
    temperature = (t.sampling.temperature if t.sampling else 1.0) or 1.0
    scores = scoring.score(
        base.config,
        {"policy": base.params},
        [t],
        rows,
        temperature=temperature,
        title="",
        chat=base.chat,
    )
    given, expected = annotation.contributions(base, folder, [t], scores, rows)
    steps = tuple(
        dataclasses.replace(step, contribution=float(c))
        for step, c in zip(t.steps, given[0], strict=False)
    )
    return Episode(dataclasses.replace(t, steps=steps, expected=float(expected[0])))


@functools.lru_cache(maxsize=2)
def _base(folder: str) -> policy_lib.Policy:
    return policy_lib.load(folder)


def _power(number: int) -> int:
    """The next power of two, from 64: few shapes are compiled."""
    return max(64, 1 << max(0, number - 1).bit_length())


def read(workdir: str | os.PathLike[str]) -> "pandas.DataFrame":
    """Every episode of a run as a table: a row an episode.

    Columns: played_by ("round_0" of exploration, or the evaluation's name), task, task_type, split,
    seed, attempt, status, success, final_reward, steps, grounded (share of the steps), predicted
    (what the estimator expected; nan without), trajectory (the record itself).

    Args:
      workdir: of the run.

    Raises:
      UserError: there is no episode, or pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError("spa_jax.read needs pandas: pip install 'spa_jax[notebook]'") from error
    run = run_lib.at(pathlib.Path(workdir))
    files = {f"round_{i}": _annotated(r.annotated, r.episodes) for i, r in enumerate(run.rounds())}
    if run.evaluations.is_dir():
        files |= {f.name: f / run_lib.EPISODES for f in sorted(run.evaluations.iterdir())}
    rows = [
        _row(name, t) for name, path in files.items() if path.exists() for t in store.read(path)
    ]
    if not rows:
        raise UserError(f"{workdir}: holds no episode of a run")
    return pandas.DataFrame(rows)


def _annotated(annotated: pathlib.Path, explored: pathlib.Path) -> pathlib.Path:
    return annotated if annotated.exists() else explored


def _row(name: str, t: Trajectory) -> dict[str, Any]:
    given = transcripts.is_annotated(t)
    grounded: Sequence[bool] = [step.grounded for step in t.steps]
    return {
        "played_by": name,
        "task": t.task,
        "task_type": t.task_type,
        "split": t.split,
        "seed": t.seed,
        "attempt": t.attempt,
        "status": t.status.value,
        "success": t.success,
        "final_reward": t.final_reward,
        "steps": len(t.steps),
        "grounded": sum(grounded) / len(grounded) if grounded else float("nan"),
        "predicted": t.predicted if given else float("nan"),
        "trajectory": t,
    }
