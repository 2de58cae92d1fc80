"""What an environment says, checked once, where it comes in.

The contract is that of docs/environments.md.  Types are made plain: numpy's scalars, and arrays and
tensors of one number, are numbers and flags.  What breaks the contract is a `UserError` that names
who said it, what, and what it must be: another try cannot mend it, so the stage stops.
"""

import itertools
import math
import numbers
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, TypeGuard, TypeVar

from spa_jax.envs.protocol import USER_ERROR, EnvError, Observation
from spa_jax.errors import UserError

LONGEST_NAME = 1000  # characters of a task's or a split's name
_MOST_TASKS = 1_000_000
_EXACT = 1e-9  # sums of shares are as exact as floats are
_FULL = 1e-6  # a reward this close to 1 is the full one: float32 knows no better
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_T = TypeVar("_T")


def asked(where: str, ask: Callable[[], _T]) -> _T:
    """What a method of somebody's class answers, where another try cannot help.

    Args:
      where: "module:Class.method", for the message.
      ask: calls it.

    Raises:
      UserError: it raised something; the traceback is in the message, indented.
    """
    try:
        return ask()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too
        raise UserError(
            f"{where} raised {one_line(error)}\n{indented(full_traceback(error))}"
        ) from error


def one_line(error: BaseException) -> str:
    """An error's type and message in one line."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # its own __str__ fails
        said = ""
    return f"{type(error).__name__}: {said[:1000]}".removesuffix(": ")


def full_traceback(error: BaseException) -> str:
    """An error's traceback."""
    return "".join(traceback.format_exception(error)).rstrip()


def indented(text: str) -> str:
    """Lines that are seen to belong to the message above them."""
    return "\n".join(f"  | {line}" for line in text.splitlines())


def plain(value: Any) -> Any:
    """A scalar of numpy, or an array or tensor of one number, as Python's own."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def number(field: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high].

    Raises:
      ValueError: says which field must be what.
    """
    found = plain(value)
    try:
        real = isinstance(found, numbers.Real) and math.isfinite(found)
    except OverflowError:  # an integer that no float holds
        real = False
    if not real or not low - _EXACT <= found <= high + _EXACT:
        within = "" if math.isinf(low) else f" in [{low:g}, {high:g}]"
        raise ValueError(f"its {field} must be a number{within}, not {value!r:.100}")
    return min(max(float(found), low), high)


def progress(value: Any) -> float | None:
    """How much of a task is done.

    Raises:
      ValueError: it is neither None nor a number in [0, 1].
    """
    try:
        if isinstance(plain(value), bool):
            raise ValueError
        return None if value is None else number("progress", value, 0.0, 1.0)
    except ValueError:
        raise ValueError(
            f"its progress must be a number in [0, 1] or None, not {value!r:.100}"
        ) from None


def flag(field: str, value: Any) -> bool:
    """A flag; 0 and 1 are two.

    Raises:
      ValueError: it is none.
    """
    found = plain(value)
    if not isinstance(found, int) or found not in (0, 1):
        raise ValueError(f"its {field} must be True or False, not {value!r:.100}")
    return bool(found)


def text(field: str, value: Any) -> str:
    """A text; of a subclass, such as numpy's, as Python's own.

    Raises:
      ValueError: it is none.
    """
    found = plain(value)
    if not isinstance(found, str):
        raise ValueError(f"its {field} must be a text, not {value!r:.100}")
    return str.__str__(found)


def _is_sequence(value: Any) -> TypeGuard[Iterable[Any]]:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _texts(field: str, value: Any) -> list[str]:
    """Texts.

    Raises:
      ValueError: it is no sequence of them.
    """
    if not _is_sequence(value):
        raise ValueError(f"its {field} must be a sequence of texts, not {value!r:.100}")
    return [text(field, one) for one in value]


