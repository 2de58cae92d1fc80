"""Episodes for other people's tools: chat messages, or ATIF; as JSON lines, or Parquet.

messages    {"id": task, "messages": [{"role": "system", "content": instruction},
                                      {"role": "user", "content": observation},
                                      {"role": "assistant", "content": what the policy wrote}, ...],
             "reward": R, "success": ..., "steps": [{"action", "grounded", "contribution", ...}]}
            `import_demos` reads it back, and so do TRL and datasets
atif        the Agent Trajectory Interchange Format, version 1.4, a document a line
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal

from spa_jax import files, parquet
from spa_jax.errors import UserError
from spa_jax.trajectory import Step, Trajectory

Format = Literal["messages", "atif"]
ATIF = "ATIF-v1.4"


def write(path: pathlib.Path, trajectories: Sequence[Trajectory], form: Format) -> None:
    """Writes episodes, whole or not at all.

    Args:
      path: .jsonl, or .parquet.
      trajectories: the episodes.
      form: of a record.

    Raises:
      UserError: the file is there, has another ending, or is Parquet and pyarrow is missing.
    """
    if path.exists():
        raise UserError(f"{path} is there already; choose another file, or remove it")
    make = {"messages": messages, "atif": atif}[form]
    records = [make(t) for t in trajectories]
    if path.suffix == parquet.ENDING:
        parquet.write(path, records)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files.write_text(path, "".join(lines))
    else:
        raise UserError(f"{path}: ends neither in .jsonl nor in .parquet; give one of them")


def messages(trajectory: Trajectory) -> dict[str, Any]:
    """An episode as chat messages, with what is known of it and of its steps."""
    turns = [_turn("system", trajectory.instruction)] if trajectory.instruction else []
    for step in trajectory.steps:
        turns += [_turn("user", step.observation), _turn("assistant", step.response)]
    if trajectory.final_observation:
        turns.append(_turn("user", trajectory.final_observation))
    return {
        "id": trajectory.task,
        "messages": turns,
        "reward": trajectory.final_reward,
        "success": trajectory.success,
        **_about(trajectory),
        "steps": [_of_step(step) for step in trajectory.steps],
    }


def atif(trajectory: Trajectory) -> dict[str, Any]:
    """An episode in ATIF: an action is a message, and what came of it its observation."""
    seen = [step.observation for step in trajectory.steps[1:]] + [trajectory.final_observation]
    opening = [("system", trajectory.instruction)] if trajectory.instruction else []
    if trajectory.steps:
        opening.append(("user", trajectory.steps[0].observation))
    steps: list[dict[str, Any]] = [
        {"step_id": number, "source": source, "message": text}
        for number, (source, text) in enumerate(opening, 1)
    ]
    for k, (step, after) in enumerate(zip(trajectory.steps, seen, strict=True)):
        one: dict[str, Any] = {
            "step_id": len(steps) + 1,
            "source": "agent",
            "message": step.response,
            "observation": {"results": [{"content": after}]},
            "extra": _of_step(step),
        }
        if trajectory.token_ids:
            written = [at for at, owner in enumerate(trajectory.step_id) if owner == k]
            one["metrics"] = {
                "completion_tokens": len(written),
                "completion_token_ids": [trajectory.token_ids[at] for at in written],
                "logprobs": [trajectory.log_probs[at] for at in written],
            }
        steps.append(one)
    return {
        "schema_version": ATIF,
        "session_id": "/".join(map(str, (trajectory.split, *trajectory.key))),
        "agent": {
            "name": "spa_jax",
            "version": metadata.version("spa_jax"),
            "model_name": trajectory.policy,
        },
        "steps": steps,
        "final_metrics": {"total_steps": len(steps)},
        "extra": {
            "reward": trajectory.final_reward,
            "success": trajectory.success,
            "task": trajectory.task,
            **_about(trajectory),
        },
    }


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _about(trajectory: Trajectory) -> dict[str, Any]:
    """Which episode it is."""
    names = ("env", "split", "task_type", "seed", "attempt", "policy")
    return {name: getattr(trajectory, name) for name in names} | {
        "status": trajectory.status.value,
        "initial_progress": trajectory.initial_progress,
        "expected": trajectory.expected,
    }


def _of_step(step: Step) -> dict[str, Any]:
    texts = {"observation", "response"}
    return {name: value for name, value in dataclasses.asdict(step).items() if name not in texts}
