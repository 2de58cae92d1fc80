"""What a policy's folder must agree on, and what it and its episodes remember."""

import json
import pathlib

import pytest
import tokenizers

from spa_jax import chat, chat_template, policy, tokenizer
from spa_jax.config import LoraConfig
from spa_jax.errors import UserError
from spa_jax.models.io import huggingface
from spa_jax.models.kernels import choice
from spa_jax.policy import Policy
from spa_jax.training import trainable
from tests import test_chat, tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.tiny_policy(tmp_path / "tiny")


def test_a_tokenizer_of_another_model_is_refused(folder):
    path = folder / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    size = 1 + max(vocabulary["model"]["vocab"].values())
    added = {"id": 384, "content": "<new>", "special": False} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    for i in range(size, 385):
        vocabulary["added_tokens"].append(added | {"id": i, "content": f"<new{i}>"})
    path.write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="json: ids up to 384 .*<new384>.*config.json .*size 384"):
        policy.load(folder)


def test_a_special_token_beyond_the_embedding_is_an_error_only_where_it_is_written(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "[PAD]"}
    path = folder / "tokenizer.json"
    words = tokenizers.Tokenizer.from_file(str(path))
    words.add_tokens([f" w{i}" for i in range(words.get_vocab_size(), 384)])  # up to the embedding
    words.add_special_tokens(["[PAD]"])
    words.save(str(path))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = policy.load(folder)
    assert loaded.tokenizer.convert_tokens_to_ids("[PAD]") == 384
    assert max(loaded.chat.first_turn("", "a [PAD] in plain text")) < 384
    written = tiny.CHATML.replace("<|im_start|>", "[PAD]<|im_start|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": written}))
    with pytest.raises(UserError, match=r"chat template writes token '\[PAD\]' \(id 384\)"):
        _ = policy.load(folder).chat


@pytest.fixture
def thinking(tmp_path):
    """A policy whose own template drops earlier thoughts."""
    words = tiny.tiny_tokenizer(tmp_path / "words", test_chat.DROPS_THOUGHTS)
    config = tiny.tiny_config()
    huggingface.save_pretrained(tmp_path / "thinking", config, tiny.tiny_params(config), words)
    return tmp_path / "thinking"


def test_a_stage_without_conversations_needs_no_format(thinking):
    loaded = policy.load(thinking)
    assert loaded.config == choice.resolve(tiny.tiny_config())
    with pytest.raises(UserError, match="not append-only"):
        _ = loaded.chat
    with pytest.raises(UserError, match="not append-only"):
        policy.check_chat_format(thinking, "template")
    policy.check_chat_format(thinking, "chatml")


def save(loaded: Policy, out: pathlib.Path, version: int) -> None:
    whole = trainable.make(loaded, lora=LoraConfig(), seed=0)
    whole.save(out, trained=whole.parts.trained, heads={}, version=version)


def test_a_policy_remembers_its_chat_format(thinking, tmp_path):
    first = policy.load(thinking, "chatml")
    save(first, tmp_path / "trained", 3)
    again = policy.load(tmp_path / "trained")
    assert (again.chat_format, again.version) == ("chatml", 3)
    assert again.chat == first.chat
    # Other programs read the same format as the folder's own template.
    words = tokenizer.load(tmp_path / "trained")
    assert words.chat_template == chat_template.TEMPLATES["chatml"]
    assert chat.ChatFormat.from_tokenizer(words) == first.chat
    assert policy.load(tmp_path / "trained", "chatml").chat == first.chat
    save(again, tmp_path / "on", 4)
    assert policy.load(tmp_path / "on").chat == first.chat
    with pytest.raises(UserError, match="--chat_format=llama3: .*trained with chatml, says .*json"):
        policy.load(tmp_path / "trained", "llama3")


def test_episodes_remember_their_chat_format(thinking, folder, tmp_path):
    episodes = tmp_path / "explore"
    assert policy.recorded_chat_format(episodes) == "template"
    policy.record_chat_format(episodes, policy.load(folder))  # but nothing was played
    policy.record_chat_format(episodes, policy.load(thinking, "chatml"))
    (episodes / "trajectories.jsonl").touch()
    policy.record_chat_format(episodes, policy.load(thinking, "chatml"))
    assert policy.recorded_chat_format(episodes) == "chatml"
    with pytest.raises(UserError, match="chat.json: .* format chatml, the policy's is template"):
        policy.record_chat_format(episodes, policy.load(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"), ("[", "not JSON"), ("[]", "valid dict"), ("\xff", "not JSON"),
        ('{"chat_format": "alpaca", "end_of_turn": 2}', "chat_format='alpaca': it must be 'templ"),
        ('{"chat_format": "template", "end_of_turn": "2"}', "end_of_turn='2'"),
        ('{"chat_format": "template"}', "end_of_turn is missing"),
    ],
)  # fmt: skip
def test_a_torn_chat_json_is_named(folder, tmp_path, text, message):
    (tmp_path / "trajectories.jsonl").touch()
    (tmp_path / "chat.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"chat.json: .*{message}.*; write the chat_format"):
        policy.recorded_chat_format(tmp_path)
    with pytest.raises(UserError, match=f"chat.json: .*{message}"):
        policy.record_chat_format(tmp_path, policy.load(folder))


def test_torn_files_beside_the_weights_are_named(folder):
    for text, message in (("{", "not JSON"), ('{"version": -3}', "version=-3: it must be great")):
        (folder / "spa_jax.json").write_text(text)
        with pytest.raises(UserError, match=f"spa_jax.json: {message}.*copy the policy's folder"):
            policy.load(folder)
    (folder / "spa_jax.json").unlink()
    loaded = policy.load(folder)
    other = folder / "generation_config.json"
    for text, ids in (('{"eos_token_id": [2, 1]}', [1]), ("{}", []), ('{"eos_token_id": 0}', [0])):
        other.write_text(text)
        assert policy.other_ends(loaded) == ids
    for text in ('{"eos_token_id": "2"}', '{"eos_token_id": -1}', "nonsense"):
        other.write_text(text)
        with pytest.raises(UserError, match="generation_config.json: .*fetch the file again"):
            policy.other_ends(loaded)