def observation(where: str, now: Any, *, first: bool = False) -> Observation:
    """What a reset or a step answered, in plain types.

    Args:
      where: who answered: "module:Class.step".
      now: the answer: an `Observation`, with anything in its fields.
      first: whether a reset answered.

    Raises:
      UserError: it breaks the contract.
    """
    if not isinstance(now, Observation):
        kind = type(now).__name__
        wanted = "a text or an Observation" if first else "an Observation"
        raise UserError(f"{where} returned {kind}, not {wanted}: {now!r:.100}")
    try:
        checked = Observation(
            text=text("text", now.text),
            reward=number("reward", now.reward, 0.0, 1.0),
            done=flag("done", now.done),
            success=flag("success", now.success),
            grounded=flag("grounded", now.grounded),
            instruction=text("instruction", now.instruction),
            task=text("task", now.task),
            task_type=text("task_type", now.task_type),
            expert_action=text("expert_action", now.expert_action),
            admissible=tuple(_texts("admissible", now.admissible)),
            progress=progress(now.progress),
        )
        check_outcome(checked, first=first)
    except ValueError as error:
        raise UserError(f"{where} returned an observation: {error}") from error
    return checked


def observation_from_wire(data: dict[str, Any]) -> Observation:
    """Reads what `protocol.observation_to_wire` made.

    Raises:
      EnvError: the server sent something else, which another try cannot mend.
    """
    try:
        now = Observation(reward=data["reward"], done=data["done"], **data["observation"])
        return observation("the environment server", now)
    except (KeyError, TypeError, UserError) as error:
        raise EnvError(
            f"the server's observation is not one of ours: {error}", USER_ERROR, False
        ) from error


def check_outcome(now: Observation, *, first: bool = False) -> None:
    """Refuses a success, a reward and an end that contradict each other.

    Raises:
      ValueError: says which do.
    """
    said = f"done={now.done}, reward={now.reward:g}, success={now.success}"
    if first and (now.done or now.reward or now.success):
        raise ValueError(f"a reset returned an end or a reward ({said}): only a step can")
    if now.success and not (now.done and now.reward >= 1 - _FULL):
        raise ValueError(
            f"{said} contradict each other: the step that solves the task has success=True, "
            "done=True and reward=1"
        )
    if now.done and now.reward == 1 and not now.success:
        raise ValueError(
            f"{said} contradict each other: an episode that ends with the full reward is a "
            "success; a task that is not solved pays less than 1"
        )
    if now.success and now.progress is not None and now.progress < 1 - _FULL:
        raise ValueError(
            f"success=True contradicts progress={now.progress:g}: a solved task has progress 1"
        )


def names(where: str, given: Any, of: str) -> list[str]:
    """Names of splits or tasks.

    Args:
      where: who gave them: "module:Class.splits".
      given: a sequence of texts, or what should be one.
      of: what they name: "split".

    Raises:
      UserError: it is none, is empty, or names something twice.
    """
    if not _is_sequence(given):
        raise UserError(
            f"{where} gives {given!r:.100}: it must be a sequence of texts, the names of {of}s"
        )
    found: dict[str, None] = {}
    for value in itertools.islice(given, _MOST_TASKS + 1):
        try:
            name = text("names", value)
        except ValueError:
            raise UserError(f"{where}: a {of}'s name must be a text, not {value!r:.100}") from None
        if not name or len(name) > LONGEST_NAME or _SURROGATE.search(name):
            raise UserError(
                f"{where}: a {of}'s name has 1 to {LONGEST_NAME} characters that UTF-8 can write, "
                f"which {name!r:.100} has not"
            )
        if name in found:
            raise UserError(f"{where}: {of} {name!r:.100} is there twice; name each once")
        found[name] = None
    if not found:
        raise UserError(f"{where} is empty: name at least one {of}")
    if len(found) > _MOST_TASKS:
        raise UserError(f"{where}: more than {_MOST_TASKS} {of}s")
    # A set has another order in each process, and what is played goes by the order.
    return sorted(found) if isinstance(given, Set) else list(found)
