"""What all environment processes share: the fork server imports this before it forks them.

TextWorld, its parsers and the parsed grammar then cost one process's time and memory.
"""

from pathlib import Path

from spa_jax.envs.alfworld import engine

# isort: split
from alfworld.info import ALFRED_TWL2_PATH
from textworld.envs.pddl import logic

engine.memoise()
logic.GameLogic("", engine.patch_grammar(Path(ALFRED_TWL2_PATH).read_text())[0])
