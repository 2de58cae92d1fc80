"""A server to trust: what it does when environments, clients, messages and networks misbehave.

The environment is `tests.envs.odd`, which dies, hangs and eats memory when it is told to.
"""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from spa_jax.envs import benchmarks, capacity
from spa_jax.envs.client import EnvClient
from spa_jax.envs.guard import TOKEN_VARIABLE, check_host, is_loopback, read_token
from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import CAPACITY_REACHED, ENV_ERROR, SESSION_ERROR, EnvError
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig

_REPOSITORY = Path(__file__).parents[2]
_ODD = "tests.envs.odd:Odd"


def _config(**changes) -> ServerConfig:
    return ServerConfig(_ODD, **({"env": "custom", "max_sessions": 4} | changes))


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    config = _config(worker_memory_mb=300, step_deadline_s=5.0, max_message_kb=64)
    with LocalServer(config, start_deadline_s=120, token="") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LocalServer) -> EnvClient:
    return EnvClient(server.address)


def _socket(address: str, **options) -> ClientConnection:
    return connect(address.replace("http", "ws", 1) + "/ws", ping_interval=None, **options)


def _ask(connection: ClientConnection, message: object) -> dict:
    connection.send(message if isinstance(message, (str, bytes)) else json.dumps(message))
    return json.loads(connection.recv(timeout=30))


def _metrics(address: str) -> dict[str, float]:
    """Prometheus' samples by name and labels."""
    with urllib.request.urlopen(address + "/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def _post(address: str, path: str, body: bytes, headers: dict | None = None) -> tuple[int, dict]:
    headers = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(address + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# --- environments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message", "cause"),
    [
        ("die", "died", "died"),
        ("fail", "RuntimeError: out of luck", "failed"),
        ("sleep 30", "longer than 5 s", "deadline"),
        ("eat 400", "more than its 300", "memory"),
        ("gorge", "more than its 300", "memory"),
    ],
)
def test_a_process_that_fails_is_replaced_and_counted(client, action, message, cause):
    name = f'spa_env_worker_restarts_total{{cause="{cause}"}}'
    with client.session() as session:
        session.reset("train_0", "train", seed=3)
        worker, before = session.state()["worker"], _metrics(client.http)[name]
        with pytest.raises(EnvError, match=message) as caught:
            session.step(action)
        assert (caught.value.code, caught.value.retryable) == (ENV_ERROR, True)
        assert session.reset("train_0", "train", seed=3).text == "train_0 with seed 3"
        assert session.state()["worker"] != worker
        assert session.step("echo a").text == "1: a"
    assert _metrics(client.http)[name] == before + 1


def test_a_process_near_its_memory_limit_is_replaced_between_games(client):
    with client.session() as session:
        session.reset("train_0", "train")
        first = session.state()["worker"]
        session.reset("train_1", "train")
        assert session.state()["worker"] == first
        session.step("eat 220")
        session.reset("train_2", "train")
        assert session.state()["worker"] != first


def test_capacity_is_what_memory_has_room_for(server):
    alfworld = benchmarks.BENCHMARKS["alfworld"]
    assert capacity.sessions(alfworld, free=10 * alfworld.worker_mb) == 8
    assert capacity.sessions(alfworld, free=10.0) == 1
    assert capacity.sessions(alfworld, free=1e6) == capacity.MOST_SESSIONS
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert 0 < capacity.free_mb() < total
    assert _metrics(server.address)["spa_env_capacity"] == 4
    for name in ("webshop", "virtualhome"):  # 256 of them in 16 GiB
        assert capacity.sessions(benchmarks.BENCHMARKS[name], free=16 * 1024) == 256


# --- sessions -------------------------------------------------------------------------------


def test_sessions_that_a_client_abandoned_are_reaped():
    config = _config(max_sessions=1, idle_timeout_s=1.0)
    with LocalServer(config, start_deadline_s=120, token="") as server:
        client = EnvClient(server.address)
        abandoned = client.session()
        abandoned.reset("train_0", "train")
        with client.session() as session:  # waits for the place
            assert session.reset("train_1", "train").text.startswith("train_1")
        with pytest.raises(EnvError) as caught:
            abandoned.step("echo")
        assert (caught.value.code, caught.value.retryable) == (SESSION_ERROR, True)
        assert abandoned.reset("train_0", "train").text.startswith("train_0")
        abandoned.close()
        assert _metrics(server.address)['spa_env_session_ends_total{how="idle"}'] == 1


def test_a_connection_that_breaks_frees_its_place(server, client):
    for _ in range(6):  # more than there are places
        connection = _socket(server.address)
        _ask(connection, {"type": "reset", "data": {}})
        connection.socket.shutdown(socket.SHUT_RDWR)
    with client.session() as session:
        assert session.reset("train_0", "train").text
    assert _metrics(server.address)["spa_env_sessions"] <= 4


def test_metrics_and_log_tell_what_happened(server, client):
    before = _metrics(server.address)
    with client.session() as session:
        session.reset("train_0", "train")
        for _ in range(3):
            session.step("echo")
        assert _metrics(server.address)["spa_env_sessions"] >= 1
    after = _metrics(server.address)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert (grown["spa_env_resets_total"], grown["spa_env_steps_total"]) == (1, 3)
    assert grown['spa_env_seconds_count{call="step"}'] == 3
    assert grown['spa_env_session_ends_total{how="closed"}'] == 1
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("{")]
    events = [json.loads(line) for line in lines]
    ended = [event for event in events if event["event"] == "session ended"]
    assert ended[-1]["episode"] == "train/train_0" and ended[-1]["how"] == "closed"
    assert all({"time", "level", "event"} <= set(event) for event in events)


