"""The chat format: turns of an episode to token ids, appended and never rewritten.

A `ChatFormat` is read off the tokenizer's own chat template, or a built-in one,
with probe conversations.  What the template puts around the messages is cut into three
literals, here for ChatML (`<|x|>` are special tokens, one id each):

    opening   <|im_start|>system\\nYou are ...<|im_end|>\\n<|im_start|>user\\n
    OBSERVATION
    header    <|im_end|>\\n<|im_start|>assistant\\n
    RESPONSE
    between   <|im_end|>\\n<|im_start|>user\\n
    OBSERVATION
    header    ...

`between` starts with the end-of-turn token, which the policy writes itself.
Texts are put between the special tokens' ids and encoded run by run, each run
once, so a conversation's ids are a prefix of the ids of its continuation, and
they are those that the template gives for the whole conversation.  A special
token's *name* inside an observation or a response stays plain text: nobody can
forge the border of a turn.
"""

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import tokenizers

from spa_jax.errors import UserError
from spa_jax.limited import limited
from spa_jax.texts import replace_surrogates
from spa_jax.tokenizer import reading
from spa_jax.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Parts = tuple[int | str, ...]  # ids of special tokens, and text between them
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
_MARKS = ("spaprobeone", "spaprobetwo", "spaprobethree", "spaprobefour", "spaprobefive")
# Conversations on which the format must give the template's own ids: digits, blanks and line
# breaks at the borders (where tokens could merge), other scripts, and a thought, which some
# templates drop from all but the last turn.
_PROBES: tuple[Turns, ...] = (
    (("You see a mug 1.", "take mug 1"), ("Nothing happens.", "go to shelf 12"), ("Done", "look")),
    (("\n\n two\n", "Thought: x\nAction: y"), ("  tabs\t", "a  b"), ("1", "2")),
    (("Caf\u00e9 \u8336", "\u00fcber"), ("-> [x]", "{y}"), ("...", "!")),
    (("Go.", "<think>\nFirst look.\n</think>\n\nlook"), ("A desk.", "open desk"), ("?", "wait")),
)


# A template is a program of others': loops in loops would never end.
_SECONDS, _MEBIBYTES = 5.0, 512

