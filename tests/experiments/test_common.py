"""What a policy's folder must agree on, and how long its episodes may be."""

import json
import pathlib

import pytest

from experiments import common, sft
from spa_jax import chat, tokenizer
from spa_jax.config import EnvConfig, LoraConfig, RowsConfig, SamplingConfig
from spa_jax.errors import UserError
from spa_jax.models.io import huggingface
from spa_jax.models.kernels import choice
from spa_jax.stage_config import SftConfig
from spa_jax.trajectory import Status, Step, Trajectory
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
        common.load_policy(folder)


def test_nothing_longer_than_the_model_can_attend_over(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    policy = common.load_policy(folder)
    with pytest.raises(UserError, match="--context_length: 64 tokens .* 20"):
        common.make_engine(policy, SamplingConfig(context_length=64), 2, 0)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"env": "openenv"}, "--env=openenv needs --env_address"),
        ({"env": "custom"}, "--custom_data is not set: give MODULE:CLASS"),
        ({"env": "webshop"}, "--webshop_data is not set.*webshop.generate"),
        ({"env_address": "http://127.0.0.1:1", "env_token_file": "/no"}, "--env_token_file=/no"),
        ({"env_address": "here"}, "http://host:port"),
    ],
)
def test_an_environment_that_is_not_said_whole(env, message, tmp_path):
    with pytest.raises(UserError, match=message):
        with common.open_env(EnvConfig(**env), 1, tmp_path / "log"):
            pass


@pytest.fixture
def thinking(tmp_path):
    """A policy whose own template drops earlier thoughts."""
    words = tiny.tiny_tokenizer(tmp_path / "words", test_chat.DROPS_THOUGHTS)
    config = tiny.tiny_config()
    huggingface.save_pretrained(tmp_path / "thinking", config, tiny.tiny_params(config), words)
    return tmp_path / "thinking"


def test_a_stage_without_conversations_needs_no_format(thinking):
    policy = common.load_policy(thinking)
    assert policy.config == choice.resolve(tiny.tiny_config())
    with pytest.raises(UserError, match="not append-only"):
        _ = policy.chat
    with pytest.raises(UserError, match="not append-only"):
        common.check_chat_format(thinking, "template")
    common.check_chat_format(thinking, "chatml")


def save(policy: common.Policy, out: pathlib.Path, version: int) -> None:
    whole = common.trainable(policy, 0, LoraConfig(), 0)
    whole.save(out, whole.parts.trained, {}, version)


def test_a_policy_remembers_its_chat_format(thinking, tmp_path):
    first = common.load_policy(thinking, "chatml")
    save(first, tmp_path / "trained", 3)
    again = common.load_policy(tmp_path / "trained")
    assert (again.chat_format, again.version) == ("chatml", 3)
    assert again.chat == first.chat
    # Other programs read the same format as the folder's own template.
    words = tokenizer.load(tmp_path / "trained")
    assert words.chat_template == chat.TEMPLATES["chatml"]
    assert chat.ChatFormat.from_tokenizer(words) == first.chat
    assert common.load_policy(tmp_path / "trained", "chatml").chat == first.chat
    save(again, tmp_path / "on", 4)
    assert common.load_policy(tmp_path / "on").chat == first.chat
    with pytest.raises(UserError, match="--chat_format=llama3: .*trained with chatml, says .*json"):
        common.load_policy(tmp_path / "trained", "llama3")


def test_episodes_remember_their_chat_format(thinking, folder, tmp_path):
    episodes = tmp_path / "explore"
    assert common.recorded_chat_format(episodes) == "template"
    common.record_chat_format(episodes, common.load_policy(folder))  # but nothing was played
    common.record_chat_format(episodes, common.load_policy(thinking, "chatml"))
    (episodes / "trajectories.jsonl").touch()
    common.record_chat_format(episodes, common.load_policy(thinking, "chatml"))
    assert common.recorded_chat_format(episodes) == "chatml"
    with pytest.raises(UserError, match="chat.json: .* format chatml, the policy's is template"):
        common.record_chat_format(episodes, common.load_policy(folder))


@pytest.mark.slow
def test_sft_trains_in_the_format_that_it_is_given(thinking, tmp_path):
    steps = (Step("You see a mug.", "<think>\nMug.\n</think>\n\ntake mug", "take mug", True),) * 2
    demo = Trajectory(
        env="alfworld",
        task="game",
        split="train",
        seed=0,
        attempt=0,
        policy="expert",
        status=Status.SUCCESS,
        final_reward=1.0,
        instruction="Do it.",
        steps=steps,
    )
    settings, rows = SftConfig(updates=1, batch_size=1), RowsConfig(128, 64, 16, 1)
    with pytest.raises(UserError, match="--chat_format=chatml"):
        sft.run(tmp_path / "sft", str(thinking), [demo], [], settings, rows, 0, LoraConfig())
    sft.run(tmp_path / "sft", str(thinking), [demo], [], settings, rows, 0, LoraConfig(), "chatml")
    assert common.load_policy(tmp_path / "sft" / "policy").chat_format == "chatml"
