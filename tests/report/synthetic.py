"""A workdir as a whole run leaves it, made in a moment: text from a toy household."""

import dataclasses
import json
import math
import pathlib

import numpy as np

from spa_jax import store
from spa_jax.training.metrics import METRICS_FILE
from spa_jax.trajectory import Sampling, Status, Step, Trajectory

HOSTILE = (
    "<script>alert('owned')</script> </details></main> <img src=x onerror=alert(1)> "
    "{{ 7 * 7 }} &amp; \"quoted\" 'single' \ud800 \x1b[31m"
)
_PLACES = ("drawer 1", "cabinet 2", "shelf 1", "countertop 1", "fridge 1", "sidetable 2", "desk 1")
_THINGS = ("mug 1", "apple 2", "book 1", "plate 3", "cd 1")
_TYPES = (
    "pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place",
)


def make_workdir(
    folder: pathlib.Path, *, games: int = 120, rounds: int = 2, updates: int = 60
) -> pathlib.Path:
    """Every file that the report reads, filled by a seeded generator."""
    rng = np.random.default_rng(7)
    for name, number in (("train", games), ("valid", games // 4)):
        expert = [episode(rng, i, 1.0, policy="expert", split="train") for i in range(number)]
        store.write(folder / "demos" / name / "trajectories.jsonl", expert)
    write_metrics(folder / "sft", sft_metrics(rng, updates * 4))
    for i in range(rounds):
        here = folder / f"iteration_{i}"
        explored = [episode(rng, j, 0.4 + 0.2 * i, split="train") for j in range(games)]
        store.write(here / "explore" / "trajectories.jsonl", explored)
        write_metrics(here / "progress", progress_metrics(rng, updates))
        write_metrics(here / "ppo", ppo_metrics(rng, updates, 0.42 + 0.16 * i))
    for name, skill in (("sft", 0.45), ("spa", 0.72), ("continued_sft", 0.48)):
        played = [episode(rng, j, skill, annotate=name != "continued_sft") for j in range(games)]
        if name == "spa":
            played[5] = dataclasses.replace(played[5], status=Status.ENV_ERROR)
        store.write(folder / "eval" / name / "trajectories.jsonl", played)
    return folder


def episode(
    rng: np.random.Generator,
    number: int,
    skill: float,
    *,
    policy: str = "policy",
    split: str = "valid_unseen",
    annotate: bool = False,
) -> Trajectory:
    """One game: a search, a find, and (if it is won) the thing where it belongs."""
    thing, goal = _THINGS[number % len(_THINGS)], _PLACES[3 + number % 4]
    won = bool(rng.random() < skill)
    count = int(rng.integers(5, 13)) if won else 20
    found = count - 2 if won else (12 if rng.random() < 0.4 else 99)
    observation = (
        "You are in the middle of a room. Looking quickly around you, you see "
        + ", ".join(f"a {place}" for place in _PLACES)
        + f".\nYour task is to: put a {thing[:-2]} in/on {goal[:-2]}."
    )
    steps, progress = [], 0.0
    for k in range(count):
        place = str(rng.choice(_PLACES))
        action, answer, grounded = f"go to {place}", f"On the {place}, you see nothing.", True
        if rng.random() < 0.15:
            action, answer, grounded = f"grab {thing} now", "Nothing happens.", False
        if k == found:
            action, answer = f"take {thing} from {place}", f"You pick up the {thing} from {place}."
            grounded = True
        if won and k == count - 1:
            action, answer = f"put {thing} in/on {goal}", f"You put the {thing} in/on the {goal}."
            grounded = True
        if k == found or (won and k == count - 1):
            progress += 0.5
        value = 0.02 + 0.06 * rng.standard_normal() + (0.35 if k in (found, count - 1) else 0)
        value -= 0.04 if not won else 0.0
        c = float(value) if annotate else None
        steps.append(Step(
            observation=observation,
            response=f"Thought: the {thing[:-2]} may be there, I should look.\nAction: {action}",
            action=action,
            grounded=grounded,
            contribution=c,
            reward=None if c is None else c + 0.5 * (grounded - 1),
            progress=progress,
        ))
        observation = answer
    return Trajectory(
        env="alfworld", task=f"{_TYPES[number % 6]}-{thing[:-2]}/trial_{number:05d}", split=split,
        seed=0, attempt=0, policy=policy,
        status=Status.SUCCESS if won else (Status.MAX_STEPS if number % 5 else Status.CONTEXT_FULL),
        final_reward=float(won), instruction="Interact with a household to solve a task.",
        steps=tuple(steps), final_observation=observation, initial_progress=0.0,
        task_type=_TYPES[number % 6],
        sampling=Sampling(temperature=0.0, max_new_tokens=48),
    )


def write_metrics(folder: pathlib.Path, records: list[dict]) -> None:
    """The lines as MetricsWriter writes them, at times that the generator chose."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


def sft_metrics(rng: np.random.Generator, updates: int) -> list[dict]:
    records = []
    for n in range(1, updates + 1):
        loss = 0.25 + 2.2 * math.exp(-n / (updates / 6)) + 0.05 * rng.standard_normal()
        record = {"update": n, "time": 1.79e9 + 2.1 * n, "loss": loss, "grad_norm": 1 + loss,
                  "learning_rate": 2e-4 * min(1, n / 10) * (1 - n / (updates + 1)),
                  "tokens_per_second": 2300 + 60 * rng.standard_normal(), "valid_loss": None}
        if n % 20 == 0:
            record["valid_loss"] = 0.33 + 2.2 * math.exp(-n / (updates / 6))
        records.append(record)
    return records


def progress_metrics(rng: np.random.Generator, updates: int) -> list[dict]:
    records = []
    for n in range(1, updates + 1):
        fall = math.exp(-n / (updates / 5))
        record = {"update": n, "time": 1.79e9 + 900 + 1.5 * n,
                  "loss": 0.09 + 0.16 * fall + 0.015 * rng.standard_normal()}
        if n % 10 == 0:
            record |= {"valid_mse": 0.11 + 0.14 * fall, "valid_var": 0.246}
            record["auc"] = 0.93 - 0.4 * fall
        records.append(record)
    return records


def ppo_metrics(rng: np.random.Generator, updates: int, start: float) -> list[dict]:
    records = []
    for n in range(1, updates + 1):
        success = start + 0.2 * (1 - math.exp(-2 * n / updates))
        noise = rng.standard_normal(4)
        records.append({
            "update": n, "time": 1.79e9 + 1500 + 6.0 * n,
            "rollout_success": float(np.clip(success + 0.07 * noise[0], 0, 1)),
            "step_reward": success / 12 + 0.01 * noise[1],
            "kl": 0.0009 * n + 0.001 * abs(noise[2]),
            "entropy": 0.5 - 0.003 * n + 0.02 * noise[3],
            "value_loss": 0.12 * math.exp(-n / 20) + 0.03,
            "policy_loss": -0.01 + 0.004 * noise[1], "clip_fraction": 0.05 + 0.01 * noise[2],
            "explained_variance": 0.6 * (1 - math.exp(-n / 15)), "mean_ratio": 1 + 0.002 * noise[0],
        })
    return records
