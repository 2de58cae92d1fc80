"""One self-contained HTML page of a run: what was won, how it learned, what each step got."""

import dataclasses
import datetime
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from spa_jax import evaluation, judging
from spa_jax.report import figures, transcripts
from spa_jax.report.workdir import StageMetrics, Workdir, read_workdir
from spa_jax.run import BASE, SPA
from spa_jax.trajectory import Status, Trajectory

_NAMES = {BASE: "Base (SFT)", SPA: "SPA"}
_STATUS = {
    "success": "won",
    "failure": "ended without the reward",
    "max_steps": "out of steps",
    "max_tokens": "turn too long",
    "context_full": "context full",
    "deadline": "out of time",
}
# Placebo -> how the table of credits calls it.
_PLACEBOS = {
    "uniform": "placebo: the same sum, spread evenly",
    "shuffled": "placebo: the same credits, shuffled",
    "terminal": "placebo: the final reward at the last step",
}


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A figure of a stage: its title and the one or two metrics that it draws."""

    title: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ("",)
    percent: bool = False
    noisy: bool = True


_STAGES = {
    "sft": (
        "Cloning the expert",
        "Supervised fine-tuning on the expert's demonstrations gives the base.",
        (
            _Panel("Loss", ("loss", "valid_loss"), ("training", "held out")),
            _Panel("Learning rate", ("learning_rate",), noisy=False),
            _Panel("Gradient norm", ("grad_norm",)),
        ),
    ),
    "progress": (
        "Learning what a step is worth",
        "The progress estimator gives every step a contribution; its loss is the squared "
        "difference between their sum and the final reward.",
        (
            _Panel("Loss", ("loss",)),
            _Panel(
                "Error on held-out episodes",
                ("valid_mse", "valid_var"),
                ("estimator", "best constant"),
            ),
            _Panel("AUC for success", ("auc",)),
        ),
    ),
    "ppo": (
        "Improving the policy",
        "PPO with a reward a step: its contribution, less a penalty where the environment could "
        "not execute the action.",
        (
            _Panel("Success while training", ("rollout_success",), percent=True),
            _Panel("Reward a step", ("step_reward",)),
            _Panel("KL from the base", ("kl",)),
            _Panel("Entropy", ("entropy",)),
            _Panel("Value loss", ("value_loss",)),
            _Panel("Policy loss", ("policy_loss",)),
        ),
    ),
}


def write_report(workdir: Path, out: Path) -> None:
    """Writes the page of whatever stages have run.

    The page needs nothing but itself: styles and figures are inside it, and it
    asks no server for anything.  Text of episodes is escaped.  It is written
    under a temporary name and renamed.

    Args:
      workdir: the `--workdir` of a run.
      out: the HTML file.

    Raises:
      UserError: if the workdir is missing, empty, or has a broken file.
    """
    # A lone surrogate is valid in JSON but not in UTF-8: it is written as a question mark.
    page = render(read_workdir(Path(workdir))).encode("utf-8", errors="replace")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(page)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def render(run: Workdir) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spa_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "signed": _signed,
        "decimals": _decimals,
        "share": _share,
    }
    summaries = run.summaries
    return environment.get_template("template.html").render(
        name=run.name,
        date=_last_date(run),
        headline=_headline(run, summaries),
        rows=_rows(run, summaries),
        any_missing=any(summary.asked > summary.games for summary in summaries.values()),
        types=_types(summaries),
        endings=_endings(summaries),
        played=run.played,
        stages=_stages(run),
        judgements=_judgements(run),
        shown=_transcript_groups(run.evaluations),
        ran=_ran(run.ran),
    )


def _ran(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ran, for a reader: facts in a line each, and the settings that are no defaults."""
    if not record:
        return None
    commit = record.get("commit")
    state = {True: "", False: ", with changes", None: ""}[record.get("clean")]
    machine, versions = record.get("machine", {}), record.get("versions", {})
    facts = {
        "Command": record.get("command", ""),
        "Started": record.get("start", ""),
        "Commit": f"{commit[:12]}{state}" if commit else "none: an installed package",
        "Machine": ", ".join(
            str(part)
            for part in (
                machine.get("processor"),
                f"{machine.get('cores')} cores",
                f"{machine.get('memory_gib')} GiB",
                f"{machine.get('devices')} x {machine.get('device')}",
            )
        ),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Policy": record.get("policy", ""),
        "Seed": record.get("seed", ""),
    }
    for number, before in enumerate(reversed(record.get("earlier", []))):
        facts[f"Before it, {number + 1}"] = f"{before['start']}  {before['command']}"
    changed = {
        name: setting["value"]
        for name, setting in record.get("settings", {}).items()
        if setting.get("changed")
    }
    return {"facts": facts, "changed": changed, "all": len(record.get("settings", {}))}


