"""A trained policy for other programs: a Hugging Face folder, or a PEFT adapter's, with heads."""

import os
import pathlib
import shutil
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax import files, model_card
from spa_jax import policy as policy_lib
from spa_jax import run as run_lib
from spa_jax.config import Dtype
from spa_jax.errors import UserError
from spa_jax.models.io import huggingface, peft, tensors
from spa_jax.policy import ABOUT, ADAPTER, TRUNK, Policy


def export(
    checkpoint: pathlib.Path,
    out: pathlib.Path,
    *,
    adapter: bool = False,
    progress: str = "",
    dtype: Dtype = "float32",
) -> list[str]:
    """Writes `out`, whole or not at all; returns the names of the heads in heads/.

    Args:
      checkpoint: a policy's folder, or that of the stage that made it.
      out: must not be there yet.
      adapter: write the policy's adapter alone.
      progress: the folder of a progress head; "": the one of the policy's own round, if any.
      dtype: of the weights; an adapter's stay float32.

    Raises:
      UserError: `out` is there, or `checkpoint` is no policy, or has no adapter.
    """
    if out.exists():
        raise UserError(f"--out={out}: is there already; choose another folder, or remove it")
    folder = find_policy(checkpoint)
    policy = policy_lib.load(folder)
    heads = dict(policy.heads)
    about: dict[str, Any] = {"version": policy.version}
    if policy.trunk:
        about["progress_trunk"] = os.path.relpath(policy.trunk, out.resolve())
    source = pathlib.Path(progress) if progress else folder.parent.parent / "progress"
    found = tensors.load_heads(source).get("progress")
    if progress and found is None:
        raise UserError(f"--progress={progress}: holds no progress head; run train_progress first")
    if found is not None:
        heads["progress"] = found
        trunk = trunk_of(source, folder)
        about["progress_trunk"] = trunk and os.path.relpath(trunk, out.resolve())
    new = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        if adapter:
            _write_adapter(new, policy)
        else:
            params = jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), policy.params)
            huggingface.save_pretrained(new, policy.config, params, policy.model)
        if heads:
            tensors.save_heads(new, heads)
        files.write_json(new / ABOUT, about)
        (new / "README.md").write_text(model_card.write(folder, out.name, adapter=adapter))
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return sorted(heads)


def find_policy(checkpoint: pathlib.Path) -> pathlib.Path:
    """The policy's folder that --checkpoint means.

    Raises:
      UserError: there is none.
    """
    for folder in (checkpoint / "policy", checkpoint):
        if (folder / "config.json").is_file() or peft.is_adapter(folder):
            return folder
    raise UserError(
        f"--checkpoint={checkpoint}: holds no policy; give the folder of a stage that has ended "
        "(W/sft, W/iteration_0/ppo) or of a policy"
    )


def trunk_of(progress: pathlib.Path, policy: pathlib.Path) -> str:
    """The policy whose hidden states a progress head reads; "" if it is this one."""
    for own in (progress / ADAPTER, progress / TRUNK):
        if own.is_dir():
            return str(own.resolve())
    try:
        trunk = (progress / str(files.read_done(progress)["trunk"])).resolve()
    except (UserError, KeyError) as error:
        raise UserError(
            f"{run_lib.done(progress)}: says not which policy's hidden states the progress head "
            "reads; run train_progress to its end"
        ) from error
    return "" if trunk == policy.resolve() else str(trunk)


def _write_adapter(new: pathlib.Path, policy: Policy) -> None:
    own = policy.folder if peft.is_adapter(policy.folder) else policy.folder / ADAPTER
    if not peft.is_adapter(own):
        raise UserError(
            f"--adapter: {policy.folder} was trained without --lora_rank; leave --adapter out"
        )
    lora, tree = peft.load_adapter(own, policy.config)
    peft.save_adapter(new, lora, tree, os.fspath(peft.adapter_base(own)))
    huggingface.copy_tokenizer(policy.model, new)
