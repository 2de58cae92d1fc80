"""Who is no client: pages of others, guesses, silent connections; and stopped processes."""

import contextlib
import http.client
import http.server
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from spa_jax.envs.client import EnvClient
from spa_jax.envs.guard import TOKEN_VARIABLE, read_token, split_secret
from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import EnvError
from spa_jax.errors import UserError
from spa_jax.server_config import ServerConfig

_REPOSITORY = Path(__file__).parents[2]
_JSON = {"Content-Type": "application/json"}


def _config(**changes) -> ServerConfig:
    plain = {"env": "custom", "max_sessions": 2, "step_deadline_s": 2.0}
    return ServerConfig("tests.envs.odd:Odd", **(plain | changes))


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    """Nobody needs a token."""
    config = _config(first_message_s=1.5, max_waiting=20)
    with LocalServer(config, start_deadline_s=120, token="") as server:
        yield server


def _ask(
    address: str, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict]:
    place = address.removeprefix("http://")
    connection = http.client.HTTPConnection(place, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host="Host" in named)
    if body is not None:
        named["Content-Length"] = str(len(body))
    for name, value in named.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read() or b"{}")


# --- pages of others ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8700"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": "localhost:port"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:9999"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_pages_of_others_and_other_names_are_refused(server, headers, status):
    assert _ask(server.address, "/tasks?split=train", **headers)[0] == status
    post = _ask(
        server.address, "/step", method="POST", body=b"{}", Content_Type="application/json",
        **headers,
    )
    assert post[0] == (422 if status == 200 else 403)


