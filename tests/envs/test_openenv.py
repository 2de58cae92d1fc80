"""OpenEnv's protocol in both directions, against the real package `openenv-core`."""

import dataclasses
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from spa_jax import store
from spa_jax.config import EnvConfig
from spa_jax.envs import boundary, protocol
from spa_jax.envs.client import EnvClient
from spa_jax.envs.local import LocalServer
from spa_jax.envs.openenv import (
    EXTENSION,
    OpenEnvClient,
    OpenEnvMapping,
    TextWire,
    complete_mapping,
    seed_of,
)
from spa_jax.envs.protocol import EnvError
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig
from tests import programs

_REPOSITORY = Path(__file__).parents[2]


def _real_client():
    return pytest.importorskip("openenv.core.generic_client").GenericEnvClient


def _real_types():
    return pytest.importorskip("openenv.core.env_server.types")


def _make(env: str, games: Path, root: Path) -> str:
    """A little data of an environment."""
    if env == "alfworld":
        return str(games)
    if env == "webshop":
        from spa_jax.envs.webshop.generate import generate

        return str(generate(root / "shop", products=60, goals=20, seed=5))
    from spa_jax.envs.virtualhome.generate import generate as generate_homes

    generate_homes(root / "homes" / "train", 2, 1)
    return str(root / "homes")


# --- the package's client, our servers ------------------------------------------------------


@pytest.mark.parametrize("env", ["alfworld", "webshop", "virtualhome"])
def test_the_packages_client_drives_our_servers(env, games, tmp_path):
    """A whole episode of the expert, states and errors, and the HTTP pages by their models."""
    real, types = _real_client(), _real_types()
    config = ServerConfig(_make(env, games, tmp_path), env=env, prompt="short", max_sessions=1)
    with LocalServer(config, start_deadline_s=120, token="") as server:
        task = EnvClient(server.address).tasks("train")[0].task
        with real(base_url=server.address, message_timeout_s=300).sync() as client:
            result = client.reset(task=task, split="train", seed=1, expert=True)
            assert result.observation["instruction"] and result.observation["task"] == task
            steps = 0
            while not result.done:
                result = client.step({"text": result.observation["expert_action"]})
                steps += 1
            assert (result.reward, result.observation["success"]) == (1.0, True)
            assert client.state()["step_count"] == steps > 0
            with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
                client.step({"word": "look"})
            with real(base_url=server.address).sync() as other:
                with pytest.raises(RuntimeError, match="CAPACITY_REACHED"):
                    other.reset()
            assert not client.reset(seed=3).done  # a client that knows only seeds
        _pages_are_openenvs(server.address, types)


def _pages_are_openenvs(address: str, types) -> None:
    def get(path: str, body: bytes | None = None) -> dict:
        request = urllib.request.Request(address + path, data=body)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    assert types.HealthResponse(**get("/health")).status == types.HealthStatus.HEALTHY
    types.EnvironmentMetadata(**get("/metadata"))
    schema = types.SchemaResponse(**get("/schema"))
    assert schema.action["required"] == ["text"]
    types.State(**get("/state"))
    seeded = types.ResetRequest(seed=2).model_dump_json().encode()
    reset = types.ResetResponse(**get("/reset", seeded))
    assert not reset.done and set(reset.observation) < set(schema.observation["properties"])
    step = types.StepRequest(action={"text": "nonsense"}).model_dump_json().encode()
    assert types.StepResponse(**get("/step", step)).observation["grounded"] is False


def test_our_codes_are_openenvs():
    codes = {code.value for code in _real_types().WSErrorCode}
    ours = {value for name, value in vars(protocol).items() if name.isupper()}
    ours -= {protocol.NO_SERVER}  # a client's own, never on the wire
    assert ours <= codes and len(ours) == 7


# --- our client, the package's servers ------------------------------------------------------


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """The address of an environment that the package serves."""
    _real_types()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.envs.served_by_openenv"],
        cwd=_REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()


_MAPPING = {"success": "solved", "grounded": "!error", "reward_scale": 0.1}


@pytest.fixture
def write(tmp_path):
    """Writes a mapping's file, and gives the settings with it."""

    def written(mapping: dict, **settings) -> EnvConfig:
        path = tmp_path / "mapping.json"
        path.write_text(json.dumps(mapping))
        return EnvConfig(env="openenv", openenv_mapping=str(path), **settings)

    return written


