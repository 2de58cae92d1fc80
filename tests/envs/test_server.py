"""A real server in a process of its own, spoken to over its socket."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import connect

from spa_jax.envs import protocol, serve
from spa_jax.envs.client import EnvClient, Session
from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import EnvError, Observation
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig

_REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(games: Path) -> Iterator[LocalServer]:
    with LocalServer(ServerConfig(str(games), prompt="short", max_sessions=3), token="") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LocalServer) -> EnvClient:
    return server.client()


def _gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within that time (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def _win(session: Session, task: str) -> list[Observation]:
    observations = [session.reset(task, "train", expert=True)]
    while not observations[-1].done:
        observations.append(session.step(observations[-1].expert_action))
        assert len(observations) < 50
    return observations


def _get(address: str, path: str) -> dict:
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        return json.load(answer)


def test_it_is_healthy_and_ends_with_its_block(games: Path) -> None:
    with LocalServer(ServerConfig(str(games))) as server:
        server.client().health()
        pid = server.pid
    assert _gone(pid, 0.5)


def test_an_episode(client: EnvClient) -> None:
    task = client.tasks("train")[0]
    with client.session() as session:
        observations = _win(session, task.task)
        state = session.state()
    first, last = observations[0], observations[-1]
    assert first.instruction.startswith("Solve the household task.")
    assert "Your task is to: " in first.text and first.expert_action
    assert (first.task, first.task_type) == (task.task, task.task_type)
    assert (last.reward, last.success, last.grounded, last.expert_action) == (1.0, True, True, "")
    assert all(o.reward == 0.0 and o.instruction == "" for o in observations[1:-1])
    assert state["step_count"] == len(observations) - 1
    assert state["episode_id"] == f"train/{task.task}"


def test_prompt_and_expert_are_chosen_at_the_reset(client: EnvClient) -> None:
    task = client.tasks("train")[1].task
    with client.session() as session:
        paper = session.reset(task, "train", prompt="paper")
        assert paper.instruction.startswith("Interact with a household")
        assert paper.expert_action == session.step("look").expert_action == ""
        with pytest.raises(EnvError, match="long") as caught:
            session.reset(task, "train", prompt="long")
        assert (caught.value.code, caught.value.retryable) == (protocol.USER_ERROR, False)
        assert session.reset(task, "train").instruction.startswith("Solve")


def test_both_wordings_and_nonsense_over_the_wire(client: EnvClient) -> None:
    tasks = [t for t in client.tasks("train") if t.task_type == "pick_and_place_simple"]
    with client.session() as session:
        observation = session.reset(tasks[0].task, "train", expert=True)
        assert not session.step("Thought: hm\nAction: fly to the moon").grounded
        while not observation.expert_action.startswith("put "):
            observation = session.step("Action: " + observation.expert_action)
        put, held = observation.expert_action, observation.expert_action.split(" in/on ")[0]
        move = put.replace("put ", "move ").replace(" in/on ", " to ")
        assert session.step(move).success
        assert held.startswith("put ")


def test_an_action_is_parsed_once(client: EnvClient) -> None:
    """Of a text the server reads the action; what is said to be one is taken as it is."""
    task = client.tasks("train")[0].task
    with client.session() as session:
        session.reset(task, "train")
        assert session.step("Thought: hm\nAction: look").grounded
        assert session.step("look", parsed=True).grounded
        assert not session.step("Action: look", parsed=True).grounded


def test_sessions_run_side_by_side_up_to_the_limit(client: EnvClient) -> None:
    tasks = client.tasks("train")
    with client.session() as one, client.session() as two:
        first, second = one.reset(tasks[0].task, "train"), two.reset(tasks[1].task, "train")
        assert first.text != second.text
        assert one.state()["worker"] != two.state()["worker"]
        with client.session() as three:
            three.reset(tasks[2].task, "train")
            with EnvClient(client.http, wait_s=0).session() as four:
                with pytest.raises(EnvError) as caught:
                    four.reset(tasks[3].task, "train")
            assert (caught.value.code, caught.value.retryable) == ("CAPACITY_REACHED", True)
            with concurrent.futures.ThreadPoolExecutor(1) as thread, client.session() as waiting:
                answer = thread.submit(waiting.reset, tasks[3].task, "train")
                time.sleep(1)
                assert not answer.done()
                three.close()
                assert "Your task is to: " in answer.result(timeout=20).text


def test_idle_workers_are_used_again(client: EnvClient) -> None:
    task = client.tasks("train")[0].task
    with client.session() as session:
        session.reset(task, "train")
        worker = session.state()["worker"]
    with client.session() as session:
        session.reset(task, "train")
        assert session.state()["worker"] == worker


def test_a_killed_worker_is_an_error_and_a_reset_goes_on(client: EnvClient) -> None:
    task = client.tasks("train")[0].task
    with client.session() as session:
        session.reset(task, "train")
        worker = session.state()["worker"]
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(EnvError) as caught:
            session.step("look")
        assert (caught.value.code, caught.value.retryable) == (protocol.ENV_ERROR, True)
        with pytest.raises(EnvError, match="reset"):
            session.step("look")
        assert _win(session, task)[-1].success
        assert session.state()["worker"] != worker


def test_a_worker_killed_while_idle_is_not_noticed(client: EnvClient) -> None:
    task = client.tasks("train")[0].task
    with client.session() as session:
        session.reset(task, "train")
        os.kill(session.state()["worker"], signal.SIGKILL)
        assert _gone(session.state()["worker"])
        assert _win(session, task)[-1].success


def test_workers_are_replaced_after_their_games_and_deadlines_hold(games: Path) -> None:
    config = ServerConfig(str(games), games_per_worker=2, step_deadline_s=0.5)
    with LocalServer(config) as server:
        client = server.client()
        task = client.tasks("train")[0].task
        workers = []
        with client.session() as session:
            for _ in range(4):
                session.reset(task, "train")
                workers.append(session.state()["worker"])
            assert workers[0] == workers[1] != workers[2] == workers[3]
            assert _gone(workers[0])
            os.kill(workers[3], signal.SIGSTOP)  # it hangs
            with pytest.raises(EnvError, match="longer than 0.5 s"):
                session.step("look")
            assert _gone(workers[3])
            assert session.reset(task, "train").grounded


def test_games_that_are_not_there_or_half_written(games: Path, tmp_path: Path) -> None:
    shutil.copytree(games, tmp_path / "data")
    with LocalServer(ServerConfig(str(tmp_path / "data"))) as server:
        client = server.client()
        broken, whole = client.tasks("train")[:2]
        path = tmp_path / "data" / "train" / broken.task / "game.tw-pddl"
        path.write_text(path.read_text()[:100])
        with client.session() as session:
            for task, message in ((broken.task, str(path)), ("../../x", "no game")):
                with pytest.raises(EnvError, match=message) as caught:
                    session.reset(task, "train")
                assert (caught.value.code, caught.value.retryable) == ("FACTORY_ERROR", False)
            assert session.reset(whole.task, "train").grounded
        with pytest.raises(UserError, match="no split 'valid'.*train"):
            client.tasks("valid")


def test_the_wire_is_openenvs(server: LocalServer) -> None:
    def ask(message: object) -> dict:
        socket.send(message if isinstance(message, str) else json.dumps(message))
        return json.loads(socket.recv(timeout=20))

    with connect(server.address.replace("http", "ws") + "/ws") as socket:
        answer = ask({"type": "reset", "data": {"seed": 3}})  # a client that knows only seeds
        assert answer["type"] == "observation"
        assert set(answer["data"]) == {"observation", "reward", "done"}
        answer = ask({"type": "step", "data": {"text": "look", "metadata": {}}})
        assert answer["data"]["observation"]["grounded"] is True
        assert (answer["data"]["reward"], answer["data"]["done"]) == (0.0, False)
        assert ask({"type": "state"})["data"]["step_count"] == 1
        for message, code in (
            ("{", "INVALID_JSON"),
            ([], "VALIDATION_ERROR"),
            ({"type": "jump"}, "UNKNOWN_TYPE"),
            ({"type": "step", "data": {}}, "VALIDATION_ERROR"),
            ({"type": "step", "data": {"text": 3}}, "VALIDATION_ERROR"),
            ({"type": "reset", "data": [1]}, "VALIDATION_ERROR"),
        ):
            answer = ask(message)
            assert (answer["type"], answer["data"]["code"]) == ("error", code)
        socket.send(json.dumps({"type": "close"}))
    assert _get(server.address, "/health") == {"status": "healthy"}
    assert _get(server.address, "/metadata")["name"] == "alfworld"
    assert set(_get(server.address, "/schema")) == {"action", "observation", "state"}


def test_a_dead_server_is_the_users_to_mend() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = EnvClient(f"http://127.0.0.1:{free.getsockname()[1]}", wait_s=0.3)
    for ask in (client.health, lambda: client.tasks("train"), client.session):
        with pytest.raises(UserError, match="--env_address"):
            ask()
    with pytest.raises(UserError, match="http://host:port"):
        EnvClient("localhost:80")


def test_a_server_that_ends_leaves_nobody_behind(games: Path) -> None:
    with LocalServer(ServerConfig(str(games))) as server:
        client = server.client(wait_s=0.3)
        session = client.session()
        task = client.tasks("train")[0].task
        session.reset(task, "train")
        worker = session.state()["worker"]
        os.kill(server.pid, signal.SIGTERM)
        assert _gone(server.pid) and _gone(worker)
        with pytest.raises(EnvError) as caught:
            session.step("look")
        assert caught.value.retryable
        with pytest.raises(EnvError, match="no environment server"):
            session.reset(task, "train")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(games: Path, how: signal.Signals) -> None:
    code = f"""