def evaluation_name(name: str) -> str:
    """What a reader calls an evaluation: "sft" is the base, "continued_sft" continued SFT."""
    words = (word.upper() if word in ("sft", "spa", "ppo") else word for word in name.split("_"))
    return _NAMES.get(name, " ".join(words))


def _headline(run: Workdir, summaries: Mapping[str, evaluation.Summary]) -> dict[str, Any] | None:
    """Base and SPA side by side; only one of them if the other was not played."""
    shown = {name: summaries[name] for name in (BASE, SPA) if name in summaries}
    if not shown:
        return None
    both = len(shown) == 2
    return {
        "rows": [(name, evaluation_name(name), summary) for name, summary in shown.items()],
        "gain": shown[SPA].success_rate - shown[BASE].success_rate if both else None,
        "paired": evaluation.paired(run.evaluations[BASE], run.evaluations[SPA]) if both else None,
    }


def _rows(run: Workdir, summaries: Mapping[str, evaluation.Summary]) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "name": evaluation_name(name),
            "summary": summary,
            "splits": ", ".join(sorted({t.split for t in run.evaluations[name]})),
        }
        for name, summary in summaries.items()
    ]


def _types(summaries: Mapping[str, evaluation.Summary]) -> dict[str, list[Any]]:
    """Task type -> one proportion (or None) an evaluation; empty if there is just one type."""
    names = sorted({name for summary in summaries.values() for name in summary.by_task_type})
    if len(names) < 2:
        return {}
    return {
        name or "unnamed": [summary.by_task_type.get(name) for summary in summaries.values()]
        for name in names
    }


def _endings(summaries: Mapping[str, evaluation.Summary]) -> dict[str, list[int]]:
    """How games ended -> games an evaluation, in the order of the statuses."""
    return {
        _STATUS[status.value]: [s.by_status.get(status.value, 0) for s in summaries.values()]
        for status in Status
        if any(status.value in summary.by_status for summary in summaries.values())
    }


def _stages(run: Workdir) -> list[dict[str, Any]]:
    """The stages that have run, each with its figures; what has no figure of its own is "more"."""
    stages = []
    for name, (title, text, panels) in _STAGES.items():
        rounds = run.stages[name]
        if not rounds:
            continue
        known = {metric for panel in panels for metric in panel.metrics} | {"update", "time"}
        others = sorted({key for r in rounds for record in r.records for key in record} - known)
        more = [_Panel(other.replace("_", " "), (other,)) for other in others]
        stages.append(
            {
                "title": title,
                "text": text,
                "updates": sum(max(record["update"] for record in r.records) for r in rounds),
                "rounds": len(rounds),
                "minutes": sum(_seconds(r) for r in rounds) / 60,
                "figures": [drawn for panel in panels if (drawn := _figure(panel, rounds))],
                "more": [drawn for panel in more if (drawn := _figure(panel, rounds))],
            }
        )
    return stages


def _figure(panel: _Panel, rounds: Sequence[StageMetrics]) -> dict[str, Any] | None:
    lines: list[figures.Curve] = []
    legend: list[tuple[str, float]] = []
    borders: list[float] = []
    for metric, label in zip(panel.metrics, panel.labels, strict=True):
        line, borders = _line(metric, rounds)
        if line:
            lines.append(line)
            legend.append((label, line[-1][1][-1]))
    if not lines:
        return None
    return {
        "title": panel.title,
        "legend": legend,
        "percent": panel.percent,
        "svg": figures.curves(lines, borders, percent=panel.percent, noisy=panel.noisy),
    }


def _line(metric: str, rounds: Sequence[StageMetrics]) -> tuple[figures.Curve, list[float]]:
    """The finite values of a metric, a part a round, one round after the other."""
    parts: list[tuple[list[float], list[float]]] = []
    borders: list[float] = []
    start = 0
    for one in rounds:
        if one is not rounds[0]:
            borders.append(start)
        points = [
            (start + record["update"], record[metric])
            for record in one.records
            if math.isfinite(record.get(metric, math.nan))
        ]
        if points:
            parts.append(([x for x, _ in points], [y for _, y in points]))
        start += max(record["update"] for record in one.records)
    return parts, borders