def test_our_client_plays_an_environment_that_the_package_serves(echo, write):
    client = OpenEnvClient(echo, write(_MAPPING))
    client.health()
    task = client.tasks("train")[3]
    with client.session() as session:
        first = session.reset(task.task, "train", seed=99)
        digit = str(seed_of(task.task) % 10)
        assert first.text == f"say {digit}" and first.instruction.startswith("Read what")
        assert session.state()["episode_id"] == f"seed {seed_of(task.task)}"
        assert first.progress is None  # null: the environment does not know
        now = session.step("Thought: hm.\nAction: hello")
        assert (now.text, now.done, now.grounded, now.instruction) == ("hello", False, False, "")
        assert now.progress == 0 and session.step("hm").progress is None
        with pytest.raises(EnvError, match="told to") as caught:
            session.step("crash")
        assert (caught.value.code, caught.value.retryable) == (protocol.ENV_ERROR, True)
        now = session.step(digit)
        assert (now.done, now.success, now.grounded, now.reward) == (True, True, True, 1.0)
        assert now.progress == 1
        assert session.state()["step_count"] == 4


def test_the_environments_author_can_say_what_its_fields_mean(echo, write):
    """The observation's schema of `served_by_openenv` declares a mapping; a file wins over it."""
    client = OpenEnvClient(f"{echo}/declared", EnvConfig(env="openenv"))
    with client.session() as session:
        assert session.reset("train-0", "train").instruction == "Say the digit."
        assert not session.step("hello").grounded
        now = session.step(str(seed_of("train-0") % 10))
        assert (now.done, now.success, now.reward) == (True, True, 1.0)
    ours = write({"instruction": "Say it.", "grounded": ""}, openenv_reward_scale=0.05)
    with OpenEnvClient(f"{echo}/declared", ours).session() as session:
        assert session.reset("train-0", "train").instruction == "Say it."
        assert session.step("hello").grounded
        with pytest.raises(EnvError, match="'solved'.*reward=0.5, success=True contradict"):
            session.step(str(seed_of("train-0") % 10))


def test_a_full_server_of_the_package_is_waited_for(echo, write):
    env = write(_MAPPING)
    client = OpenEnvClient(echo, env)
    with client.session() as one, client.session() as two:
        one.reset("train-0", "train"), two.reset("train-1", "train")
        impatient = OpenEnvClient(echo, env, wait_s=0.5)
        with pytest.raises(EnvError) as caught, impatient.session() as three:
            three.reset("train-2", "train")
        assert (caught.value.code, caught.value.retryable) == (protocol.CAPACITY_REACHED, True)
    with client.session() as three:
        assert three.reset("train-2", "train").text.startswith("say ")


def test_what_cannot_be_is_told(echo, write):
    with pytest.raises(UserError, match='--openenv_mapping: "success": "won".*solved'):
        OpenEnvClient(echo, write({"success": "won"})).session()
    client = OpenEnvClient(echo, write(_MAPPING, openenv_reward_scale=1.0))
    with client.session() as session:
        session.reset("train-0", "train")
        with pytest.raises(EnvError, match="R = 10.*--openenv_reward_scale") as caught:
            session.step(str(seed_of("train-0") % 10))
        assert caught.value.code == protocol.USER_ERROR
        with pytest.raises(EnvError, match="no expert"):
            session.reset("train-0", "train", expert=True)


def test_exploring_an_environment_that_the_package_serves(echo, tmp_path):
    from tests import tiny  # it loads JAX

    policy = tiny.tiny_policy(tmp_path / "tiny")
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"success": "solved", "grounded": "!error"}))
    flags = (
        "--env=openenv",
        f"--env_address={echo}",
        f"--policy={policy}",
        "--openenv_tasks=3",
        "--openenv_reward_scale=0.1",
        f"--openenv_mapping={mapping}",
        "--split=explore",
        "--rollouts=2",
        "--slots=2",
        "--max_steps=3",
        "--max_new_tokens=8",
        "--context_length=256",
        f"--workdir={tmp_path}",
    )
    assert "episodes=6" in programs.succeed("explore", *flags)
    played = store.read(tmp_path / "iteration_0" / "explore" / "trajectories.jsonl")
    assert {t.task for t in played} == {"explore-0", "explore-1", "explore-2"}
    assert all(t.env == "openenv" and t.steps[0].observation.startswith("say ") for t in played)
    assert all(t.instruction.startswith("Read what") for t in played)


# --- without the package --------------------------------------------------------------------


def test_our_own_server_is_such_an_environment_too():
    """The defaults suffice where fields have their usual names."""
    config = ServerConfig("tests.envs.odd:Odd", env="custom", max_sessions=1)
    with LocalServer(config, start_deadline_s=120, token="") as server:
        with OpenEnvClient(server.address, EnvConfig(env="openenv")).session() as session:
            first = session.reset("train-0", "train")
            assert first.text.endswith(f"with seed {seed_of('train-0')}")
            assert not session.step("dance").grounded
            now = session.step("win")
            assert (now.done, now.success, now.grounded, now.reward) == (True, True, True, 1.0)