from spa_jax.envs.client import EnvClient
from spa_jax.server_config import ServerConfig
from spa_jax.envs.local import LocalServer
with LocalServer(ServerConfig({str(games)!r})) as server:
    client = server.client()
    session = client.session()
    session.reset(client.tasks("train")[0].task, "train")
    print(server.pid, session.state()["worker"], flush=True)
    import time; time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=_REPOSITORY
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    assert all(_gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alfworld_data=/nowhere"], "--alfworld_data: /nowhere is no folder"),
        (["--alfworld_data=."], None),
        (["--alfworld_data=.", "--prompt=long"], "--prompt=long"),
        (["--alfworld_data=.", "--max_sessions=-1"], "--max_sessions"),
        (["--alfworld_data=.", "--step_deadline_s=0"], "--step_deadline_s"),
    ],
)
def test_wrong_flags_stop_it_with_one_line(flags: list[str], message: str | None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = subprocess.run(
            [sys.executable, "-m", "experiments.serve_env", f"--port={port}", *flags],
            capture_output=True,
            text=True,
            cwd=_REPOSITORY,
            timeout=60,
        )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    assert (message or f"--port={port}") in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


def test_a_local_server_that_cannot_start_says_why() -> None:
    with pytest.raises(UserError, match="/nowhere is no folder"):
        with LocalServer(ServerConfig("/nowhere")):
            pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"env": "alfworld"}', "data_dir"),
        ('{"data_dir": ".", "prompts": "short"}', "'prompts'.*there are: data_dir, env, prompt"),
        ("[]", "not the settings"),
        ("{", "not the settings"),
        ('{"data_dir": "/nowhere"}', "/nowhere is no folder"),
    ],
)
def test_serving_without_flags_says_what_is_wrong(settings: str, message: str, capsys) -> None:
    assert serve.main([settings, "--port=0"]) == 2
    said = capsys.readouterr().err
    assert re.match(f"error: .*{message}", said) and len(said.splitlines()) == 1


def test_a_local_server_starts_from_any_folder(games: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(_REPOSITORY))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "games").symlink_to(games)
    with LocalServer(ServerConfig("games")) as server:  # a path is of the caller's folder
        assert server.client().tasks("train")
