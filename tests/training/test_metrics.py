import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from spa_jax.errors import UserError
from spa_jax.training.metrics import MetricsWriter, read_metrics


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def scalars(folder):
    """(step, tag, value) of every scalar in TensorBoard's event files, oldest file first."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        # TFRecord: length (8 bytes), its CRC (4), the event, its CRC (4).
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12:12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            content = content[16 + length:]
    return found


def test_one_line_an_update_in_both_places(tmp_path):
    before = time.time()
    with MetricsWriter(tmp_path / "sft") as writer:
        writer.write(1, {"loss": 0.5, "tokens": np.float32(3)})
        # On the disk before the file is closed.
        assert len(lines(tmp_path / "sft")) == 1
        writer.write(2, {"loss": np.asarray(0.25)})
    records = read_metrics(tmp_path / "sft" / "metrics.jsonl")
    assert [r["update"] for r in records] == [1, 2]
    assert [r["loss"] for r in records] == [0.5, 0.25]
    assert before - 1 <= records[0]["time"] <= records[1]["time"] <= time.time() + 1
    assert scalars(tmp_path / "sft") == [(1, "loss", 0.5), (1, "tokens", 3.0), (2, "loss", 0.25)]


def test_a_jax_scalar_is_a_number(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": jnp.float32(1.5)})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_json_is_null(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": value})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(lines(tmp_path)[0], parse_constant=refuse)["loss"] is None
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["loss"])


def test_nothing_is_made_before_the_first_write(tmp_path):
    with MetricsWriter(tmp_path / "stage"):
        pass
    assert not (tmp_path / "stage").exists()


@pytest.mark.parametrize("metrics, error", [
    ({"update": 1.0}, ValueError), ({"time": 1.0}, ValueError),
    ({"loss": np.zeros(2)}, TypeError), ({"loss": None}, TypeError),
])
def test_a_bad_metric_writes_nothing(tmp_path, metrics, error):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(error):
        writer.write(0, metrics)
    assert list(tmp_path.iterdir()) == []


def test_truncate_after_a_resume_gives_the_unbroken_runs_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for update in range(1, 6):
            writer.write(update, {"loss": 1 / update})
    kept = lines(tmp_path)[:3]
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(3)
        assert lines(tmp_path) == kept
        writer.write(4, {"loss": 7.0})
    assert lines(tmp_path)[:3] == kept
    assert [r["update"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


def test_truncate_in_the_middle_of_writing(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
        writer.truncate_after(1)
        writer.write(2, {"loss": 3.0})
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 3.0]


def test_truncate_without_a_file_does_nothing(tmp_path):
    MetricsWriter(tmp_path / "stage").truncate_after(10)
    assert not (tmp_path / "stage").exists()


def test_a_torn_last_line_is_not_read_and_is_cut_off_before_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1, "time": 0, "loss": 1.0}\n{"update": 2, "ti')
    assert [r["update"] for r in read_metrics(path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.write(2, {"loss": 2.0})
    assert [r["update"] for r in read_metrics(path)] == [1, 2]


def test_a_killed_writer_leaves_a_file_that_can_be_continued(tmp_path):
    code = (
        "import sys; from spa_jax.training.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for update in range(10**9): writer.write(update, {'loss': 1.0})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.time() + 60
    path = tmp_path / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size > 2000) and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(9)
        writer.write(10, {"loss": 2.0})
    assert [r["update"] for r in read_metrics(path)] == list(range(11))


@pytest.mark.parametrize("line", ["{broken", '{"loss": 1}', "[1]", '{"update": "1"}', ""])
def test_a_bad_line_names_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n' + line + "\n")
    with pytest.raises(UserError, match="metrics.jsonl:2: not a line of metrics"):
        read_metrics(path)
    with pytest.raises(UserError, match="metrics.jsonl:2"):
        MetricsWriter(tmp_path).truncate_after(0)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        read_metrics(tmp_path / "none.jsonl")


def test_reading_does_not_need_tensorboard(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n')
    code = (
        "import sys; from spa_jax.training.metrics import read_metrics\n"
        "read_metrics(sys.argv[1]); assert 'tensorboardX' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "metrics.jsonl")], check=True,
    )