def _judgements(run: Workdir) -> list[dict[str, Any]]:
    """The estimator on each evaluation that it annotated; a few episodes say nothing of it."""
    judged = []
    for name, trajectories in run.evaluations.items():
        annotated = [t for t in trajectories if t.status is not Status.ENV_ERROR and t.steps]
        if not annotated or not all(map(transcripts.is_annotated, annotated)):
            continue
        sums = [transcripts.running_sum(t) for t in annotated]
        wins = [s for s, t in zip(sums, annotated, strict=True) if t.success]
        failures = [s for s, t in zip(sums, annotated, strict=True) if not t.success]
        judged.append(
            {
                "name": evaluation_name(name),
                "wins": len(wins),
                "failures": len(failures),
                "credits": _judged_credits(run, name, annotated),
                "figures": evaluation.estimator_validity(
                    [s[-1] for s in sums],
                    [t.final_reward for t in annotated],
                    [np.diff(s).tolist() for s in sums],
                ),
                "histogram": figures.outcome_histogram(
                    [s[-1] for s in wins], [s[-1] for s in failures]
                ),
                "course": figures.running_sums(wins, failures),
            }
        )
    return judged


def _judged_credits(
    run: Workdir, name: str, annotated: Sequence[Trajectory]
) -> list[tuple[str, Mapping[str, float]]]:
    """(whose credit, its figures): the estimator's with intervals, and the placebos' as chance."""
    given, advantages = judging.contributions(annotated), run.advantages.get(name)
    fakes = judging.placebos(given, [t.final_reward for t in annotated])
    found: list[tuple[str, Mapping[str, float]]] = [
        ("estimator", judging.judge_episodes(annotated, given, advantages))
    ]
    if name in run.critic:
        found.append(("ridge critic: differences of its values", run.critic[name]))
    for kind, title in _PLACEBOS.items():
        figures = judging.judge_episodes(annotated, fakes[kind], advantages, draws=0)
        found.append((title, figures))
    return found


def _transcript_groups(evaluations: Mapping[str, Sequence[Trajectory]]) -> dict[str, Any] | None:
    """Transcripts of SPA's evaluation; of the last one where SPA has not been evaluated."""
    if not evaluations:
        return None
    name = SPA if SPA in evaluations else list(evaluations)[-1]
    wins, failures = evaluation.examples(evaluations[name])
    scale = transcripts.bar_scale([*wins, *failures])
    return {
        "name": evaluation_name(name),
        "scale": scale,
        "groups": [
            (title, [transcripts.view(t, scale) for t in group])
            for title, group in (("Won", wins), ("Lost", failures))
            if group
        ],
    }


def _seconds(stage: StageMetrics) -> float:
    """Wall-clock seconds of a stage, without the pauses in which nothing ran.

    A run that was stopped overnight and resumed has one long gap between two
    lines; no gap counts for more than ten typical ones.
    """
    times = _times(stage)
    gaps = np.diff(np.asarray(times, np.float64))
    if not len(gaps):
        return 0.0
    return float(np.minimum(gaps, 10 * np.median(gaps)).sum())


def _last_date(run: Workdir) -> str | None:
    """The day (UTC) of the last line of metrics."""
    times = [time for rounds in run.stages.values() for stage in rounds for time in _times(stage)]
    if not times:
        return None
    day = datetime.datetime.fromtimestamp(max(times), datetime.UTC)
    return f"{day.day} {day:%B %Y}"


def _times(stage: StageMetrics) -> list[float]:
    times = [record.get("time", math.nan) for record in stage.records]
    return [time for time in times if math.isfinite(time)]


def _or_dash(write: Callable[..., str]) -> Callable[..., str]:
    """A number that is not there, or is not one, is a dash."""

    def filter_(value: float | None, *args: Any) -> str:
        return "\N{EN DASH}" if value is None or not math.isfinite(value) else write(value, *args)

    return filter_


@_or_dash
def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


@_or_dash
def _decimals(value: float, digits: int = 2) -> str:
    if value and digits and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


@_or_dash
def _signed(value: float, digits: int = 2) -> str:
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "\N{MINUS SIGN}")


@_or_dash
def _share(value: float) -> str:
    """A share of 1 as a CSS percentage, kept inside its box."""
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"
