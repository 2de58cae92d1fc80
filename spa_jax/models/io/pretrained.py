"""Where a policy comes from: a folder, a GGUF file or the Hugging Face hub."""

import hashlib
import os
import pathlib
import re

from spa_jax.errors import UserError
from spa_jax.models.io import huggingface, peft, weights

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# Not "*.safetensors": Mistral's repositories hold the same weights twice.
_HUB_FILES = ("config.json", "model*.safetensors", weights.INDEX, *huggingface.TOKENIZER_FILES)


def resolve(policy: str | os.PathLike[str]) -> pathlib.Path:
    """The local Hugging Face folder of a policy.

    Args:
      policy: such a folder; a GGUF file, which is converted once, below ~/.cache/spa_jax; or the
        name of a model on the hub (ORGANISATION/MODEL, or ORGANISATION/MODEL@REVISION for a
        branch, a tag or a commit of it), which is fetched once, into the hub's own cache
        (HF_HOME), unless a folder has that name.

    Raises:
      UserError: the file cannot be converted, or the hub has no such model or no safetensors of
        it. A folder that is not there is left to `huggingface.load_pretrained`.
    """
    path = pathlib.Path(policy)
    if path.suffix == ".gguf":
        return _converted(path)
    found = _HUB_ID.fullmatch(str(policy))
    if path.exists() or not found or path.suffix in weights.PICKLES:
        return path
    return _fetched(found[1], found[2])


def at_revision(policy: str, revision: str) -> str:
    """The name of a model of the hub at a branch, a tag or a commit, as `resolve` takes it.

    Raises:
      UserError: the policy is no model of the hub, or names a revision itself.
    """
    found = _HUB_ID.fullmatch(policy)
    if not revision:
        return policy
    if found is None or found[2] or pathlib.Path(policy).exists():
        raise UserError(
            f"--revision={revision}: a model of the hub has revisions, and {policy!r} is a folder, "
            "a file or a revision already; leave --revision out"
        )
    return f"{policy}@{revision}"


def _converted(path: pathlib.Path) -> pathlib.Path:
    """The folder that a GGUF file was converted to, or is now."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found = path.stat()
    mark = f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
    folder = pathlib.Path.home() / ".cache" / "spa_jax" / "models" / name
    if not (folder / "config.json").is_file():  # written whole or not at all
        from spa_jax.models.io import gguf  # few policies come so

        print(f"{path}: converting to {folder}", flush=True)
        gguf.import_gguf(path, folder)
    return folder


def _fetched(name: str, revision: str | None) -> pathlib.Path:
    """The hub's snapshot of a model, fetched if it is not in the cache."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_HUB_FILES)
        )
    except Exception as error:  # of the network, of HTTP, of the hub, of its cache
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{name}{f' at revision {revision}' if revision else ''}: no such folder, and the "
            f"Hugging Face hub gave no such model ({reason[0]}); "
            "give a folder (python -m experiments.fetch_policy makes one for the quickstart), or a "
            "model of the hub by its whole name"
        ) from error
    path = pathlib.Path(folder)
    if (path / "config.json").is_file() and not any(path.glob("model*.safetensors")):
        raise UserError(
            f"{name}: the hub's copy has no model.safetensors; pickled weights are not read, "
            "because opening a pickle can run any code; choose a copy of the model in safetensors"
        )
    return path


def weight_files(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The files that a policy's weights come from, those of an adapter's base among them."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    return files + (weight_files(peft.adapter_base(folder)) if peft.is_adapter(folder) else [])
