"""What a policy's folder must agree on, and what it and its episodes remember."""

import json
import pathlib

import pytest

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
    with pytest.raises(UserError, match=r"tokenizer.json: ids up to 384, .*config.json .*size 384"):
        policy.load(folder)


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