# Llama 3.1 and later write the day into every conversation. A policy would read other tokens each
# day than it was trained on, so it is always the one that their templates fall back on.
_DATE = "26 Jul 2024"


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How the turns of one tokenizer's conversations become ids; see the module's drawing.

    Attributes:
      end_of_turn: the id that ends each of the policy's turns.
      opening: what comes before the first observation.
      header: what comes between an observation and the policy's response.
      lead: the blanks that the policy itself writes before its response (Mistral's).
      between: what comes between the policy's end of turn (left out) and the next observation.
      strip: whether the template strips the blanks around an observation.
      special: the ids of all special tokens.
      blank: whether a run of text begins as if a blank stood before it (SentencePiece).
      encoder: the tokenizer, which takes special tokens' names for plain text and adds no blank.
    """

    end_of_turn: int
    opening: Parts
    header: Parts
    lead: str
    between: Parts
    strip: bool
    special: frozenset[int]
    blank: bool
    encoder: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerFast", name: str = TEMPLATE
    ) -> "ChatFormat":
        """Reads the format off a tokenizer's chat template, or a built-in one, and checks it.

        Args:
          tokenizer: is left as it is.
          name: "template" for the tokenizer's own, or one of `TEMPLATES`.

        Raises:
          UserError: the tokenizer has no chat template, or one that is not append-only: it
            changes, drops or moves earlier turns, ends no turn with a special token, merges
            tokens over the border of a turn, begins a conversation twice or tells the date; or it
            lacks a special token of the built-in format.
        """
        template = None if name == TEMPLATE else _built_in(tokenizer, name)
        marks = [*zip(_MARKS[::2], _MARKS[1::2], strict=False)]
        rendered = _render(tokenizer, template, marks, _MARKS[4])
        opening, header, lead, between = _cut(tokenizer, rendered)
        source = template or str(tokenizer.chat_template)
        if "strftime_now" in source and str(datetime.date.today().year) in opening:
            raise _not_append_only(tokenizer, f"it writes the day that it is: {opening!r}")
        names = {
            token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        tail = _split(between, names)
        if not tail or not isinstance(tail[0], int):
            raise _not_append_only(
                tokenizer, f"no special token ends an assistant turn; {between!r} follows it"
            )
        encoder, blank = _plain_encoder(tokenizer)
        padded = _render(tokenizer, template, [], f" {_MARKS[0]} ")
        fmt = cls(
            end_of_turn=tail[0],
            opening=_split(opening, names),
            header=_split(header, names),
            lead=lead,
            between=tail[1:],
            strip=f" {_MARKS[0]} " not in padded,
            special=frozenset(names.values()),
            blank=blank,
            encoder=encoder,
        )
        _check(fmt, tokenizer, template, names)
        _check_bos(fmt, tokenizer)
        return fmt

    def first_turn(self, instruction: str, observation: str) -> list[int]:
        """Everything up to where the policy writes its first response.

        BOS and a default system message, if the template has them; a user turn with the
        instruction, an empty line and the observation (without an instruction just that); the
        header of the assistant's turn.
        """
        text = f"{instruction}\n\n{observation}" if instruction else observation
        return self._encode([*self.opening, self._content(text), *self.header])

    def next_turn(self, observation: str) -> list[int]:
        """What follows the policy's end of turn: the next user turn and the assistant's header."""
        return self._encode([*self.between, self._content(observation), *self.header])

    def response(self, text: str) -> list[int]:
        """The policy's tokens for a text: the text's ids and the end of turn."""
        follows_text = not self.header or isinstance(self.header[-1], str)
        return [*self._encode([self.lead + text], follows_text), self.end_of_turn]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        text = self.encoder.decode([i for i in ids if i not in self.special])
        return text.removeprefix(self.lead)

    def _content(self, text: str) -> str:
        return text.strip() if self.strip else text

    def _encode(self, parts: Iterable[int | str], follows_text: bool = False) -> list[int]:
        """Ids of parts; neighbouring texts are one run, encoded together.

        Args:
          parts: ids and texts.
          follows_text: whether text stands before the first of them.
        """
        ids: list[int] = []
        text = ""
        for part in (*parts, None):  # None ends the last run
            if isinstance(part, str):
                text += part
                continue
            if text:
                text = " " * (self.blank and not (follows_text and not ids)) + text
                text, _ = replace_surrogates(text)
                ids += self.encoder.encode(text, add_special_tokens=False).ids
                text = ""
            if part is not None:
                ids.append(part)
        return ids


def encode_trajectory(fmt: ChatFormat, trajectory: Trajectory) -> Trajectory:
    """Gives a scripted trajectory (an expert's, an imported one) its tokens.

        token_ids  first_turn ...  response 0 <eot>  next_turn ...  response 1 <eot>
        step_id    -1 -1 -1 -1 -1  0  0  0    0      -1 -1 -1 -1    1  1  1    1

    The observation after the last action is not encoded.

    Args:
      fmt: the chat format.
      trajectory: its texts are encoded; tokens that it already has are replaced.

    Returns:
      The trajectory with `token_ids`, `step_id` and zeros for `log_probs`.

    Raises:
      ValueError: the trajectory was sampled: what a policy wrote is never tokenised again.
    """
    if trajectory.sampling is not None:
        raise ValueError(f"trajectory {trajectory.key} was sampled and keeps its own tokens")
    ids: list[int] = []
    step_id: list[int] = []
    for k, step in enumerate(trajectory.steps):
        context = (
            fmt.next_turn(step.observation)
            if k
            else fmt.first_turn(trajectory.instruction, step.observation)
        )
        response = fmt.response(step.response)
        ids += context + response
        step_id += [-1] * len(context) + [k] * len(response)
    return dataclasses.replace(
        trajectory,
        token_ids=tuple(ids),
        step_id=tuple(step_id),
        log_probs=(0.0,) * len(ids),
        ref_log_probs=None,
    )


def with_final_observation(fmt: ChatFormat, trajectory: Trajectory, most: int) -> Trajectory:
    """The trajectory with the answer to its last action as context, where the policy would go on.

        token_ids  ... 17 42 <eot>            ->  ... 17 42 <eot> next_turn
        step_id    ...  1  1    1                 ...  1  1    1  -1 -1 -1

    What a step did can only be read behind the environment's answer, and the one to the last step
    is recorded as text alone.  An end of turn that the policy did not write is added before it.

    Args:
      fmt: the format of its conversation.
      trajectory: encoded.  Without an answer (a limit cut the last turn) it stays as it is.
      most: tokens that it may have; with more than that it stays as it is.
    """
    if not trajectory.token_ids or not trajectory.steps or trajectory.steps[-1].partial:
        return trajectory
    ended = trajectory.token_ids[-1] == fmt.end_of_turn
    added = [] if ended else [fmt.end_of_turn]
    added += fmt.next_turn(trajectory.final_observation)
    if len(trajectory.token_ids) + len(added) > most:
        return trajectory
    given = trajectory.ref_log_probs
    zeros = (0.0,) * len(added)
    return dataclasses.replace(
        trajectory,
        token_ids=(*trajectory.token_ids, *added),
        step_id=(*trajectory.step_id, *[-1] * len(added)),
        log_probs=(*trajectory.log_probs, *zeros),
        ref_log_probs=None if given is None else (*given, *zeros),
    )


def _messages(turns: Turns, observation: str) -> list[dict[str, str]]:
    messages = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return [*messages, {"role": "user", "content": observation}]


def _render(
    tokenizer: "PreTrainedTokenizerFast", template: str | None, turns: Turns, observation: str
) -> str:
    """A template's text of a conversation, with the assistant's header; None: the tokenizer's."""
    try:
        with limited(seconds=_SECONDS, mebibytes=_MEBIBYTES):
            return str(
                tokenizer.apply_chat_template(
                    _messages(turns, observation),
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                    date_string=_DATE,
                )
            )
    except Exception as error:  # no template; a Jinja error; the template's own raise_exception
        raise UserError(
            f"{_where(tokenizer)}: cannot write a conversation of user and assistant turns "
            f"({error}); {_REMEDY}"
        ) from error


def _cut(tokenizer: "PreTrainedTokenizerFast", rendered: str) -> tuple[str, str, str, str]:
    """(opening, header, lead, between) of the text of a conversation of marks."""
    literals = re.split("|".join(_MARKS), rendered)
    if tuple(re.findall("|".join(_MARKS), rendered)) != _MARKS:
        raise _not_append_only(tokenizer, "it drops, repeats or reorders the turns")
    opening, header, between, header_2, between_2, prompt = literals
    if header_2 != header or between_2 != between:
        raise _not_append_only(tokenizer, "it writes earlier turns differently from later ones")
    lead = header.removeprefix(prompt)
    if not header.startswith(prompt) or lead.strip():
        raise _not_append_only(
            tokenizer,
            f"it puts {prompt!r} before what the assistant is to write, "
            f"but {header!r} before what it has written",
        )
    return opening, prompt, lead, between


def _split(literal: str, names: Mapping[str, int]) -> Parts:
    """A template's literal as special ids and the texts between them."""
    if not names:
        return (literal,) if literal else ()
    longest_first = sorted(names, key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", literal)
    return tuple(names.get(piece, piece) for piece in pieces if piece)


def _plain_encoder(tokenizer: "PreTrainedTokenizerFast") -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer made to take special tokens' names for plain text, and `ChatFormat.blank`.

    SentencePiece reads a run of text as if a blank stood before it. That depends on what stands
    before the run, which a tokenizer that is given the run alone cannot know.
    """
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, cuts = stored["normalizer"] or {}, stored["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [])
    others = [step for step in steps if step != {"type": "Prepend", "prepend": "\u2581"}]
    if others != steps:
        normalizer["normalizers"] = others
    if cuts.get("prepend_scheme") == "first":  # the first run of a conversation only
        cuts["prepend_scheme"] = "never"
    with reading(tokenizer.name_or_path):
        encoder = tokenizers.Tokenizer.from_str(json.dumps(stored))
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder, others != steps


def _check(
    fmt: ChatFormat,
    tokenizer: "PreTrainedTokenizerFast",
    template: str | None,
    names: Mapping[str, int],
) -> None:
    """Compares the format with the template itself, on token ids."""
    for probe in _PROBES:
        ids: list[int] = []
        for k, (observation, response) in enumerate(probe):
            ids += fmt.next_turn(observation) if k else fmt.first_turn("", observation)
            text = _render(tokenizer, template, probe[:k], observation)
            at_once = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            if ids != at_once:
                raise _not_append_only(
                    tokenizer,
                    f"with the turn {observation!r} added it gives other tokens for the "
                    f"conversation than turn by turn: {_difference(fmt, ids, at_once)}",
                )
            ids += fmt.response(response)
    forged = fmt.special.intersection(fmt._encode([" ".join(names) + "".join(names)]))
    if forged:
        raise UserError(
            f"{_where(tokenizer)}: special tokens {sorted(forged)} come out of plain text, so an "
            f"observation could forge the border of a turn; {_REMEDY}"
        )


def _check_bos(fmt: ChatFormat, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuses a second beginning of the sequence, at the start or at a later turn.

    SmolLM2's is also the beginning of a turn, and others' the end of one: those may repeat.
    """
    bos = tokenizer.bos_token_id
    if bos is None or bos in (fmt.end_of_turn, *fmt.header):
        return
    if fmt.first_turn("", "x").count(bos) > 1 or bos in fmt.next_turn("x"):
        raise _not_append_only(
            tokenizer,
            f"{tokenizer.bos_token}, the beginning of a sequence, comes more than once in a "
            "conversation",
        )


def _built_in(tokenizer: "PreTrainedTokenizerFast", name: str) -> str:
    """The template of a built-in format.

    Raises:
      UserError: the tokenizer lacks a special token of it.
    """
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    missing = sorted(set(re.findall(r"<\|\w+\|>", TEMPLATES[name])) - special)
    if missing:
        raise UserError(
            f"--chat_format={name}: {tokenizer.name_or_path}: the tokenizer has no special token "
            f"{', '.join(missing)}; leave the flag out, or choose another format or model"
        )
    return TEMPLATES[name]


def _difference(fmt: ChatFormat, ours: Sequence[int], template: Sequence[int]) -> str:
    """A few tokens of both from where they part, for the error message."""
    same = len(os.path.commonprefix([list(ours), list(template)]))
    show = [
        fmt.encoder.decode(list(ids[same : same + 8]), skip_special_tokens=False)
        for ids in (ours, template)
    ]
    return f"{show[0]!r} turn by turn, {show[1]!r} as a whole"


_REMEDY = (
    "give --chat_format=chatml or --chat_format=llama3, a built-in format with the special tokens "
    "of the model's family, choose another instruct model, or set chat_template in the folder's "
    "tokenizer_config.json to one that writes each turn the same way wherever it stands"
)


def _where(tokenizer: "PreTrainedTokenizerFast") -> str:
    return f"{tokenizer.name_or_path}: the chat template"


def _not_append_only(tokenizer: "PreTrainedTokenizerFast", reason: str) -> UserError:
    return UserError(f"{_where(tokenizer)} is not append-only: {reason}; {_REMEDY}")