def test_a_page_cannot_open_a_socket(server):
    url = server.address.replace("http", "ws") + "/ws"
    for origin in ("https://evil.example", "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus) as caught:
            connect(url, origin=origin)
        assert caught.value.response.status_code == 403
    with connect(url, origin=server.address) as own:  # a page of its own
        own.send(json.dumps({"type": "reset", "data": {}}))
        assert json.loads(own.recv(timeout=30))["type"] == "observation"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_played(server, kind):
    headers = {"Content_Type": kind} if kind else {}
    body = b'{"action": {"text": "win"}}'
    for path in ("/step", "/reset"):
        status, answer = _ask(server.address, path, method="POST", body=body, **headers)
        assert status == 415 and "application/json" in answer["message"]
    kind = "application/json; charset=utf-8"
    assert _ask(server.address, "/step", method="POST", body=body, Content_Type=kind)[0] == 200


@pytest.mark.parametrize("body", [b"null", b"3", b"[]", b'"x"', b'{"action": null}', b""])
def test_a_step_of_nothing_is_a_mistake_of_the_client(server, body):
    status, answer = _ask(
        server.address, "/step", method="POST", body=body, Content_Type="application/json"
    )
    assert (status, answer["code"]) == (422, "VALIDATION_ERROR")


def test_a_name_of_a_proxy_is_allowed_by_a_flag():
    command = [sys.executable, "-m", "spa_jax.envs.serve", json.dumps({
        "data_dir": "tests.envs.odd:Odd", "env": "custom", "max_sessions": 1
    })]
    flags = ["--port=0", "--allowed_hosts=env.example.org,b", "--exit_with_parent"]
    process = subprocess.Popen(
        [*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=_REPOSITORY, stderr=subprocess.DEVNULL,
    )
    try:
        # It is said when it listens: whoever reads it is answered at once.
        address = process.stdout.readline().split()[-1]
        for host, status in (("env.example.org", 200), ("B:80", 200), ("example.org", 403)):
            assert _ask(address, "/schema", Host=host)[0] == status
        own = {"Host": "env.example.org", "Origin": "https://env.example.org"}
        assert _ask(address, "/schema", **own)[0] == 200
    finally:
        process.stdin.close()
        process.wait(timeout=30)


# --- tokens ---------------------------------------------------------------------------------------


def test_a_servers_token_is_its_own_and_stays_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv(TOKEN_VARIABLE, "a-token-of-another-server")
    with LocalServer(_config(), tmp_path / "log", start_deadline_s=120) as server:
        address, token = server.address, server.token
        for path in ("/tasks?split=train", "/metrics", "/schema"):
            assert _ask(address, path)[0] == 401
        assert _ask(address, "/health")[0] == 200
        right = {"Authorization": f"Bearer {token}"}
        # Whoever knows it may call the server what they like; a page of others may not.
        assert _ask(address, "/schema", Host="env.example.org", **right)[0] == 200
        assert _ask(address, "/schema", Origin="https://evil.example", **right)[0] == 403
        with server.client().session() as session:
            session.reset("train_0", "train")
            for pid in (server.pid, session.state()["worker"]):
                told = Path(f"/proc/{pid}/cmdline").read_bytes()
                told += Path(f"/proc/{pid}/environ").read_bytes()
                assert token.encode() not in told and b"a-token-of-another" not in told
        started = time.monotonic()
        for guess in ("x" * 20, "y" * 20):
            assert _ask(address, "/schema", Authorization=f"Bearer {guess}")[0] == 401
        assert time.monotonic() - started > 0.4
        request = urllib.request.Request(f"{address}/metrics", headers=right)
        with urllib.request.urlopen(request, timeout=20) as answer:
            metrics = answer.read().decode()
        assert 'spa_env_refused_total{why="token"} 2.0' in metrics
        assert 'spa_env_refused_total{why="origin"} 1.0' in metrics
    log = (tmp_path / "log").read_text()
    assert '"event": "refused"' in log and '"why": "token"' in log and token not in log


def test_an_address_with_a_token_is_never_shown(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = EnvClient(f"ws://any:a-long-%73ecret-token@127.0.0.1:{port}/", wait_s=0)
    assert client.headers == {"Authorization": "Bearer a-long-secret-token"}
    for ask in (client.health, lambda: client.tasks("train"), client.session):
        with pytest.raises(UserError, match=f"127.0.0.1:{port}") as caught:
            ask()
        assert "ecret" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        EnvClient("ftp://any:a-long-secret@host")
    assert "secret" not in str(caught.value)
    assert split_secret("http://host:1/a@b") == ("http://host:1/a@b", "")


def test_a_token_that_others_can_read_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    file = tmp_path / "token"
    file.write_text("correct-horse-battery")
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert read_token(str(file)) and not capsys.readouterr().err
    file.chmod(0o644)
    assert read_token(str(file))
    assert f"chmod 600 {file}" in capsys.readouterr().err


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    """Sends everybody to another place, and notes what they bring there."""

    brought: list[str | None] = []

    def do_GET(self) -> None:
        if self.path.startswith("/there"):
            self.brought.append(self.headers.get("Authorization"))
        self.send_response(302)
        self.send_header("Location", "/there")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_token_is_not_carried_elsewhere():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        client = EnvClient(f"http://127.0.0.1:{elsewhere.server_port}", token="x" * 20, wait_s=0)
        with pytest.raises(UserError, match="points to /there: give that server as --env_address"):
            client.tasks("train")
        elsewhere.shutdown()
    assert not _Elsewhere.brought


def test_a_server_of_this_machine_is_behind_no_proxy(server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    client = server.client(wait_s=0)
    assert client.tasks("train")
    with client.session() as session:
        assert session.reset("train_0", "train").text


@pytest.mark.parametrize("address", ["http://127.0.0.1:x", "http://[::1", "http://127.0.0.1:1 2"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match="env_address|no environment server"):
        EnvClient(address, wait_s=0).tasks("train")


# --- connections ----------------------------------------------------------------------------------


def _closed(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    with contextlib.suppress(ConnectionError):
        try:
            while connection.recv(4096):
                pass
        except TimeoutError:
            return False
    return True


def test_connections_that_ask_nothing_are_closed_and_hold_up_nobody(server):
    host, port = server.address.removeprefix("http://").split(":")
    silent = b""
    slow = b"GET /health HTTP/1.1\r\nHost: "
    body = b"POST /step HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body += b"Content-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        opened = []
        for sent in (silent, slow, body) * 5:
            opened.append(stack.enter_context(socket.create_connection((host, int(port)))))
            opened[-1].sendall(sent)
        for _ in range(60):  # more than may wait
            crowd = stack.enter_context(socket.create_connection((host, int(port))))
            crowd.sendall(slow)
        server.client().health()
        with server.client().session() as session:
            assert session.reset("train_0", "train").text
        assert time.monotonic() - started < 5
        assert all(_closed(connection, 6) for connection in opened)
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=20) as answer:
        assert "spa_env_sessions 0.0" in answer.read().decode()


def test_silent_sockets_take_no_place(server):
    url = server.address.replace("http", "ws") + "/ws"
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(url, ping_interval=None)) for _ in range(30)]
        talking = stack.enter_context(connect(url, ping_interval=None))
        talking.send(json.dumps({"type": "state"}))
        assert json.loads(talking.recv(timeout=10))["type"] == "state"
        sessions = [stack.enter_context(server.client().session()) for _ in range(2)]
        for session in sessions:
            assert session.reset("train_0", "train").text
        server.client().health()
        # Those that waited longest made room; the others have a little time.
        answer = json.loads(silent[-1].recv(timeout=10))
        assert answer["data"]["code"] == "SESSION_ERROR" and answer["data"]["retryable"]
        time.sleep(2)  # longer than a first message may take: a session has more
        assert sessions[0].step("echo a").text == "1: a"


# --- processes that are stopped -------------------------------------------------------------------


def test_a_deadline_holds_while_a_long_message_is_sent(server):
    with server.client().session() as session:
        session.reset("train_0", "train")
        worker = session.state()["worker"]
        os.kill(worker, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EnvError, match="longer than 2 s") as caught:
            session.step("echo " + "x" * 900_000)
        assert caught.value.retryable and time.monotonic() - started < 8
        assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie"
        assert session.reset("train_0", "train").text


def test_a_fork_server_that_is_stopped_is_replaced():
    config = _config(reset_deadline_s=3.0)
    with LocalServer(config, start_deadline_s=120) as server:
        with server.client().session() as one:
            one.reset("train_0", "train")
            worker = psutil.Process(one.state()["worker"])
            forks = worker.parent()
            assert forks is not None and forks.pid != server.pid
            forks.suspend()
            with server.client().session() as two:
                with pytest.raises(EnvError, match="did not answer for 3 s") as caught:
                    two.reset("train_1", "train")
                assert caught.value.retryable
                assert two.reset("train_1", "train").text.startswith("train_1")


def test_how_a_process_died_is_said(server):
    with server.client().session() as session:
        session.reset("train_0", "train")
        with pytest.raises(EnvError, match=r"died \(exit code 1\)"):
            session.step("die")
        session.reset("train_0", "train")
        os.kill(session.state()["worker"], signal.SIGKILL)
        with pytest.raises(EnvError, match=r"died \(SIGKILL\)"):
            session.step("echo")


def test_a_traceback_travels_whole(server):
    with server.client().session() as session:
        session.reset("train_0", "train")
        with pytest.raises(EnvError, match="RuntimeError: out of luck") as caught:
            session.step("fail")
    lines = caught.value.full_message.splitlines()
    assert lines[1].startswith("Traceback") and lines[-1] == "RuntimeError: out of luck"
    assert 'raise RuntimeError("out of luck")' in caught.value.traceback
    events = [json.loads(line) for line in server.log.read_text().splitlines() if line[0] == "{"]
    assert any("out of luck" in event.get("traceback", "") for event in events)
