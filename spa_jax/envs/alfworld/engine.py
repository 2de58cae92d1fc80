"""One ALFWorld game on TextWorld's PDDL engine.  Only environment processes import this.

TextWorld parses the same texts over and over: the grammar at each load, a rule a
sentence, the planner's translation at each load and reset.  All of it is a function
of the text, so `memoise` caches it; observations stay identical (tested).

One process holds one engine: TatSu's parsers are module globals and the planner's
translation swaps `sys.argv` and `sys.stdout`.
"""

import functools
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# alfworld creates its download folder, by default in the home folder, when it is imported.
os.environ.setdefault("ALFWORLD_DATA", tempfile.gettempdir())

import fast_downward
import textworld
import textworld.logic
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld.envs.pddl import PddlEnv, textgen
from textworld.envs.pddl import logic as pddl_logic

from spa_jax.envs.alfworld import prompt as prompts
from spa_jax.envs.alfworld import translation
from spa_jax.envs.alfworld.expert import Expert
from spa_jax.envs.alfworld.games import read_game
from spa_jax.envs.alfworld.progress import Progress, read_subgoals
from spa_jax.envs.contract import Engine
from spa_jax.envs.protocol import Observation

_TASK = re.compile(r"Your task is to: ([^\"\n]*?)\.?(?=\")")
_TASK_PLACEHOLDER = "Your task is to: UNKNOWN GOAL."


@functools.cache
def memoise() -> None:
    """Caches TextWorld's parsers in this process, and the planner's translation on the disk too."""
    logic_parse = functools.lru_cache(maxsize=8)(pddl_logic._parse_and_convert)
    pddl_logic._parse_and_convert = logic_parse
    textgen._parse_and_convert = _fresh_copies(textgen._parse_and_convert)
    query = functools.lru_cache(maxsize=4096)(textworld.logic.Rule.parse_conjunctive_query)
    textworld.logic.Rule.parse_conjunctive_query = staticmethod(query)
    textgen.copy_context = _copy_context
    on_disk = translation.cached(fast_downward.pddl2sas, translation.user_folder())
    translate = functools.lru_cache(maxsize=2)(on_disk)
    # Asked for at the load and again at the reset, each time also in a form that only
    # TextWorld's planner reads, which is never called here.
    fast_downward.pddl2sas = lambda domain, problem, **unused: translate(domain, problem)


def _copy_context(context: dict[str, Any]) -> dict[str, Any]:
    """TextWorld's own, with dictionaries copied one level deep: nobody writes deeper."""
    return context | {"variables": dict(context["variables"]), "mapping": dict(context["mapping"])}


