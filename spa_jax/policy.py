"""A policy read from its folder: weights, heads, tokenizer, chat format, how it is computed."""

import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING, Literal

import jax

from spa_jax import files, schema, tokenizer
from spa_jax.chat import TEMPLATE, ChatFormat
from spa_jax.config import DEFAULT_COMPUTE, ComputeConfig
from spa_jax.errors import UserError
from spa_jax.models import lora as lora_lib
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import huggingface, peft, pretrained, tensors
from spa_jax.models.kernels.choice import resolve
from spa_jax.runtime import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXPERT = "expert"  # in place of a policy's folder: the environment's own expert plays
ADAPTER = "adapter"  # a policy's own adapter, in its folder
TRUNK = "trunk"  # the policy that an estimator reads, in its folder, if it was trained with it
ABOUT = "spa_jax.json"  # beside a policy's weights: what they do not say
_Format = Literal["template", "chatml", "llama3"]  # TEMPLATE, and those of `chat.TEMPLATES`
POLICY_HELP = (
    "The pretrained policy: a Hugging Face folder, a GGUF file, or ORGANISATION/MODEL of the hub."
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy read from its folder.

    Attributes:
      folder: which was given.
      model: the folder of its config.json and tokenizer: `folder`, or an adapter's base.
      config: the model's shape.
      params: the weights, an adapter's merged.
      heads: "value", "progress": those that lie beside the weights.
      tokenizer: the tokenizer.
      chat_format: the name of its conversations' format, as in `config.ChatConfig`.
      version: the updates that made it.
      trunk: the policy whose hidden states its progress head reads; "": this one.
    """

    folder: pathlib.Path
    model: pathlib.Path
    config: ModelConfig
    params: Params
    heads: dict[str, Params]
    tokenizer: "PreTrainedTokenizerFast"
    chat_format: str
    version: int
    trunk: str = ""

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """The format; a stage that neither writes nor reads conversations needs none."""
        made = ChatFormat.from_tokenizer(self.tokenizer, self.chat_format)
        for i in (made.end_of_turn, *made.opening, *made.header, *made.between):
            if isinstance(i, int) and i >= self.config.vocab_size:
                raise UserError(
                    f"{self.model / 'tokenizer.json'}: the chat template writes token "
                    f"{self.tokenizer.convert_ids_to_tokens(i)!r} (id {i}), and the embedding has "
                    f"{self.config.vocab_size} rows; give another --chat_format, or resize the "
                    "embedding"
                )
        return made


def load(
    policy: str | os.PathLike[str],
    chat_format: str = TEMPLATE,
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> Policy:
    """Reads a Hugging Face folder, or a PEFT adapter's, with the heads beside it if there are any.

    Args:
      policy: the folder; or a GGUF file or a model of the hub, as `pretrained.resolve` takes it.
      chat_format: the format of a policy that was not trained here; ours remember theirs.
      compute: how its model is computed.

    Raises:
      UserError: the folder lacks something, its tokenizer has more ids than the embedding, it was
        trained in another chat format, or the attention asked for does not run here.
    """
    path = pretrained.resolve(policy)
    about = _about(path)
    if peft.is_adapter(path):
        trained_in = about.chat_format or chat_format
        base = load(peft.adapter_base(path), trained_in, compute)
        lora, adapter = peft.load_adapter(path, base.config)
        params = jax.device_get(lora_lib.merge(lora, base.params, adapter))
        return dataclasses.replace(
            base,
            folder=path,
            params=params,
            heads=tensors.load_heads(path),
            version=about.version,
            trunk=_trunk(path, about),
        )
    config, params = huggingface.load_pretrained(path)
    backend, trained_in = _conversations(path, chat_format)
    _check_vocabulary(path, backend, config)
    return Policy(
        folder=path,
        model=path,
        config=resolve(config, compute),
        params=params,
        heads=tensors.load_heads(path),
        tokenizer=backend,
        chat_format=trained_in,
        version=about.version,
        trunk=_trunk(path, about),
    )


def _check_vocabulary(
    path: pathlib.Path, backend: "PreTrainedTokenizerFast", config: ModelConfig
) -> None:
    """Refuses tokens beyond the embedding that a text could hold; a special one is in no text."""
    special = {i for i, token in backend.added_tokens_decoder.items() if token.special}
    beyond = {i: token for token, i in backend.get_vocab().items() if i >= config.vocab_size}
    written = sorted(set(beyond) - special)
    if written:
        raise UserError(
            f"{path / 'tokenizer.json'}: ids up to {max(beyond)} (the first beyond is "
            f"{written[0]}, {beyond[written[0]]!r}), but {path / 'config.json'} and tensor "
            f"model.embed_tokens.weight have vocab_size {config.vocab_size}: they belong to "
            "different models, or the embedding was not resized when tokens were added"
        )


def check_chat_format(policy: str | os.PathLike[str], chat_format: str) -> None:
    """Refuses a policy that has no chat format, before anything is done with it.

    Raises:
      UserError: as `load` and `Policy.chat` do; the weights are not read.
    """
    ChatFormat.from_tokenizer(*_conversations(pretrained.resolve(policy), chat_format))


def _conversations(path: pathlib.Path, chat_format: str) -> tuple["PreTrainedTokenizerFast", str]:
    """The tokenizer of a folder, and the name of its conversations' format."""
    trained_in = _about(path).chat_format or chat_format
    if chat_format not in (TEMPLATE, trained_in):
        raise UserError(
            f"--chat_format={chat_format}: the policy was trained with {trained_in}, says "
            f"{path / ABOUT}; leave the flag out"
        )
    return tokenizer.load(path), trained_in


class _About(schema.Schema):
    """What we noted of a policy of ours."""

    version: schema.Count = 0
    chat_format: _Format | None = None
    progress_trunk: schema.Text = ""


def _trunk(path: pathlib.Path, about: "_About") -> str:
    """The policy that a progress head reads, which is noted relative to the head's folder."""
    noted = about.progress_trunk
    return str((path / noted).resolve()) if noted else ""


def _about(path: pathlib.Path) -> _About:
    """What we noted of a policy of ours; nothing for others."""
    file = path / ABOUT
    if not file.exists():
        return _About()
    return schema.read(_About, file, remedy="copy the policy's folder again")


class _Chat(schema.Schema):
    """How the episodes of a folder were written."""

    chat_format: _Format
    end_of_turn: schema.Count


class _Generation(schema.Schema):
    """What ends a turn beside the chat format's token."""

    eos_token_id: schema.Count | list[schema.Count] | None = None


def record_chat_format(folder: pathlib.Path, policy: Policy) -> None:
    """Writes the chat format of a folder's episodes beside them.

    Raises:
      UserError: the episodes that are there were played in another one.
    """
    if not distributed.is_first():
        return
    path = folder / "chat.json"
    ours = {"chat_format": policy.chat_format, "end_of_turn": policy.chat.end_of_turn}
    if path.exists() and any(folder.glob("trajectories*.jsonl")):
        theirs = _read_chat(path)
        if theirs.model_dump() != ours:
            raise UserError(
                f"{path}: the episodes there are in the chat format {theirs.chat_format}, the "
                f"policy's is {policy.chat_format}; give that --chat_format, or another folder"
            )
    files.write_json(path, ours)


def recorded_chat_format(folder: pathlib.Path) -> str:
    """The chat format of a folder's episodes; the template's own if none is recorded."""
    path = folder / "chat.json"
    return _read_chat(path).chat_format if path.exists() else TEMPLATE


def _read_chat(path: pathlib.Path) -> _Chat:
    return schema.read(
        _Chat,
        path,
        remedy="write the chat_format and end_of_turn of its episodes there, or remove the folder",
    )


def other_ends(policy: Policy) -> list[int]:
    """The ids that end a turn beside the chat format's, by the model's generation_config.json."""
    path = policy.model / "generation_config.json"
    if not path.exists():
        return []
    given = schema.read(_Generation, path, remedy="fetch the file again").eos_token_id
    ids = given if isinstance(given, list) else [given]
    return [i for i in ids if i is not None and i != policy.chat.end_of_turn]
