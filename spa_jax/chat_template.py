"""Chat templates: the tokenizer's own, or a built-in one, and the day that one is told it is."""

import datetime
import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spa_jax.errors import UserError
from spa_jax.limited import limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE = "template"  # the name of the tokenizer's own format
Turns = Sequence[tuple[str, str]]  # (observation, response) pairs

# The built-in formats, as templates: each turn is written the same way wherever it stands.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
# Llama 3.1 and later write the day into every conversation. A policy would read other tokens each
# day than it was trained on, so it is always the one that their templates fall back on.
_DATE = datetime.datetime(2024, 7, 26)
# Moments with nothing in common: a template that writes any part of the day gives two texts.
_MOMENTS = (datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2022, 11, 15, 17, 38, 49))
# A template is a program of others': loops in loops would never end.
_SECONDS, _MEBIBYTES = 5.0, 512
_DAY = "@"  # between a format's name and the day that its template is told it is
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFT"
_UNPADDED = "dmHIMSjy"  # that glibc writes without zeros after a "-"
# Templates ask for the time by a function that transformers gives them. This one, before them, is
# found first, and knows one moment only.
_CLOCK = """\
{%%- macro strftime_now(format) -%%}{%%- set now = namespace(said=format) -%%}\
{%%- for sign, value in %s.items() -%%}\
{%%- set now.said = now.said | replace(sign, value) -%%}{%%- endfor -%%}\
{{- now.said -}}{%%- endmacro -%%}"""


def split_name(name: str) -> tuple[str, str]:
    """A format's name, such as "template@2024-07-26", and the day behind it; "" without one."""
    name, _, day = name.partition(_DAY)
    return name, day


def to_write(tokenizer: "PreTrainedTokenizerFast", name: str) -> str | None:
    """The template that a policy of this format is written with; None: its tokenizer's own."""
    name, day = split_name(name)
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not day:
        return None
    return _told(str(tokenizer.chat_template), datetime.datetime.fromisoformat(day))


def _told(source: str, moment: datetime.datetime) -> str:
    """A template for which it is always that moment."""
    if "strftime_now" not in source:
        return source
    signs = {f"%-{sign}": moment.strftime(f"%{sign}").lstrip("0") or "0" for sign in _UNPADDED}
    signs |= {f"%{sign}": moment.strftime(f"%{sign}") for sign in _DIRECTIVES}
    return _CLOCK % json.dumps(signs) + source


class Template:
    """A template's text of a conversation, with the assistant's header.

    Args:
      tokenizer: of the template.
      source: the template; None: the tokenizer's own.
      day: what it is told when it asks for the day, as 2024-07-26; "": it must not ask.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", source: str | None, day: str):
        self._tokenizer, self._source, self._day = tokenizer, source, day
        try:
            self._moment = datetime.datetime.fromisoformat(day) if day else _DATE
        except ValueError as error:
            raise UserError(f"--chat_date={day}: write a day such as 2024-07-26") from error

    def once(self, turns: Turns, observation: str) -> str:
        """The text, if it is the same on every day.

        Raises:
          UserError: it is not, and no day was given.
        """
        if not self._day:
            first, second = (self(turns, observation, moment) for moment in _MOMENTS)
            if first != second:
                same = len(os.path.commonprefix([first, second]))
                raise not_append_only(
                    self._tokenizer,
                    f"it writes the day that it is: {first[max(0, same - 40) : same + 20]!r} on "
                    f"one, {second[max(0, same - 40) : same + 20]!r} on another; "
                    "--chat_date=2024-07-26, or another day, is what it is then always told",
                )
        return self(turns, observation)

    def __call__(
        self, turns: Turns, observation: str, moment: datetime.datetime | None = None
    ) -> str:
        """The text, as of a moment; None: the day that it is told."""
        moment, own = moment or self._moment, self._tokenizer.chat_template
        source = self._source or (own if isinstance(own, str) else None)
        try:
            with limited(seconds=_SECONDS, mebibytes=_MEBIBYTES):
                return str(
                    self._tokenizer.apply_chat_template(
                        messages(turns, observation),
                        chat_template=_told(source, moment) if source else None,
                        tokenize=False,
                        add_generation_prompt=True,
                        date_string=self._moment.strftime("%d %b %Y"),
                    )
                )
        except Exception as error:  # no template; a Jinja error; the template's raise_exception
            raise UserError(
                f"{where(self._tokenizer)}: cannot write a conversation of user and assistant "
                f"turns ({error}); {remedy(self._tokenizer)}"
            ) from error


def messages(turns: Turns, observation: str) -> list[dict[str, str]]:
    messages = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return [*messages, {"role": "user", "content": observation}]


def lacks(tokenizer: "PreTrainedTokenizerFast", name: str) -> list[str]:
    """The tokens of a built-in format that a tokenizer has not."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return sorted(set(re.findall(r"<\|\w+\|>", TEMPLATES[name])) - added)


def built_in(tokenizer: "PreTrainedTokenizerFast", name: str) -> str:
    """The template of a built-in format.

    Raises:
      UserError: the tokenizer lacks a special token of it.
    """
    if missing := lacks(tokenizer, name):
        raise UserError(
            f"--chat_format={name}: {tokenizer.name_or_path}: the tokenizer has no special token "
            f"{', '.join(missing)}; leave the flag out, or choose another format or model"
        )
    return TEMPLATES[name]


def remedy(tokenizer: "PreTrainedTokenizerFast") -> str:
    """What to do about a template; only formats that the tokenizer has the tokens of are named."""
    known = [f"--chat_format={name}" for name in TEMPLATES if not lacks(tokenizer, name)]
    built_in = (
        f"give {' or '.join(known)}, a built-in format with the special tokens of the model's "
        "family, "
        if known
        else ""
    )
    return (
        f"{built_in}choose another instruct model, or set chat_template in the folder's "
        "tokenizer_config.json to one that writes each turn the same way wherever it stands"
    )


def where(tokenizer: "PreTrainedTokenizerFast") -> str:
    return f"{tokenizer.name_or_path}: the chat template"


def not_append_only(tokenizer: "PreTrainedTokenizerFast", reason: str) -> UserError:
    return UserError(f"{where(tokenizer)} is not append-only: {reason}; {remedy(tokenizer)}")