def _fresh_copies(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Caches a parser whose callers write into what it returns."""

    @functools.lru_cache(maxsize=4096)
    def pickled(*args: Any, **kwargs: Any) -> bytes:
        return pickle.dumps(parse(*args, **kwargs))

    return lambda *args, **kwargs: pickle.loads(pickled(*args, **kwargs))


def _memoise_commands(derive: Callable[[str, Any], str]) -> Callable[[str, Any], str]:
    """Caches the wording of commands, which within a game depends on the entities alone.

    (What stands at which location never changes.)  Feedback rules, which start with "#",
    do depend on the state.
    """
    cache: dict[tuple[Any, ...], str] = {}

    def cached(start: str, context: Any) -> str:
        if start.startswith("#"):
            return derive(start, context)
        key = (start, *((ph.name, var.name) for ph, var in context["mapping"].items()))
        if key not in cache:
            cache[key] = derive(start, context)
        return cache[key]

    return cached


def patch_grammar(grammar: str) -> tuple[str, str]:
    """The grammar with the published wording and no task, and its task sentence.

    All official games have the same grammar but for that sentence: without it one parse
    serves them all.
    """
    match = _TASK.search(grammar)
    task = match.group(1) if match else ""
    grammar = _TASK.sub(lambda _: _TASK_PLACEHOLDER, grammar, count=1)
    grammar = grammar.replace('"move {o} to {r}"', '"put {o} in/on {r}"')
    return grammar.replace(
        '"You move the {o.name} to the {r.name}."', '"You put the {o.name} in/on the {r.name}."'
    ), task


class AlfworldEngine(Engine[Path]):
    """Plays games one after the other; `reset`, then `step` until done.

    Args:
      memoised: False plays TextWorld as it comes, to compare with (in a process that has
        not called `memoise`).
    """

    def __init__(self, memoised: bool = True) -> None:
        self._memoised = memoised
        if memoised:
            memoise()
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._pddl = PddlEnv(infos)
        self._env = AlfredDemangler(self._pddl)
        self._game = ""
        self._expert: Expert | None = None

    def reset(
        self,
        place: Path,
        *,
        task: str = "",
        prompt: str = "paper",
        expert: bool = False,
        seed: int = 0,
    ) -> Observation:
        """Starts the game that `place` holds.

        Args:
          place: the folder that holds game.tw-pddl and traj_data.json.
          task: the name that observations carry.
          prompt: which instruction the policy is given, one of `prompt.PROMPTS`.
          expert: whether each observation carries the expert's next action.
          seed: not looked at: these games have nothing random.

        Raises:
          UserError: if the game's files are missing or broken, or the prompt is unknown.
        """
        instruction = prompts.instruction(prompt)
        game = read_game(place)
        grammar, sentence = patch_grammar(game.data["grammar"])
        self._env.load(game.data | {"grammar": grammar})
        if self._memoised:
            logic = self._pddl._logic
            logic.grammar.derive = _memoise_commands(logic.grammar.derive)
        self._state = self._env.reset()
        self._won = False
        self._task, self._task_type = task, game.task_type
        self._progress = self._watch(game.data["pddl_problem"])
        text = self._state.feedback.replace("UNKNOWN GOAL", sentence)
        text = text.removeprefix("-= Welcome to TextWorld, ALFRED! =-").strip()
        self._expert = Expert(text) if expert else None
        return self._observation(text, 0.0, True, instruction=instruction)

    def _watch(self, problem: str) -> Progress | None:
        """What follows the game's progress; None if its goal is none of ALFWorld's."""
        subgoals = read_subgoals(problem)
        if subgoals is None:
            return None
        names = {info.id: info.name for info in self._pddl._entity_infos.values()}
        return Progress(subgoals, self._pddl._pddl_state, names)

    def _share(self, text: str) -> float | None:
        """How much of the task is done when the text is shown; what was won stays won."""
        if self._progress is None:
            return None
        self._progress.see(text)
        return 1.0 if self._won else self._progress.share()

    def step(self, action: str) -> Observation:
        """Plays an action.  Text that is no command does nothing and never raises."""
        command = prompts.to_command(action)
        grounded = command in self._state["admissible_commands"]
        if not grounded:
            return self._observation("Nothing happens.", 0.0, False)
        self._state, _, _ = self._env.step(command)
        # A won game goes on and its goal can be undone: what was won stays won.
        first = bool(self._state["won"]) and not self._won
        self._won = self._won or first
        return self._observation(
            prompts.shown(self._state.feedback), float(first), True, command=command
        )

    def _observation(
        self, text: str, reward: float, grounded: bool, instruction: str = "", command: str = ""
    ) -> Observation:
        expert_action, admissible = "", []
        if self._expert is not None:
            if command:
                self._expert.observe(command, text)
            if not self._won:
                admissible = sorted(set(self._state["admissible_commands"]) - {"help"})
                expert_action = self._expert.act(admissible)
        return Observation(
            text=text,
            reward=reward,
            done=self._won,
            success=self._won,
            grounded=grounded,
            instruction=instruction,
            task=self._task,
            task_type=self._task_type,
            expert_action=expert_action,
            admissible=tuple(admissible),
            progress=self._share(text),
        )
