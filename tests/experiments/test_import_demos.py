"""Demonstrations from a log, as a user makes them."""

import json

from spa_jax import store
from tests import programs


def test_demonstrations_come_from_a_log(tmp_path):
    log = [
        {
            "id": name,
            "conversations": [
                {"from": "human", "value": f"Find the {name}."},
                {"from": "gpt", "value": "OK"},
                {"from": "human", "value": "A room."},
                {"from": "gpt", "value": "Action: look"},
                {"from": "human", "value": "You won."},
            ],
            "reward": reward,
        }
        for name, reward in (("mug", 1), ("pan", 1), ("cup", 1), ("pot", 0.5))
    ]
    (tmp_path / "log.json").write_text(json.dumps(log))
    out = tmp_path / "run"
    said = programs.succeed(
        "import_demos", f"--file={tmp_path / 'log.json'}", "--env=virtualhome", f"--workdir={out}"
    )
    assert said.endswith(f"RESULT train=2 valid=1 out={out / 'demos'}\n")
    demos = [store.read(out / "demos" / s / "trajectories.jsonl") for s in ("train", "valid")]
    assert [len(d) for d in demos] == [2, 1]
    assert {t.task for d in demos for t in d} == {"mug", "pan", "cup"}
    assert {(t.env, t.split) for t in demos[1]} == {("virtualhome", "valid")}
    again = programs.run("import_demos", f"--file={tmp_path / 'log.json'}", f"--workdir={out}")
    assert again.returncode == 2 and "is there already" in again.stderr