def _schema(action: dict[str, str], observation: dict[str, str], required=()) -> dict:
    def properties(fields: dict[str, str]) -> dict:
        return {"properties": {name: {"type": kind} for name, kind in fields.items()}}

    return {
        "action": properties(action) | {"required": list(required)},
        "observation": properties(observation),
    }


def test_fields_are_chosen_by_what_is_needed_and_usual():
    schema = _schema(
        {"metadata": "object", "note": "string", "guess": "string"},
        {"reward": "number", "board": "string", "message": "string", "grounded": "boolean"},
        ["guess"],
    )
    fields = complete_mapping(schema, {})
    assert fields == OpenEnvMapping(text="message", action="guess", grounded="grounded")
    named = {"text": "board", "action": "note", "success": "!grounded"}
    assert complete_mapping(schema, named) == OpenEnvMapping(
        text="board", action="note", success="!grounded", grounded="grounded"
    )
    with pytest.raises(UserError, match="which field is the text.*left, right"):
        complete_mapping(_schema({"x": "string"}, {"left": "string", "right": "string"}), {})
    with pytest.raises(UserError, match="which field is the action"):
        complete_mapping(_schema({"x": "integer"}, {"left": "string"}), {})
    with pytest.raises(UserError, match="/schema"):
        complete_mapping([], {})


def test_a_schema_can_declare_a_mapping_and_given_keys_win():
    schema = _schema({"guess": "string"}, {"board": "string", "left": "string", "won": "boolean"})
    schema["observation"][EXTENSION] = {"text": "left", "success": "won", "reward_scale": 0.5}
    found = complete_mapping(schema, {"text": "board"})
    assert found == OpenEnvMapping(text="board", action="guess", success="won", reward_scale=0.5)
    schema["observation"][EXTENSION] = {"succes": "won"}
    with pytest.raises(UserError, match='x-spa-jax in the schema.*"succes".*mean "success"'):
        complete_mapping(schema, {})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"sucess": "won"}, 'no key "sucess"; did you mean "success"'),
        ({"openenv_text": "board"}, 'did you mean "text"'),
        ({"text": 3}, '"text" must be a text, not 3'),
        ({"reward_scale": "0.1"}, '"reward_scale" must be a number other than 0'),
        ({"reward_scale": 0}, '"reward_scale" must be a number other than 0'),
        ({"reward_scale": True}, '"reward_scale" must be a number other than 0'),
        ({"reward": ""}, '"reward" must be'),
        ({"progress": "!left"}, '"progress" must be a field with a number'),
        ({"progress": 1}, '"progress" must be a text'),
        ([1], "a mapping is a JSON object with keys of instruction, action"),
    ],
)
def test_a_wrong_mapping_is_refused_before_anything_is_asked(write, mapping, message):
    with pytest.raises(UserError, match=f"--openenv_mapping=.*mapping.json: .*{message}"):
        OpenEnvClient("http://127.0.0.1:1", write(mapping))


def test_a_mapping_that_is_no_file(tmp_path):
    (tmp_path / "half.json").write_text('{"text": ')
    for name in ("half.json", "none.json"):
        env = EnvConfig(env="openenv", openenv_mapping=str(tmp_path / name))
        with pytest.raises(UserError, match=f"{name} is no whole JSON file"):
            OpenEnvClient("http://127.0.0.1:1", env)


@pytest.mark.parametrize(
    ("choice", "rewards", "expected"),
    [
        ("last", [0.25, 0.25, 0.5], 0.5),
        ("sum", [0.25, 0.25, 0.5], 1.0),
        ("sum", [0.1, None, 0.2], 0.3),
        ("score", [9, 9, 9], 0.75),
        ("last", [0, 0, True], 1.0),
        ("last", [-5, 7, None], 0.0),
    ],
)
def test_which_reward_is_r(choice, rewards, expected):
    wire = TextWire(OpenEnvMapping(text="text", action="text", reward=choice))
    for _ in range(2):  # a reset begins anew
        wire.reset("a", "train", seed=0, expert=False, prompt="")
        wire.read({"observation": {"text": ""}, "reward": None, "done": False})
        for i, reward in enumerate(rewards):
            shown = {"text": "", "score": 0.75}
            wire.step("go", parsed=True)
            now = wire.read({"observation": shown, "reward": reward, "done": i == 2})
        assert now.reward == expected
        assert now.success == (expected == 1.0)


