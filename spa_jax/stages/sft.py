"""Stage 1: clones a base agent from the demonstrations of a run.

Reads W/demos/{train,valid}/trajectories.jsonl; writes W/sft/policy (the last weights, with
--sft_ema their average, with --sft_patience those of the best held-out loss), metrics.jsonl and
checkpoints.  Run again, it continues.
"""

import dataclasses
import pathlib
import time

from spa_jax import chat, episodes, files, policy, provenance, store
from spa_jax.config import fit_attention
from spa_jax.errors import UserError
from spa_jax.policy import Policy
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.stage_config import SftConfig
from spa_jax.training import cloning, trainable
from spa_jax.trajectory import Trajectory


def run(run: Run) -> None:
    """Trains the base policy; nothing if --base gives one."""
    if not run.settings.method.base:
        train(run, out=run.sft, start=run.policy, sft=run.settings.sft, seed=run.seed)


def train(run: Run, *, out: pathlib.Path, start: str, sft: SftConfig, seed: int) -> None:
    """Trains a policy on the run's demonstrations, and writes out/policy.

    Args:
      run: the run.
      out: the stage's folder.
      start: the policy that it starts from.
      sft: how it is trained.
      seed: of the demonstrations' order.

    Raises:
      UserError: nothing was demonstrated, or a demonstration fits neither the model nor a row.
    """
    gone = distributed.broadcast("demonstrations: gone", lambda: not run.demos.exists())
    if gone and files.is_done(out, out.name):  # they have served, and somebody removed them
        return
    provenance.check_stage(
        run,
        "sft",
        out,
        inputs={
            "policy": provenance.policy_digest(start),
            **{
                f"{part} demonstrations": provenance.file_digest(run.demonstrations(part))
                for part in ("train", "valid")
                if run.demonstrations(part).exists()
            },
        },
        settings={"sft_updates": sft.updates, "sft_eval_every": sft.eval_every, "seed": seed},
    )
    if files.is_done(out, out.name):
        return
    started, settings = time.time(), run.settings
    rows = dataclasses.replace(
        settings.rows, row_buckets=sft.row_buckets or settings.rows.row_buckets
    )
    compute = fit_attention(settings.compute, rows)
    first = policy.load(start, settings.chat.name, compute)
    train, valid = (_demonstrations(run, part, first) for part in ("train", "valid"))
    if not train:
        raise UserError(
            f"{out}: no demonstration to learn from; the expert must win within --max_steps"
        )
    if sft.patience and not valid:
        raise UserError(
            f"--sft_patience={sft.patience} stops by the loss on held-out demonstrations, and "
            f"{run.demonstrations('valid')} holds none: record some, or drop the flag"
        )
    episodes.check_fit(first.config, [*train, *valid], "demonstrations", rows)
    episodes.assert_same_everywhere([*train, *valid], "demonstrations")
    best, updates = cloning.clone(
        trainable.make(first, train_layers=sft.train_layers, lora=run.lora("sft"), seed=seed),
        train,
        valid,
        sft=sft,
        rows=rows,
        seed=seed,
        out=out,
    )
    files.mark_done(out, started, updates=updates, best_valid_loss=best)


def _demonstrations(run: Run, part: str, first: Policy) -> list[Trajectory]:
    """The won episodes of a part, as the policy's tokens; without a held-out part it is empty."""
    path = run.demonstrations(part)
    if part == "valid" and not distributed.broadcast(f"{path}: is there", path.exists):
        distributed.say(f"{path} is not there: SFT goes without a held-out loss")
        return []
    return [chat.encode_trajectory(first.chat, t) for t in store.read(path) if t.success]
