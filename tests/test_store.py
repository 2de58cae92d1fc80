"""Trajectory files: exactly-once appends, repair, order, and clear complaints."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from spa_jax import store
from spa_jax.errors import UserError
from spa_jax.trajectory import Sampling, Status, Step, Trajectory


def episode(task="game", seed=0, attempt=0, **changes):
    fields = {
        "env": "alfworld", "task": task, "split": "train", "seed": seed, "attempt": attempt,
        "policy": "expert", "status": Status.SUCCESS, "final_reward": 1.0,
        "instruction": "put a mug\u2028 in the café \U0001f375",
        "steps": (Step("a room", "Action: look", "look", True, contribution=0.25),),
        "sampling": Sampling(temperature=0.5),
        "token_ids": (5, 6, 7), "step_id": (-1, 0, 0), "log_probs": (0.0, -0.1, -1 / 3),
    }
    return Trajectory(**(fields | changes))


def test_reads_back_what_was_appended_sorted_by_key(tmp_path):
    path = tmp_path / "new" / "trajectories.jsonl"
    episodes = [episode("b", 0, 0), episode("a", 1, 0), episode("a", 0, 10), episode("a", 0, 9)]
    for one in episodes:
        store.append(path, one)
    assert store.read(path) == [episodes[3], episodes[2], episodes[1], episodes[0]]
    assert store.keys(path) == {one.key for one in episodes}
    assert len(path.read_bytes().splitlines()) == 4


def test_write_is_the_same_format_and_replaces_the_file(tmp_path):
    path = tmp_path / "annotated.jsonl"
    store.write(path, [episode(attempt=2), episode(attempt=1)])
    assert [one.attempt for one in store.read(path)] == [1, 2]
    store.write(path, [episode(attempt=3)])
    assert [one.attempt for one in store.read(path)] == [3]
    assert [p.name for p in tmp_path.iterdir()] == ["annotated.jsonl"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "annotated.jsonl"
    store.write(path, [episode()])
    with pytest.raises(UserError, match="'game', 0, 2.*expert: final_reward is no finite number"):
        store.write(path, [episode(attempt=1), episode(attempt=2, final_reward=float("nan"))])
    assert store.read(path) == [episode()]
    assert [p.name for p in tmp_path.iterdir()] == ["annotated.jsonl"]


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_repair_cuts_off_exactly_the_torn_line(tmp_path, kept):
    path = tmp_path / "trajectories.jsonl"
    for attempt in range(kept):
        store.append(path, episode(attempt=attempt))
    whole = path.read_bytes() if kept else b""
    torn = b'{"env": "alf' + b"x" * 3_000_000  # longer than a block of the backward search
    path.write_bytes(whole + torn)
    with pytest.raises(UserError, match=rf"trajectories.jsonl:{kept + 1}.*not complete"):
        store.read(path)
    with pytest.raises(UserError, match="last line is not complete"):
        store.append(path, episode(attempt=kept))
    assert store.repair(path) == len(torn)
    assert path.read_bytes() == whole
    assert store.repair(path) == 0
    store.append(path, episode(attempt=kept))
    assert [one.attempt for one in store.read(path)] == list(range(kept + 1))


def test_files_that_are_not_there(tmp_path):
    assert store.repair(tmp_path / "none.jsonl") == 0
    assert store.keys(tmp_path / "none.jsonl") == set()
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        store.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{]", r"jsonl:2: not JSON .*delete the line"),
        ("\x00\x00", r"jsonl:2: not JSON"),
        ("[1]", r"jsonl:2: expected a JSON object"),
        ('{"schema": 99}', r"jsonl:2: trajectory schema 99"),
        ('{"schema": 2}', r"jsonl:2: not a trajectory: env is missing"),
        ("", r"jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    store.append(path, episode())
    with path.open("a") as file:
        file.write(line + "\n")
    store.append(path, episode(attempt=1))
    with pytest.raises(UserError, match=message):
        store.read(path)
    with pytest.raises(UserError, match=message):
        store.keys(path)
    before = path.read_bytes()
    assert store.repair(path) == 0  # only a torn end is ours to cut
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("task", 3, "task=3: it must be a valid string"),
        ("seed", "0", "seed='0': it must be a valid integer"),
        ("attempt", -1, "attempt=-1: it must be greater than or equal to 0"),
        ("retry", True, "retry=True: it must be a valid integer"),
        ("status", "won", "status='won': it must be 'success'"),
        ("final_reward", 1.5, "final_reward=1.5: it must be less than or equal to 1"),
        ("final_reward", "1", "final_reward='1': it must be a valid number"),
        ("final_reward", math.nan, "final_reward=nan: it must be a finite number"),
        ("steps", [], "step_id names step 0 of 0 steps"),
        ("steps", {"0": 1}, "steps="),
        ("steps", [{"observation": "o"}], "steps.0.response is missing"),
        ("token_ids", [5, -6, 7], "token_ids.1=-6: it must be greater"),
        ("token_ids", [5, 6.0, 7], "token_ids.1=6.0"),
        ("token_ids", "567", "token_ids='567'"),
        ("step_id", [-2, 0, 0], "step_id.0=-2"),
        ("log_probs", [0, -math.inf, 0], "log_probs.1=-inf: it must be a finite number"),
        ("ref_log_probs", [0, None, 0], "ref_log_probs.1=None"),
        ("log_probs", [0.0], "log_probs has 1 entries for 3 token_ids"),
        ("sampling", {"temperature": -1.0}, "sampling.temperature=-1.0: it must be greater"),
        ("sampling", [1.0], "sampling="),
        ("initial_progress", 2, "initial_progress=2"),
        ("expected", math.inf, "expected=inf"),
        ("schema", "2", "trajectory schema '2'"),
        ("surprise", 1, "surprise=1"),
    ],
)
def test_every_field_is_of_its_type(tmp_path, field, value, message):
    path = tmp_path / "t.jsonl"
    store.append(path, episode())
    record = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"t.jsonl:1: .*{re.escape(message)}"):
        store.read(path)


def test_steps_are_written_in_order(tmp_path):
    path = tmp_path / "t.jsonl"
    two = (Step("o", "a", "a", True),) * 2
    store.append(path, episode(steps=two, step_id=(-1, 1, 0)))
    with pytest.raises(UserError, match="step_id goes back to an earlier step"):
        store.read(path)


def test_half_a_surrogate_of_an_older_version_is_read_as_unknown(tmp_path):
    path = tmp_path / "t.jsonl"
    store.append(path, episode(instruction="a\ud800b \U0001f375 \\ud800"))
    (one,) = store.read(path)
    assert one.instruction == "a\ufffdb \U0001f375 \\ud800"


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a": "\xff\xfe"}\n')
    with pytest.raises(UserError, match=r"t.jsonl:1: not JSON"):
        store.read(path)


def test_the_same_key_twice_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    store.append(path, episode())
    store.append(path, episode(retry=1))
    with pytest.raises(UserError, match=r"t.jsonl:2: .*already in line 1"):
        store.read(path)


def _append_many(path, seed, count):
    for attempt in range(count):
        store.append(path, episode(seed=seed, attempt=attempt, instruction="x" * 20_000))


def test_processes_append_side_by_side(tmp_path):
    path = tmp_path / "t.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, seed, 20)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert store.keys(path) == {("game", seed, a) for seed in range(3) for a in range(20)}


_ENDLESS = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from tests.test_store import episode
from spa_jax import store
path = pathlib.Path(sys.argv[1])
store.repair(path)
attempt = len(store.keys(path))
while True:
    store.append(path, episode(attempt=attempt, instruction="x" * 50_000))
    attempt += 1
"""


