"""--help of the binaries: all flags that a binary has, and none that it does not read."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("binary", "shown", "hidden"),
    [
        ("run_spa", {"workdir", "seed", "policy", "beta", "gamma", "generate_seed"}, set()),
        ("explore", {"workdir", "seed", "policy", "env_address", "slots"}, {"beta"}),
        ("serve_env", {"env", "port", "max_sessions", "drain_s"}, {"workdir", "seed"}),
    ],
)
def test_help_shows_the_flags_that_the_binary_reads(binary, shown, hidden):
    found = {}
    for page in ("--help", "--helpfull"):
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{binary}", page],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=Path(__file__).parents[2],
        )
        found[page] = set(re.findall(r"^  --(\w+)=", done.stdout, re.MULTILINE))
        assert f"python -m experiments.{binary}" in done.stdout  # how it is called
        assert done.returncode == 0, done.stderr
    assert shown <= found["--helpfull"] and not hidden & found["--help"]
