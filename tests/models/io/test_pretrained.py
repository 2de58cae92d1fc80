"""Where a policy comes from: a folder, a GGUF file, the hub (a small one, on this machine)."""

import functools
import hashlib
import http.server
import json
import pathlib
import shutil
import threading

import huggingface_hub.constants
import pytest

from spa_jax import policy
from spa_jax.errors import UserError
from spa_jax.models.io import pretrained
from tests import tiny
from tests.models.io.test_gguf import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers for the models below a folder, ORGANISATION/MODEL/FILE."""

    def __init__(self, root: pathlib.Path, log: list[str], *args) -> None:
        self.root, self.log = root, log
        super().__init__(*args)

    def log_message(self, format, *args) -> None:
        self.log.append(self.path)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        model = self.root.joinpath(*parts[2:4] if api else parts[:2])
        if not model.is_dir():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif not api:
            data = (model / parts[-1]).read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        else:
            files = sorted(model.iterdir())
            about = {
                "id": "/".join(parts[2:4]),
                "sha": COMMIT,
                "siblings": [{"rfilename": f.name} for f in files],
            }
            tree = [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                }
                for f in files
            ]
            answer = tree if parts[4] == "tree" else about
            kind = {"Content-Type": "application/json"}
            self._send(200, json.dumps(answer).encode(), kind, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(the folder of a hub's models, the paths that were asked of it)."""
    root, log = tmp_path / "hub", []
    root.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Hub, root, log))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_address[1]}"
    # What HF_ENDPOINT and HF_HOME would have set when the library was imported.
    monkeypatch.setattr(constants, "ENDPOINT", address)
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield root, log
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_once(hub, tmp_path, monkeypatch):
    root, log = hub
    (root / "maker").mkdir()
    published = shutil.copytree(tiny.tiny_policy(tmp_path / "tiny"), root / "maker" / "tiny-1.5B")
    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin"):
        (published / unwanted).write_bytes(b"never fetched")
    ours = policy.load("maker/tiny-1.5B")
    assert ours.folder.is_relative_to(tmp_path / "cache")
    tiny.assert_same(ours.params, policy.load(tmp_path / "tiny").params)
    assert ours.chat == policy.load(tmp_path / "tiny").chat
    fetched = {p.name for p in ours.folder.iterdir()}
    assert fetched == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not any(path.endswith(".bin") or "consolidated" in path for path in log)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(log)
    assert pretrained.resolve("maker/tiny-1.5B") == ours.folder
    assert len(log) == asked


def test_what_the_hub_does_not_have(hub, tmp_path):
    root, _ = hub
    with pytest.raises(UserError, match="maker/none: no such folder, and the Hugging Face hub"):
        policy.load("maker/none")
    old = root / "maker" / "old"
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    (old / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="maker/old: .* no model.safetensors; pickled .* any code"):
        policy.load("maker/old")


def test_a_revision_is_part_of_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrained.at_revision("maker/tiny", "") == "maker/tiny"
    assert pretrained.at_revision("maker/tiny", "v1.0") == "maker/tiny@v1.0"
    for policy_name in ("maker/tiny@v2", "some/long/folder", "m.gguf"):
        with pytest.raises(UserError, match="--revision=v1: a model of the hub has revisions, and"):
            pretrained.at_revision(policy_name, "v1")
    _, log = hub
    with pytest.raises(UserError, match="maker/none at revision v1.0: no such folder, and the Hug"):
        pretrained.resolve("maker/none@v1.0")
    assert any("revision/v1.0" in line for line in log)


def test_a_folder_goes_before_the_hub(hub, tmp_path, monkeypatch):
    _, log = hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker").mkdir()
    tiny.tiny_policy(tmp_path / "maker" / "tiny")
    assert pretrained.resolve("maker/tiny") == pathlib.Path("maker/tiny")
    for no_id in ("nowhere", "/maker/none", "a/b/c", "maker/model.pt"):
        assert pretrained.resolve(no_id) == pathlib.Path(no_id)
    assert not log


def test_a_gguf_file_is_a_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "small.gguf"
    words = tiny.tiny_tokenizer(tmp_path / "tokenizer")
    params = tiny.random_params(tiny.CONFIG)
    write_gguf(path, tiny.CONFIG, params, words)
    ours = policy.load(path)
    assert ours.folder.is_relative_to(tmp_path / "home")
    tiny.assert_same(ours.params, params)
    assert "small.gguf: converting to" in capsys.readouterr().out
    assert ours.chat.end_of_turn == tiny.SPECIAL.index("<|im_end|>")
    assert pretrained.resolve(str(path)) == ours.folder
    assert not capsys.readouterr().out  # once
    write_gguf(path, tiny.CONFIG, tiny.random_params(tiny.CONFIG, seed=1), words)
    assert pretrained.resolve(path) != ours.folder  # another file of that name
    with pytest.raises(UserError, match="none.gguf: no such file"):
        pretrained.resolve("some/none.gguf")
