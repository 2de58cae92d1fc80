"""The pages that --help and --helpfull print: a program's flags, in three groups."""

import dataclasses
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, Literal

from absl import flags

from spa_jax import settings

Page = Literal["help", "helpfull"]
SETTINGS: dict[str, dataclasses.Field] = {}  # by the name of its flag
_TITLES = {
    settings.MUST: "What you must choose",
    settings.MAY: "What you may tune",
    settings.REST: "The rest",
}
_FIRST = ("workdir", "policy", "seed")
_PAGES: dict[str, Page] = {name: "help" for name in ("help", "h", "?", "helpshort")}
_PAGES["helpfull"] = "helpfull"
_SHORT = 64  # a program with more flags than this shows the third group with --helpfull alone
_COLUMN = 34  # where the help of a flag begins
_CHOICES = re.compile(r"<[^>]*\|[^>]*>: ")  # that absl puts before the help of an enum
_LONGEST = 40  # characters of a default that are shown
_FLAGFILE = "Read flags from this file, one a line; # begins a comment."


def asked(argv: Sequence[str]) -> Page | None:
    """The page that the arguments ask for, if they ask for one."""
    for word in argv[1:]:
        if word == "--":
            break
        if word.startswith("-") and word.lstrip("-") in _PAGES:
            return _PAGES[word.lstrip("-")]
    return None


def page(kind: Page, own: Collection[str], stage_policy: bool) -> str:
    """The page's text.

    Args:
      kind: of the page: the program's own flags, a line each, or all that it knows.
      own: the names of the program's own flags.
      stage_policy: --policy is empty by default.
    """
    full = kind == "helpfull"
    known = [name for name in flags.FLAGS if name in own or (full and name in SETTINGS)]
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    lines = [(sys.modules["__main__"].__doc__ or "").strip()]
    brief = not full and len(known) > _SHORT
    for group, title in _TITLES.items():
        if brief and group == settings.REST:
            continue
        names = [name for name in known if _group(name) == group]
        names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
        empty = {"policy": ""} if stage_policy else {}
        rows = [_row(name, full, empty.get(name)) for name in names]
        if group == settings.MUST:
            rows.insert(0, ("--flagfile=", _FLAGFILE))
        if rows:
            lines += ["", f"{title}:", *(_line(*row, width, full) for row in rows)]
    if not full:
        lines += ["", "--helpfull lists all flags, and says more of each."]
    return "\n".join(lines)


def _group(name: str) -> int:
    """The group of a flag; what a program defines for itself must be chosen."""
    if name in SETTINGS:
        return SETTINGS[name].metadata["group"]
    return settings.REST if name == "redo" else settings.MUST


def _row(name: str, full: bool, default: Any = None) -> tuple[str, str]:
    """(flag with its default, help) of a flag."""
    flag, field = flags.FLAGS[name], SETTINGS.get(name)
    value = flag.default if default is None else default
    text = field.metadata["help"] if field else " ".join((flag.help or "").split())
    text = _CHOICES.sub("", text)
    if field and full:
        allowed = settings.limits(field)
        text += f" It is {allowed}." if allowed else ""
        known = settings.choices(field)
        text += f" One of {', '.join(known)}." if known else ""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, list):
        value = ",".join(value)
    shown = "" if value is None else str(value)
    return f"--{name}={shown if len(shown) <= _LONGEST else shown[:_LONGEST] + '…'}", text


def _line(flag: str, text: str, width: int, full: bool) -> str:
    """A flag and its help: in one line, or in as many as it takes."""
    start = f"  {flag}"
    if not full:
        room = width - max(_COLUMN, len(start) + 2)
        cut = text if len(text) <= room else text[: max(0, room - 1)].rstrip() + "…"
        return f"{start.ljust(_COLUMN - 2)}  {cut}".rstrip()[:width]
    body = textwrap.wrap(text, width - _COLUMN)
    if len(start) > _COLUMN - 2:
        body = [start, *(" " * _COLUMN + line for line in body)]
        return "\n".join(body)
    first, *others = body or [""]
    return "\n".join([start.ljust(_COLUMN) + first, *(" " * _COLUMN + line for line in others)])
