"""One VirtualHome task on the evolving-graph simulator.  Only environment processes import this."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spa_jax.envs.contract import Engine
from spa_jax.envs.protocol import Observation
from spa_jax.envs.virtualhome import observe
from spa_jax.envs.virtualhome import prompt as prompts
from spa_jax.envs.virtualhome.actions import Objects, parse
from spa_jax.envs.virtualhome.expert import Expert
from spa_jax.envs.virtualhome.simulator import World, states_of, untangle
from spa_jax.envs.virtualhome.tasks import Goal, HomeTask, read_task
from spa_jax.errors import UserError


def share_reached(goal: Goal, world: World) -> float:
    """The share of a goal's conditions that hold, in [0, 1]; 1 exactly when all do.

    A condition is the states of one node, which are exactly those, or one edge that must hold, or
    must not.
    """

    def has_states(node_id: int, name: str, states: tuple[str, ...]) -> bool:
        node = world.node(node_id)
        return node is not None and node.class_name == name and states_of(node) == states

    held = [has_states(*state) for state in goal.states]
    held += [world.has_edge(edge) for edge in goal.present]
    held += [not world.has_edge(edge) for edge in goal.absent]
    return sum(held) / len(held) if held else 1.0


class VirtualhomeEngine(Engine[Path]):
    """Plays tasks one after the other; `reset`, then `step` until done."""

    def reset(
        self,
        place: Path,
        *,
        task: str = "",
        prompt: str = "paper",
        expert: bool = False,
        seed: int = 0,
    ) -> Observation:
        """Starts the task at `place`.

        Args:
          place: what `tasks.TaskIndex.place` gave.
          task: the name that observations carry.
          prompt: which instruction the policy is given, one of `prompt.PROMPTS`.
          expert: whether each observation carries the expert's next action.
          seed: not looked at: these tasks have nothing random.

        Raises:
          UserError: if the task's files are missing or broken, it has no program and the expert
            is wanted, the prompt is unknown, or the simulator is not installed.
        """
        instruction = prompts.instruction(prompt)
        home_task, graph = read_task(place)
        if expert and not home_task.program:
            raise UserError(f"{place} has no program: there is no expert for it")
        return self.begin(home_task, graph, task=task, instruction=instruction, expert=expert)

    def begin(
        self,
        home_task: HomeTask,
        graph: Mapping[str, Sequence[Any]],
        *,
        task: str = "",
        instruction: str = "",
        expert: bool = False,
    ) -> Observation:
        """Starts a task from memory; neither it nor the graph is changed."""
        self._world = World({"nodes": graph["nodes"], "edges": untangle(graph["edges"])})
        self._objects = Objects(home_task.objects)
        self._home_task, self._task = home_task, task
        self._won = False
        self._share = share_reached(home_task.goal, self._world)
        self._expert = Expert(home_task.program) if expert else None
        text = observe.introduce(home_task.title, home_task.description)
        return self._observation(text, 0.0, True, instruction)

    def step(self, action: str) -> Observation:
        """Plays an action.  Text that is no command does nothing and never raises."""
        grounded = self._execute(action)
        if self._expert is not None:
            self._expert.observe(action)
        # A solved task goes on and can be undone: what was won stays won.
        self._share = share_reached(self._home_task.goal, self._world)
        first = not self._won and self._share == 1
        self._won = self._won or first
        text = observe.describe(self._world) if grounded else observe.NOTHING_HAPPENS
        return self._observation(text, float(first), grounded)

    def _execute(self, text: str) -> bool:
        command = parse(text)
        if command is None:
            return False
        action, names = command
        ids = self._objects.resolve(self._world, names)
        if ids is None:
            return False
        return self._world.execute(action, list(zip(names, ids, strict=True)))

    def _observation(
        self, text: str, reward: float, grounded: bool, instruction: str = ""
    ) -> Observation:
        expert_action = ""
        if self._expert is not None and not self._won:
            expert_action = self._expert.act()
        return Observation(
            text=text,
            reward=reward,
            done=self._won,
            success=self._won,
            grounded=grounded,
            instruction=instruction,
            task=self._task,
            task_type=self._home_task.title,
            expert_action=expert_action,
            progress=1.0 if self._won else self._share,
        )
