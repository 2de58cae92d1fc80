"""An environment of one's own, tried before anything is trained on it; and played by hand.

The class runs as it will run in a stage: behind a server, an instance a process.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from spa_jax import tokenizer
from spa_jax.chat import ChatFormat
from spa_jax.envs.boundary import indented
from spa_jax.envs.client import EnvClient, Session
from spa_jax.envs.conformance import Report
from spa_jax.envs.custom import CustomIndex, load_class
from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import EnvError, Observation, Task
from spa_jax.envs.text import parse_action
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig

# What a policy may write that knows nothing of the environment: all are answered, none raises.
_NONSENSE = ("", "look", "xyzzy 12", "a " * 500, "\u2603 \U0001f600 \t{}[]%s\\", "Action: Action:")
_SHOWN = 20  # problems of a kind
_START_S = 120.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
      name: "module:Class".
      games: of each split, evenly spread.
      max_steps: of a game.
      seed: of a game.
      policy: a folder with a tokenizer, whose tokens are counted; "": none.
      chat_format: of the conversations.
      context_length: tokens that an episode may have.
    """

    name: str
    games: int = 4
    max_steps: int = 40
    seed: int = 0
    policy: str = ""
    chat_format: str = "template"
    context_length: int = 1024


@dataclasses.dataclass(frozen=True)
class _Game:
    """A game that was played: what was done, and what was said, the reset's answer first."""

    task: Task
    actions: tuple[str, ...]
    said: tuple[Observation, ...]