def test_flags_of_rewards_and_success(write):
    client = OpenEnvClient("http://127.0.0.1:1", write({}, openenv_reward_range="-1,1"))
    schema = _schema({"guess": "string"}, {"board": "string", "won": "boolean"})
    schema["observation"][EXTENSION] = {"reward_scale": 0.5}
    assert complete_mapping(schema, client._given).reward_range == (-1, 1)
    assert complete_mapping(schema, {}).reward_scale == 0.5
    for flags, message in (
        ({"openenv_reward_range": "1,-1"}, "two numbers, the lesser first"),
        ({"openenv_reward_range": "a,b"}, "two numbers"),
        ({"openenv_reward_range": "0"}, "two numbers"),
        ({"openenv_reward_range": "0,nan"}, "two numbers"),
        ({"openenv_reward_range": "0,2", "openenv_reward_scale": 0.5}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=f"--openenv_reward_range=.*{message}"):
            OpenEnvClient("http://127.0.0.1:1", write({}, **flags))
    with pytest.raises(UserError, match='"success": "lost": there is no such field'):
        given = OpenEnvClient("http://127.0.0.1:1", write({}, openenv_success="lost"))._given
        complete_mapping(schema, given)


_TOLD = _schema({"guess": "string"}, {"text": "string", "progress": "number", "share": "number"})


@pytest.mark.parametrize(
    ("schema", "given", "field"),
    [
        (_TOLD, {}, "progress"),
        (_TOLD, {"progress": "share"}, "share"),
        (_TOLD, {"progress": "none"}, ""),
        (_schema({"guess": "string"}, {"text": "string"}), {}, ""),
        (_schema({"guess": "string"}, {"text": "string", "progress": "string"}), {}, ""),
    ],
)
def test_which_field_is_the_progress(schema, given, field):
    mapping = complete_mapping(schema, given)
    assert mapping.progress == field
    shown = {"text": "", "progress": 0.25, "share": 0.75}
    told = {"": None, "progress": 0.25, "share": 0.75}
    assert _read(mapping, shown).progress == told[field]
    assert _read(mapping, {"text": ""}).progress is None
    assert _read(mapping, {"text": "", "progress": None, "share": None}).progress is None


def _read(mapping: OpenEnvMapping, shown: dict) -> protocol.Observation:
    return TextWire(mapping).read({"observation": shown, "reward": None, "done": False})


@pytest.mark.parametrize("value", [57, -1, "half", True, float("nan"), [1]])
def test_a_field_that_is_no_progress_is_named(value):
    """With what to do about it: the field may mean something else."""
    with pytest.raises(EnvError, match="field 'progress'.*'?none'?.*--openenv_mapping") as caught:
        _read(complete_mapping(_TOLD, {}), {"text": "", "progress": value})
    assert caught.value.code == protocol.USER_ERROR
    assert f"not {value!r}" in str(caught.value)


def test_a_progress_that_is_not_there_is_refused():
    with pytest.raises(UserError, match='"progress": "done": there is no.*progress, share'):
        complete_mapping(_TOLD, {"progress": "done"})


def test_our_servers_send_their_progress_on_the_wire():
    """It is in /schema, and a server of before it is read as one that does not know."""
    config = ServerConfig("tests.envs.odd:Marching", env="custom", max_sessions=1)
    with LocalServer(config, start_deadline_s=120, token="") as server:
        with urllib.request.urlopen(f"{server.address}/schema", timeout=60) as answer:
            assert "progress" in json.load(answer)["observation"]["properties"]
        for client in (
            EnvClient(server.address),
            OpenEnvClient(server.address, EnvConfig(env="openenv")),
        ):
            with client.session() as session:
                told = [session.reset("train_0", "train")] + [session.step("on") for _ in range(4)]
            assert [now.progress for now in told] == [0, 0.25, 0.5, 0.75, 1]
    wire = protocol.observation_to_wire(told[1])
    assert boundary.observation_from_wire(wire) == told[1]
    del wire["observation"]["progress"]
    assert boundary.observation_from_wire(wire) == dataclasses.replace(told[1], progress=None)


def test_splits_have_different_seeds():
    client = OpenEnvClient("http://127.0.0.1:1", EnvConfig(openenv_tasks=500))
    train, heldout = client.tasks("train"), client.tasks("heldout")
    assert len({t.seed for t in train + heldout}) == 1000
    assert all(t.seed is not None and 0 <= t.seed < 2**31 for t in train)
    assert {t.layout for t in train}.isdisjoint({t.layout for t in heldout})