# --- messages -------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
_KINDS = st.sampled_from(["reset", "step", "state", "mcp", "__class__"]) | _JSON
_FIELDS = st.sampled_from(["task", "split", "seed", "prompt", "expert", "text", "metadata"])
_MESSAGES = st.one_of(
    st.text(max_size=200),
    st.binary(max_size=200),
    _JSON.map(json.dumps),
    st.fixed_dictionaries({"type": _KINDS, "data": st.dictionaries(_FIELDS, _JSON) | _JSON}).map(
        json.dumps
    ),
    st.integers(1, 30_000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 7_000).map(lambda depth: '{"type":' * depth + "1" + "}" * depth),
    st.integers(1, 60_000).map(lambda n: json.dumps({"type": "step", "data": {"text": "x" * n}})),
    st.integers(1, 60_000).map(lambda n: '{"type": "reset", "data": {"seed": ' + "9" * n + "}}"),
    st.sampled_from(["../../etc/passwd", "train_0\x00", "\ud800", "/etc", "a" * 5000]).map(
        lambda name: json.dumps({"type": "reset", "data": {"split": name, "task": name}})
    ),
)


def test_malformed_messages_are_answered_and_touch_nobody_else(server, client):
    """Each gets an answer of a known type, in its own session, and another session goes on."""
    count = 0

    @settings(
        max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(messages=st.lists(_MESSAGES, min_size=1, max_size=5))
    def fuzz(messages: list[str | bytes]) -> None:
        nonlocal count
        with _socket(server.address) as connection:
            for message in messages:
                answer = _ask(connection, message)
                assert answer["type"] in ("error", "observation", "state")
                assert len(json.dumps(answer)) < 200_000
                assert "Traceback" not in json.dumps(answer)
            # The session still plays.
            assert _ask(connection, {"type": "reset", "data": {"task": "train_1"}})["type"] == (
                "observation"
            )
        count += 1
        assert other.step(f"echo {count}").text == f"{count}: {count}"

    with client.session() as other:
        other.reset("train_5", "train", seed=1)
        fuzz()
    assert count >= 100
    client.health()
    assert "Exception in ASGI" not in server.log.read_text()


def _frame(opcode: int, payload: bytes, length: int | None = None, fin: bool = True) -> bytes:
    """A masked client frame; `length` may lie."""
    length = len(payload) if length is None else length
    head = bytes([(0x80 if fin else 0) | opcode])
    long = bytes([0x80 | 126]) + length.to_bytes(2, "big")
    head += long if length > 125 else bytes([0x80 | length])
    return head + bytes(4) + payload


@pytest.mark.parametrize(
    "raw",
    [
        _frame(1, b'{"type": "st', length=100),  # half a frame
        _frame(1, b'{"type": ', fin=False),  # a message that never ends
        _frame(1, b"\xff\xfe"),  # no UTF-8
        _frame(3, b"x"),  # an opcode that does not exist
        bytes([0x81, 3]) + b"abc",  # not masked
        _frame(9, b"x" * 126),  # a ping that is too long
        b"\x00" * 50,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_broken_frames_end_their_own_connection_only(server, client, raw):
    with client.session() as other:
        other.reset("train_5", "train")
        connection = _socket(server.address)
        connection.socket.sendall(raw)
        with contextlib.suppress(OSError):  # the server may have hung up by now
            connection.socket.shutdown(socket.SHUT_WR)
        with pytest.raises((ConnectionClosed, TimeoutError)):
            connection.recv(timeout=5)
        connection.close()
        assert other.step("echo a").text == "1: a"
    client.health()
    assert "Exception in ASGI" not in server.log.read_text()


def test_broken_http_is_no_harm(server, client):
    host, port = server.address.removeprefix("http://").split(":")
    for raw in (
        b"\x16\x03\x01\x02\x00",
        b"GET",
        b"POST /reset HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
        b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as broken:
            broken.sendall(raw)
    assert _post(server.address, "/reset", b"[" * 9000)[0] == 422
    assert _post(server.address, "/reset", b"[1]")[0] == 422
    assert _post(server.address, "/step", b'{"action": 3}')[0] == 422
    assert _post(server.address, "/reset", b'{"task": "../x"}')[0] == 400
    assert _post(server.address, "/reset", b'{"task": "\\ud800"}')[0] == 422
    assert _post(server.address, "/reset", b" " * 70_000)[0] == 413
    client.health()


def test_a_message_that_is_too_long_closes_its_connection(server, client):
    connection = _socket(server.address)
    with pytest.raises(ConnectionClosed) as caught:
        _ask(connection, {"type": "step", "data": {"text": "x" * 70_000}})
    assert caught.value.rcvd.code == 1009
    with client.session() as session:
        session.reset("train_0", "train")
        assert len(session.step("echo " + "x" * 60_000).text) > 60_000


def test_messages_beyond_the_rate_are_slowed_down():
    with LocalServer(_config(messages_per_s=10.0), start_deadline_s=120, token="") as server:
        with EnvClient(server.address).session() as session:
            session.reset("train_0", "train")
            started = time.monotonic()
            for _ in range(29):
                session.step("echo")
            assert time.monotonic() - started > 1.7  # 30 messages: 10 at once, then 10 a second


# --- one-shot HTTP --------------------------------------------------------------------------


def test_one_shot_reset_and_step(server):
    status, answer = _post(server.address, "/reset", b'{"task": "train_3", "seed": 7}')
    assert (status, answer["observation"]["text"]) == (200, "train_3 with seed 7")
    assert (answer["done"], answer["reward"]) == (False, 0.0)
    body = json.dumps({"task": "train_3", "action": {"text": "win"}}).encode()
    status, answer = _post(server.address, "/step", body)
    assert (status, answer["done"], answer["reward"]) == (200, True, 1.0)
    status, answer = _post(server.address, "/step", b'{"action": {"text": "die"}}')
    assert (status, answer["code"], answer["retryable"]) == (500, ENV_ERROR, True)
    assert _post(server.address, "/reset", b"")[0] == 200
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            session = stack.enter_context(EnvClient(server.address).session())
            session.reset("train_0", "train")
        status, answer = _post(server.address, "/reset", b"{}")
        assert (status, answer["code"]) == (503, CAPACITY_REACHED)


# --- who may come ---------------------------------------------------------------------------

_TOKEN = "correct-horse-battery"


def test_beyond_loopback_a_token_is_needed_and_never_a_flag(monkeypatch, tmp_path):
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(UserError, match="token is needed.*TLS.*ssh"):
        check_host("0.0.0.0", read_token())
    check_host("0.0.0.0", _TOKEN)
    check_host("127.0.0.1", "")
    file = tmp_path / "token"
    file.write_text(f"{_TOKEN}\n")
    assert read_token(str(file)) == _TOKEN
    for bad in ("", "short", "with a line\nbreak in the middle", "é" * 20):
        file.write_text(bad)
        with pytest.raises(UserError, match="--token_file=.*token"):
            read_token(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        read_token(str(tmp_path / "none"))
    monkeypatch.setenv(TOKEN_VARIABLE, _TOKEN)
    assert read_token() == _TOKEN
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.serve_env",
            "--env=custom",
            f"--custom_data={_ODD}",
            "--host=0.0.0.0",
            "--port=0",
        ],
        capture_output=True,
        text=True,
        cwd=_REPOSITORY,
        timeout=300,
        env=os.environ | {TOKEN_VARIABLE: ""},
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --host=0.0.0.0 can be reached")


def test_only_the_token_opens_the_server(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, _TOKEN)
    with LocalServer(_config(), start_deadline_s=120, token=_TOKEN) as server:
        address, path = server.address, f"/proc/{server.pid}/cmdline"
        assert _TOKEN.encode() not in Path(path).read_bytes()
        with EnvClient(address).session() as session:  # it knows the variable too
            assert session.reset("train_0", "train").text
        assert EnvClient(address, token=_TOKEN).tasks("train")
        basic = {"Authorization": "Basic " + base64.b64encode(f"x:{_TOKEN}".encode()).decode()}
        assert _post(address, "/reset", b"{}", basic)[0] == 200
        wrong = (
            "",
            f"Bearer {_TOKEN[:-1]}",
            f"Bearer {_TOKEN}x",
            f"Basic {_TOKEN}",
            _TOKEN,
            "Bearer ",
            "Basic !!!",
            "Digest x",
        )
        for header in wrong:
            assert _post(address, "/reset", b"{}", {"Authorization": header})[0] == 401
        for header in wrong[:2]:
            with pytest.raises(InvalidStatus):
                _socket(address, additional_headers={"Authorization": header})
        for stranger in (EnvClient(address, token=""), EnvClient(address, token="x" * 20)):
            stranger.health()  # load balancers ask for it
            for ask in (stranger.session, lambda s=stranger: s.tasks("train")):
                with pytest.raises(UserError, match=TOKEN_VARIABLE):
                    ask()
        # A client that can only be given an address.
        with _socket(address.replace("://", f"://any:{_TOKEN}@")) as connection:
            assert _ask(connection, {"type": "reset", "data": {}})["type"] == "observation"