class _Findings:
    """What was checked, and what was wrong."""

    def __init__(self) -> None:
        self.checked: Counter[str] = Counter()
        self.wrong: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def expect(self, what: str, holds: bool, problem: str) -> None:
        """Counts a condition; it is a problem if it does not hold."""
        self.checked[what] += 1
        if not holds:
            self.wrong.setdefault(what, []).append(problem)

    def report(self) -> Report:
        """All of it in lines."""
        lines = []
        for what, count in self.checked.items():
            wrong = self.wrong.get(what, [])
            lines.append(f"{'WRONG' if wrong else 'ok':5}  {what}: {count - len(wrong)} of {count}")
            lines += [f"       {problem}" for problem in wrong[:_SHOWN]]
            lines += [f"       and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        failed = sum(map(len, self.wrong.values()))
        total = max(sum(self.checked.values()), 1)
        lines += [f"note   {note}" for note in self.notes]
        return Report(tuple(lines), 1 - failed / total, not failed)


def check(trial: Trial) -> Report:
    """Tries a class: its contract, its rewards and splits, that a replay says the same, its expert.

    Raises:
      UserError: there is no such class, or its names of splits or tasks break the contract.
    """
    found = _Findings()
    index = CustomIndex(trial.name)
    config = ServerConfig(trial.name, env="custom", max_sessions=2)
    with LocalServer(config, start_deadline_s=_START_S) as server:
        client = server.client(wait_s=10.0)
        tasks = {split: client.tasks(split) for split in index.splits()}
        _check_splits(found, tasks)
        expert = hasattr(load_class(trial.name), "expert")
        if not expert:
            found.notes.append(
                "there is no expert: games are tried with nonsense only, and a base policy must "
                "come from elsewhere"
            )
        chosen = [task for split in tasks.values() for task in _spread(split, trial.games)]
        with client.session() as session:
            _nonsense(found, session, chosen[0], trial)
            games = list(_played(found, session, chosen, trial, expert))
    # Another server: its processes order sets in another way.
    with LocalServer(config, start_deadline_s=_START_S) as server:
        with server.client(wait_s=10.0).session() as session:
            for game in games:
                _replay(found, session, game, trial)
    for game in games:
        _check_game(found, game, trial, expert)
    _check_rewards(found, games)
    if trial.policy:
        _check_tokens(found, games, trial)
    return found.report()


def _spread(tasks: Sequence[Task], count: int) -> list[Task]:
    count = min(count, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


def _check_splits(found: _Findings, tasks: dict[str, list[Task]]) -> None:
    names = {split: {task.task for task in known} for split, known in tasks.items()}
    found.notes.append(", ".join(f"{split}: {len(known)} tasks" for split, known in names.items()))
    splits = list(names)
    for number, one in enumerate(splits):
        for other in splits[number + 1 :]:
            shared = sorted(names[one] & names[other])
            found.expect(
                "splits are disjoint",
                not shared,
                f"{one} and {other} share {len(shared)} tasks, such as {shared[:3]}",
            )


def _tried(found: _Findings, what: str, where: str, ask: Callable[[], Observation]) -> bool:
    """Whether the environment answered; a breach or an error of it is a problem."""
    try:
        ask()
    except EnvError as error:
        said = f"{where}: {error}"
        found.expect(what, False, f"{said}\n{indented(error.traceback)}".rstrip())
        return False
    found.expect(what, True, "")
    return True


def _nonsense(found: _Findings, session: Session, task: Task, trial: Trial) -> None:
    """Every text is answered."""
    grounded = []
    for action in _NONSENSE:
        where = f"task {task.task!r}, action {action[:40]!r}"
        said: list[Observation] = []

        def ask(action: str = action, said: list[Observation] = said) -> Observation:
            said.append(session.reset(task.task, task.split, trial.seed))
            said.append(session.step(action, parsed=True))
            return said[-1]

        if _tried(found, "any text is answered", where, ask):
            grounded.append(said[-1].grounded)
    if grounded and all(grounded):
        found.notes.append(
            "nonsense counts as executed: every step will be grounded (grounded=False says that "
            "an action could not be executed)"
        )


def _played(
    found: _Findings, session: Session, tasks: Sequence[Task], trial: Trial, expert: bool
) -> Iterator[_Game]:
    """The expert's games, or those of nonsense; a game that breaks is a problem."""
    for task in tasks:
        actions: list[str] = []
        said: list[Observation] = []

        def play(
            task: Task = task, actions: list[str] = actions, said: list[Observation] = said
        ) -> Observation:
            said.append(session.reset(task.task, task.split, trial.seed, expert=expert))
            while not said[-1].done and len(actions) < trial.max_steps:
                nonsense = _NONSENSE[len(actions) % len(_NONSENSE)]
                actions.append(said[-1].expert_action if expert else nonsense)
                said.append(session.step(actions[-1], parsed=True))
            return said[-1]

        if _tried(found, "games are played within the contract", f"task {task.task!r}", play):
            yield _Game(task, tuple(actions), tuple(said))


def _replay(found: _Findings, session: Session, game: _Game, trial: Trial) -> None:
    """The same actions in another process get the same answers."""
    task, what = game.task, "a replay says the same"
    try:
        now = session.reset(task.task, task.split, trial.seed)
        for step, then in enumerate(game.said):
            if step:
                now = session.step(game.actions[step - 1], parsed=True)
            same = dataclasses.replace(then, expert_action="") == dataclasses.replace(
                now, expert_action=""
            )
            if not same:
                found.expect(
                    what,
                    False,
                    f"task {task.task!r}, step {step}: {_short(then)}, and played again "
                    f"{_short(now)}: take everything random from the task and the seed",
                )
                return
    except EnvError as error:
        found.expect(what, False, f"task {task.task!r}: {error}")
        return
    found.expect(what, True, "")


def _short(now: Observation) -> str:
    return f"{now.text[:60]!r} (reward {now.reward:g}, done {now.done}, progress {now.progress})"


def _check_game(found: _Findings, game: _Game, trial: Trial, expert: bool) -> None:
    """What one game says by itself."""
    where, last = f"task {game.task.task!r}", game.said[-1]
    for before, after, action in zip(game.said, game.said[1:], game.actions, strict=False):
        if not after.grounded and None not in (before.progress, after.progress):
            found.expect(
                "what is not executed leaves the progress as it is",
                before.progress == after.progress,
                f"{where}, action {action[:40]!r}: {before.progress} -> {after.progress}",
            )
    if not expert:
        return
    found.expect(
        "the expert wins",
        last.success,
        f"{where}: after {len(game.actions)} steps reward {last.reward:g}, done {last.done}"
        + ("" if last.done else " (--max_steps)"),
    )
    odd = [action for action in game.actions if parse_action(action) != action]
    found.expect(
        "the expert says the action alone",
        not odd,
        f"{where}: {odd[:1]!r} is read as {parse_action(odd[0])!r} where a policy writes it: leave "
        'out "Action:" and blanks around it'
        if odd
        else "",
    )


def _check_rewards(found: _Findings, games: Sequence[_Game]) -> None:
    ends = [game.said[-1].reward for game in games if game.said[-1].done]
    if ends:
        found.notes.append(
            f"R of {len(ends)} games that ended: {min(ends):g} to {max(ends):g}, "
            f"{sum(reward == 1 for reward in ends)} won"
        )
    lost = sum(now.reward > 0 and not now.done for game in games for now in game.said)
    if lost:
        found.notes.append(
            f"{lost} steps paid a reward and did not end their game: only the reward of the step "
            "that ends it counts (R)"
        )
    told = {now.progress is None for game in games for now in game.said}
    if len(told) > 1:
        found.notes.append(
            "some observations say a progress and others none: such episodes have none"
        )


def _check_tokens(found: _Findings, games: Sequence[_Game], trial: Trial) -> None:
    """What a policy will read of the games, in its own tokens."""
    chat = ChatFormat.from_tokenizer(tokenizer.load(trial.policy), trial.chat_format)
    openings, wholes = [], []
    for game in games:
        first = game.said[0]
        opening = chat.first_turn(first.instruction, first.text)
        openings.append(len(opening))
        size = len(opening)
        for action, now in zip(game.actions, game.said[1:], strict=True):
            size += len(chat.response(f"Action: {action}"))
            size += 0 if now.done else len(chat.next_turn(now.text))
        wholes.append(size)
        found.expect(
            f"fits into --context_length={trial.context_length}",
            size <= trial.context_length,
            f"task {game.task.task!r}: {size} tokens, {len(opening)} of them its opening",
        )
    if games:
        found.notes.append(
            f"tokens: openings {min(openings)} to {max(openings)}, whole games {min(wholes)} to "
            f"{max(wholes)}"
        )
        shown = chat.encoder.decode(
            chat.first_turn(games[0].said[0].instruction, games[0].said[0].text),
            skip_special_tokens=False,
        )
        found.notes.append(f"a policy reads first:\n{indented(shown)}")


# --- by hand --------------------------------------------------------------------------------------

_HELP = 'Write an action; "?" asks the expert, "!reset" begins again, "!quit" ends.'


def play(
    client: EnvClient,
    split: str,
    task: str,
    *,
    seed: int,
    expert: bool,
    ask: Callable[[str], str],
    say: Callable[[str], None],
) -> None:
    """A person plays a task.

    Args:
      client: of the environment's server.
      split: of the task.
      task: its name; "": the split's first.
      seed: of the game.
      expert: whether it has one.
      ask: asks for a line; EOFError ends the game.
      say: shows a text.

    Raises:
      UserError: no such split or task, or the class breaks its contract.
    """
    task = task or client.tasks(split)[0].task
    say(_HELP)
    with client.session() as session:
        try:
            now = _begin(session, split, task, seed=seed, expert=expert, say=say)
            while True:
                line = ask("> ")
                if line == "!quit":
                    return
                if line == "!reset":
                    now = _begin(session, split, task, seed=seed, expert=expert, say=say)
                elif line == "?":
                    say(f"the expert would: {now.expert_action}" if expert else "no expert")
                elif now.done:
                    say('the game has ended: "!reset" begins again, "!quit" ends')
                else:
                    now = session.step(line)
                    _show(now, say)
        except EOFError:
            return
        except EnvError as error:
            raise UserError(f"{error}\n{indented(error.traceback)}".rstrip()) from error


def _begin(
    session: Session, split: str, task: str, *, seed: int, expert: bool, say: Callable[[str], None]
) -> Observation:
    now = session.reset(task, split, seed, expert=expert)
    say(f"\n[{split}: {task}, seed {seed}]\n{now.instruction}\n")
    _show(now, say)
    return now


def _show(now: Observation, say: Callable[[str], None]) -> None:
    progress = "" if now.progress is None else f", progress {now.progress:g}"
    end = f", THE END: {'won' if now.success else 'lost'}" if now.done else ""
    state = f"reward {now.reward:g}, {'executed' if now.grounded else 'not executed'}"
    say(f"{now.text}\n[{state}{progress}{end}]")
