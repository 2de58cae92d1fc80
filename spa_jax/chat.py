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
they are those that the template gives for the whole conversation.

Nobody can forge the border of a turn: the *name* of a special token, or of one that stands in what
the template puts around the messages, stays plain text inside an observation or a response, however
the tokenizer marks that token.  In what the policy reads the name of any token that the template
speaks of stays text too (a tool's, a thought's).
"""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import tokenizers

from spa_jax.chat_template import (
    TEMPLATE,
    Template,
    Turns,
    built_in,
    not_append_only,
    remedy,
    split_name,
    where,
)
from spa_jax.errors import UserError
from spa_jax.texts import replace_surrogates
from spa_jax.tokenizer import reading
from spa_jax.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Parts = tuple[int | str, ...]  # ids of special tokens, and text between them

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
      special: the ids of all special tokens, and of those that make the borders of turns.
      blank: whether a run of text begins as if a blank stood before it (SentencePiece).
      encoder: the tokenizer, which takes the names of `special` for plain text and adds no blank.
      reader: the same, which takes the names of all tokens that the template speaks of for text.
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
    reader: tokenizers.Tokenizer = dataclasses.field(repr=False, compare=False)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerFast", name: str = TEMPLATE
    ) -> "ChatFormat":
        """Reads the format off a tokenizer's chat template, or a built-in one, and checks it.

        Args:
          tokenizer: is left as it is.
          name: "template" for the tokenizer's own, or one of `TEMPLATES`; with "@2024-07-26"
            behind it, a template that asks for the day is told that one.

        Raises:
          UserError: the tokenizer has no chat template, or one that is not append-only: it
            changes, drops or moves earlier turns, ends no turn with a special token, merges
            tokens over the border of a turn, begins a conversation twice or tells the date; or it
            lacks a token of the built-in format.
        """
        name, day = split_name(name)
        template = None if name == TEMPLATE else built_in(tokenizer, name)
        write = Template(tokenizer, template, day)
        marks = [*zip(_MARKS[::2], _MARKS[1::2], strict=False)]
        opening, header, lead, between = _cut(tokenizer, write.once(marks, _MARKS[4]))
        borders, named = _names(tokenizer, (opening, header, between), template)
        tail = _split(between, named)
        if not tail or tail[0] not in borders.values():
            raise not_append_only(
                tokenizer, f"no special token ends an assistant turn; {between!r} follows it"
            )
        end_of_turn = tail[0]
        assert isinstance(end_of_turn, int)
        encoder, blank = _plain_encoder(tokenizer, borders)
        reader, _ = _plain_encoder(tokenizer, named)
        padded = write([], f" {_MARKS[0]} ")
        fmt = cls(
            end_of_turn=end_of_turn,
            opening=_split(opening, named),
            header=_split(header, named),
            lead=lead,
            between=tail[1:],
            strip=f" {_MARKS[0]} " not in padded,
            special=frozenset(borders.values()),
            blank=blank,
            encoder=encoder,
            reader=reader,
        )
        _check(fmt, tokenizer, write, named)
        _check_bos(fmt, tokenizer)
        return fmt

    def first_turn(self, instruction: str, observation: str) -> list[int]:
        """Everything up to where the policy writes its first response.

        BOS and a default system message, if the template has them; a user turn with the
        instruction, an empty line and the observation (without an instruction just that); the
        header of the assistant's turn.
        """
        text = f"{instruction}\n\n{observation}" if instruction else observation
        return self._encode(self.reader, [*self.opening, self._content(text), *self.header])

    def next_turn(self, observation: str) -> list[int]:
        """What follows the policy's end of turn: the next user turn and the assistant's header."""
        parts = [*self.between, self._content(observation), *self.header]
        return self._encode(self.reader, parts)

    def response(self, text: str) -> list[int]:
        """The policy's tokens for a text: the text's ids and the end of turn."""
        follows_text = not self.header or isinstance(self.header[-1], str)
        ids = self._encode(self.encoder, [self.lead + text], follows_text)
        return [*ids, self.end_of_turn]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        text = self.encoder.decode([i for i in ids if i not in self.special])
        return text.removeprefix(self.lead)

    def _content(self, text: str) -> str:
        return text.strip() if self.strip else text

    def _encode(
        self,
        encoder: tokenizers.Tokenizer,
        parts: Iterable[int | str],
        follows_text: bool = False,
    ) -> list[int]:
        """Ids of parts; neighbouring texts are one run, encoded together.

        Args:
          encoder: of the texts.
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
                ids += encoder.encode(text, add_special_tokens=False).ids
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