def test_killed_again_and_again_no_episode_is_lost_or_doubled(tmp_path):
    path = tmp_path / "t.jsonl"
    root = os.path.dirname(os.path.dirname(__file__))
    written = 0
    for delay in (0.0, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", _ENDLESS, str(path), root])
        deadline = time.time() + 60
        while time.time() < deadline:
            if path.exists() and len(path.read_bytes().splitlines()) > written + 2:
                break
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        store.repair(path)
        attempts = [one.attempt for one in store.read(path)]
        assert attempts == list(range(len(attempts)))
        assert len(attempts) > written
        written = len(attempts)


def test_a_record_of_schema_1_is_read_and_written_back_as_2(tmp_path):
    path, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    store.append(path, episode())
    record = json.loads(path.read_text())
    del record["initial_progress"], record["steps"][0]["progress"]
    path.write_text(json.dumps(record | {"schema": 1}) + "\n")
    (old,) = store.read(path)
    assert old == episode() and old.progress is None and old.initial_progress is None
    store.write(new, [old])
    assert json.loads(new.read_text()) == record | {
        "schema": 2,
        "initial_progress": None,
        "steps": [record["steps"][0] | {"progress": None}],
    }
    path.write_text(json.dumps(record | {"schema": 3}) + "\n")
    with pytest.raises(UserError, match=r"old.jsonl:1: trajectory schema 3.*reads 1 and 2"):
        store.read(path)


def test_progress_is_kept_and_whole_or_not_at_all(tmp_path):
    path = tmp_path / "t.jsonl"
    steps = tuple(Step("o", "a", "a", True, progress=p) for p in (0.5, 1 / 3, 1.0))
    whole = episode(attempt=0, steps=steps, initial_progress=0.25)
    unknown = episode(attempt=1, steps=steps)  # nobody said what was done before
    torn = episode(attempt=2, steps=(steps[0], Step("o", "a", "a", True)), initial_progress=0.0)
    for one in (whole, unknown, torn):
        store.append(path, one)
    told = [one.progress for one in store.read(path)]
    assert told == [(0.25, 0.5, 1 / 3, 1.0), None, None]
    assert episode(steps=(), step_id=(-1, -1, -1), initial_progress=0.0).progress == (0.0,)


def test_the_file_is_plain_json_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    store.append(path, episode())
    (line,) = path.read_text(encoding="utf-8").split("\n")[:-1]
    record = json.loads(line)
    assert record["status"] == "success"
    assert record["log_probs"][2] == -1 / 3


def test_the_files_of_several_processes_become_one(tmp_path):
    path = tmp_path / "t.jsonl"
    store.append(path, episode(attempt=0))
    for process in (0, 1, 10):
        store.append(store.shard(path, process), episode(attempt=11 - process))
    with store.shard(path, 1).open("ab") as torn:
        torn.write(b'{"env": "alf')
    store.merge(path)
    assert [one.attempt for one in store.read(path)] == [0, 1, 10, 11]
    assert [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]
    before = path.stat().st_mtime_ns
    store.merge(path)  # nothing to do
    assert path.stat().st_mtime_ns == before


def test_a_merge_that_was_killed_is_made_again(tmp_path):
    path = tmp_path / "t.jsonl"
    for file in (path, store.shard(path, 1)):  # written, and the shard not yet gone
        store.append(file, episode(attempt=4))
    store.merge(path)
    assert [one.attempt for one in store.read(path)] == [4]
    store.append(store.shard(path, 1), episode(attempt=4, instruction="another"))
    with pytest.raises(UserError, match=r"t.process_1.jsonl: its episode \('game', 0, 4\)"):
        store.merge(path)
    assert store.shard(path, 1).exists()
