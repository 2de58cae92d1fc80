"""How a setting is written: once, with its default, its help, its flag and its range.

    @dataclasses.dataclass(frozen=True)
    class PpoConfig(Checked):
        clip: float = setting(0.2, "How far the policy's ratio may move.", flag="ppo_clip", above=0)
        kl: Literal["loss", "reward"] = setting("loss", "Where the KL divergence enters.")

A `Literal` lists the choices.  A dataclass of settings checks itself whenever one is made, by
`dataclasses.replace` too.  `experiments/flags.py` derives the flags from the fields.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

from spa_jax.errors import UserError

MUST, MAY, REST = 1, 2, 3  # groups of --help: what one must choose, what one may tune, the rest


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    group: int = REST,
    operational: bool = False,
) -> Any:
    """A field of a dataclass of settings.

    Args:
      default: its value unless another is given.
      help: a sentence or two for somebody who has not read the code.
      flag: the flag's name; None: the field's.
      minimum: the least value that is allowed.
      above: every allowed value is larger.
      maximum: the largest value that is allowed.
      below: every allowed value is smaller.
      group: of --help.
      operational: it says how something runs, not what is computed: a run may be continued with
        another value.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"help": help, "flag": flag, "group": group, "operational": operational}
    return dataclasses.field(default=default, metadata=metadata | limits)


class Checked:
    """A dataclass of settings that refuses what is out of range, or contradicts itself."""

    def __post_init__(self) -> None:
        for field in fields(type(self)):
            _check(field, getattr(self, field.name))
        self.check()

    def check(self) -> None:
        """Refuses settings that contradict each other.

        Raises:
          UserError: names the flags, and says why.
        """


def fields(config: type) -> list[dataclasses.Field]:
    """The fields that are flags: those with a help text."""
    return [field for field in dataclasses.fields(config) if "help" in field.metadata]


def flag_of(field: dataclasses.Field) -> str:
    """The name of a field's flag."""
    return field.metadata["flag"] or field.name


def choices(field: dataclasses.Field) -> tuple[str, ...]:
    """What a field, or each item of its tuple, may be, by its `Literal`; () if it is none."""
    kind: Any = field.type
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def sections(settings: Any) -> Iterator[tuple[str, Any]]:
    """(name, dataclass of settings) of every section of a dataclass of such."""
    for field in dataclasses.fields(settings):
        yield field.name, getattr(settings, field.name)


def by_flag(settings: Any) -> dict[str, tuple[dataclasses.Field, Any]]:
    """(field, value) of every setting of all sections, by the name of its flag."""
    return {
        flag_of(field): (field, getattr(config, field.name))
        for _, config in sections(settings)
        for field in fields(type(config))
    }


def limits(field: dataclasses.Field) -> str:
    """The range of a number in words; empty if there is none."""
    minimum, above, maximum, below = (
        field.metadata.get(name) for name in ("minimum", "above", "maximum", "below")
    )
    alone = minimum is None or (maximum is None and below is None)
    least = [">= {:g}" if alone else "at least {:g}"] if minimum is not None else []
    words = [text.format(minimum) for text in least]
    words += [f"above {above:g}"] if above is not None else []
    words += [f"at most {maximum:g}"] if maximum is not None else []
    words += [f"below {below:g}"] if below is not None else []
    return " and ".join(words)


def _check(field: dataclasses.Field, value: Any) -> None:
    """Refuses a value that a field cannot have.

    Raises:
      UserError: names the flag and says what it may be.
    """
    flag = f"--{flag_of(field)}"
    known = choices(field)
    if isinstance(value, tuple):
        _check_list(flag, value, known)
    elif known and value not in known:
        raise UserError(
            f"{flag}={value}: {value!r} is none of {', '.join(known)}; give one of them"
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag}={value} must be a finite number")
    elif isinstance(value, int | float) and not _within(field, value):
        raise UserError(f"{flag}={value:g} must be {limits(field)}")


def _within(field: dataclasses.Field, value: float) -> bool:
    given = field.metadata
    minimum, above, maximum, below = (
        given[name] for name in ("minimum", "above", "maximum", "below")
    )
    return (
        (minimum is None or value >= minimum)
        and (above is None or value > above)
        and (maximum is None or value <= maximum)
        and (below is None or value < below)
    )


def _check_list(flag: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not known:
        return
    unknown = [name for name in given if name not in known]
    if unknown or not given or len(set(given)) < len(given):
        wrong = f"{unknown[0]!r} is none" if unknown else "name each at most once, at least one"
        raise UserError(f"{flag}={','.join(given)}: {wrong} of {','.join(known)}")
