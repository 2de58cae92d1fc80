"""Writes episodes for other people's tools: chat messages or ATIF, JSON lines or Parquet.

    python -m experiments.export_episodes --episodes=W/eval/spa --out=episodes.jsonl
    python -m experiments.export_episodes --episodes=W/iteration_0/explore --out=episodes.parquet
    python -m experiments.export_episodes --episodes=W/eval/spa --out=episodes.jsonl --format=atif

`messages` is what TRL and datasets read, and --demonstrations of run_spa; `atif` is the Agent
Trajectory Interchange Format.  Each record says its reward, and of each step its action, whether it
was executable, its contribution and its reward.  Parquet needs pyarrow.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax import episodes, interchange
from spa_jax import run as run_lib


def main(argv: Sequence[str]) -> None:
    del argv
    given, out = pathlib.Path(_EPISODES.value), pathlib.Path(_OUT.value)
    path = given / run_lib.EPISODES if given.is_dir() else given
    found = [t for t in episodes.load(path) if t.success or not _WON.value]
    form: interchange.Format = "atif" if _FORMAT.value == "atif" else "messages"
    interchange.write(out, found, form)
    print(f"RESULT episodes={len(found)} out={out}")


if __name__ == "__main__":
    _EPISODES = flags.DEFINE_string(
        "episodes", None, "A folder of episodes, or its file.", required=True
    )
    _OUT = flags.DEFINE_string("out", None, "The .jsonl or .parquet file to write.", required=True)
    _FORMAT = flags.DEFINE_enum("format", "messages", ["messages", "atif"], "Of a record.")
    _WON = flags.DEFINE_bool("won", False, "Write the won episodes alone.")
    flags_lib.run(main)
