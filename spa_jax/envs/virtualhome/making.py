"""From an initial graph and the steps of a program to a task: what all makers of tasks share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spa_jax.envs.virtualhome.actions import command
from spa_jax.envs.virtualhome.engine import VirtualhomeEngine
from spa_jax.envs.virtualhome.simulator import CHARACTER, Edge, Graph, World
from spa_jax.envs.virtualhome.tasks import Goal, HomeTask, layout_hash

MAX_STEPS = 40  # the paper's

# An action and the class names and node ids of its objects.
Step = tuple[str, Sequence[tuple[str, int]]]

_GOAL_RELATIONS = ("HOLDS_LH", "HOLDS_RH", "INSIDE", "ON")


class LeftOut(Exception):
    """A program that gives no task; the message is the reason, for counting."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A task and its initial graph."""

    task: HomeTask
    graph: Graph


def make_task(
    *,
    title: str,
    description: str,
    nodes: Sequence[Mapping[str, Any]],
    edges: Sequence[Edge],
    steps: Sequence[Step],
    objects: dict[str, int],
    scene: str,
    seed: int,
) -> Made:
    """Executes a program's steps; what they change is the goal.

    Raises:
      LeftOut: if a step cannot be executed, or nothing changes.
    """
    start = World({"nodes": nodes, "edges": edges})
    states = start.states()
    fields = ("id", "class_name", "category", "properties")
    initial: Graph = {
        "nodes": [{key: n[key] for key in fields} | {"states": [*states[n["id"]]]} for n in nodes],
        "edges": start.edges(),
    }
    end = World(initial)
    for action, those in steps:
        if not _executed(end, action, those):
            raise LeftOut("a step of the program cannot be executed")
    goal = difference(start, end)
    if not (goal.states or goal.absent or goal.present):
        raise LeftOut("the program changes nothing")
    program = tuple(command(action, [name for name, _ in those]) for action, those in steps)
    task = HomeTask(
        title=title,
        description=description,
        goal=goal,
        objects=objects,
        program=program,
        scene=scene,
        layout=layout_hash(initial, goal),
        seed=seed,
    )
    return Made(task, initial)


def _executed(world: World, action: str, objects: Sequence[tuple[str, int]]) -> bool:
    try:
        return world.execute(action, objects)
    except AttributeError:  # the library's way to say that an object is in no room
        return False


def difference(before: World, after: World) -> Goal:
    """What differs, as a goal: states, and the edges that say where things are."""
    old, new = before.states(), after.states()
    states = sorted(
        (node.id, node.class_name, new[node.id])
        for node in after.nodes()
        if new[node.id] != old[node.id]
    )
    lost, won = set(before.edges(_GOAL_RELATIONS)), set(after.edges(_GOAL_RELATIONS))
    return Goal(tuple(states), tuple(sorted(lost - won)), tuple(sorted(won - lost)))


def check_worth(made: Made) -> None:
    """Leaves out a task whose goal is only where the character is.

    Raises:
      LeftOut: if it is one: a single "walk to" would solve it.
    """
    goal, nodes = made.task.goal, made.graph["nodes"]
    rooms = {node["id"] for node in nodes if node["category"] == "Rooms"}
    character = made.task.objects[CHARACTER]
    edges = (*goal.absent, *goal.present)
    moved = all(edge[:2] == (character, "INSIDE") and edge[2] in rooms for edge in edges)
    if moved and not goal.states:
        raise LeftOut("the goal is only to be in a room")


def check_solved(made: Made, max_steps: int = MAX_STEPS) -> int:
    """Plays a task's program through the interface; returns the steps that it takes.

    Raises:
      LeftOut: if it does not solve the task in `max_steps` steps.
    """
    engine = VirtualhomeEngine()
    engine.begin(made.task, made.graph)
    program = made.task.program
    for steps, text in enumerate(program[:max_steps], start=1):
        if engine.step(text).success:
            return steps
    if len(program) > max_steps:
        raise LeftOut(f"longer than {max_steps} steps")
    raise LeftOut("the program does not solve it through the interface")