def _names(
    tokenizer: "PreTrainedTokenizerFast", literals: Sequence[str], template: str | None
) -> tuple[dict[str, int], dict[str, int]]:
    """The tokens that no text may become: name -> id.

    Args:
      tokenizer: which may mark any of them as special or not.
      literals: what the template puts around messages.
      template: the built-in one; None: the tokenizer's own.

    Returns:
      Those that neither side may write: special ones, and those in the literals; and with them
      all that the policy may not read out of a text: those that the template speaks of.
    """
    around = "".join(literals)
    spoken = f"{template or ''}{tokenizer.chat_template or ''}{around}"
    known = tokenizer.added_tokens_decoder.items()
    borders = {t.content: i for i, t in known if t.special or t.content in around}
    named = {t.content: i for i, t in known if t.content in spoken and t.content.strip()}
    return borders, borders | named


def _cut(tokenizer: "PreTrainedTokenizerFast", rendered: str) -> tuple[str, str, str, str]:
    """(opening, header, lead, between) of the text of a conversation of marks."""
    literals = re.split("|".join(_MARKS), rendered)
    if tuple(re.findall("|".join(_MARKS), rendered)) != _MARKS:
        raise not_append_only(tokenizer, "it drops, repeats or reorders the turns")
    opening, header, between, header_2, between_2, prompt = literals
    if header_2 != header or between_2 != between:
        raise not_append_only(tokenizer, "it writes earlier turns differently from later ones")
    lead = header.removeprefix(prompt)
    if not header.startswith(prompt) or lead.strip():
        raise not_append_only(
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


def _plain_encoder(
    tokenizer: "PreTrainedTokenizerFast", plain: Collection[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer made to take the names of tokens for plain text, and `ChatFormat.blank`.

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
    for token in stored["added_tokens"]:
        token["special"] = token["special"] or token["content"] in plain
    with reading(tokenizer.name_or_path):
        encoder = tokenizers.Tokenizer.from_str(json.dumps(stored))
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder, others != steps


def _check(
    fmt: ChatFormat,
    tokenizer: "PreTrainedTokenizerFast",
    write: Template,
    named: Mapping[str, int],
) -> None:
    """Compares the format with the template itself, on token ids."""
    for probe in _PROBES:
        ids: list[int] = []
        for k, (observation, response) in enumerate(probe):
            ids += fmt.next_turn(observation) if k else fmt.first_turn("", observation)
            text = write(probe[:k], observation)
            at_once = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            if ids != at_once:
                raise not_append_only(
                    tokenizer,
                    f"with the turn {observation!r} added it gives other tokens for the "
                    f"conversation than turn by turn: {_difference(fmt, ids, at_once)}",
                )
            ids += fmt.response(response)
    text = " ".join(named) + "".join(named)
    forged = fmt.special.intersection(fmt._encode(fmt.encoder, [text]))
    forged |= set(named.values()).intersection(fmt._encode(fmt.reader, [text]))
    if forged:
        raise UserError(
            f"{where(tokenizer)}: special tokens {sorted(forged)} come out of plain text, so an "
            f"observation could forge the border of a turn; {remedy(tokenizer)}"
        )


def _check_bos(fmt: ChatFormat, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuses a second beginning of the sequence, at the start or at a later turn.

    SmolLM2's is also the beginning of a turn, and others' the end of one: those may repeat.
    """
    bos = tokenizer.bos_token_id
    if bos is None or bos in (fmt.end_of_turn, *fmt.header):
        return
    if fmt.first_turn("", "x").count(bos) > 1 or bos in fmt.next_turn("x"):
        raise not_append_only(
            tokenizer,
            f"{tokenizer.bos_token}, the beginning of a sequence, comes more than once in a "
            "conversation",
        )


def _difference(fmt: ChatFormat, ours: Sequence[int], template: Sequence[int]) -> str:
    """A few tokens of both from where they part, for the error message."""
    same = len(os.path.commonprefix([list(ours), list(template)]))
    show = [
        fmt.encoder.decode(list(ids[same : same + 8]), skip_special_tokens=False)
        for ids in (ours, template)
    ]
    return f"{show[0]!r} turn by turn, {show[1]!r} as a whole"
