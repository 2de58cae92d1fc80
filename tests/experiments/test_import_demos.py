"""Demonstrations from a log, as a user makes them."""

import json

import numpy as np

from spa_jax import store
from tests import programs, tiny


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


def test_what_was_exported_is_imported_again(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [tiny.random_trajectory(rng, f"task_{i}", final_reward=i % 3 / 2) for i in range(9)]
    store.write(tmp_path / "explore" / "trajectories.jsonl", episodes)
    out = tmp_path / "episodes.jsonl"
    flags = (f"--episodes={tmp_path / 'explore'}", f"--out={out}", "--won")
    assert programs.succeed("export_episodes", *flags).endswith(f"RESULT episodes=3 out={out}\n")
    said = programs.succeed("import_demos", f"--file={out}", f"--workdir={tmp_path / 'run'}")
    assert "RESULT train=2 valid=1" in said
    again = programs.run("export_episodes", *flags)
    assert again.returncode == 2 and again.stderr.startswith(f"error: {out} is there already")
