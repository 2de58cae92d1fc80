"""Stage 4: gives every step its contribution and its reward.

    python -m experiments.annotate --workdir=W

Reads W/iteration_I/explore/trajectories.jsonl and W/iteration_I/progress; writes
W/iteration_I/annotated.jsonl: the same episodes with contributions, fused rewards
(alpha * c + beta * grounding) and the reference policy's log-probabilities.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence

import jax
import numpy as np
from absl import flags

from experiments import common, train_progress
from experiments import flags as flags_lib
from spa_jax import config as config_lib
from spa_jax import store
from spa_jax.attribution import credit
from spa_jax.config import (
    DEFAULT_COMPUTE,
    ComputeConfig,
    CreditConfig,
    DistributedConfig,
    RowsConfig,
)
from spa_jax.errors import UserError
from spa_jax.models import heads
from spa_jax.models import lora as lora_lib
from spa_jax.models.config import Params
from spa_jax.models.io import peft, tensors
from spa_jax.training import distributed, scoring
from spa_jax.trajectory import Trajectory


def run(
    out: pathlib.Path,
    policy_folder: str,
    data: pathlib.Path,
    progress_folder: pathlib.Path,
    settings: CreditConfig,
    rows: RowsConfig,
    seed: int,
    keys: Collection[tuple] | None = None,
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> list[Trajectory]:
    """Writes the episodes of `data` to the file `out`, annotated; returns those.

    With `keys`, only the episodes with these keys are annotated; the others are written as they
    are, and environment errors are left out either way.
    """
    compute = config_lib.fit_attention(compute, rows)
    policy = common.load_policy(policy_folder, compute=compute)
    head = progress_head(policy, progress_folder)
    played = train_progress.playable(store.read(data))
    trajectories = [t for t in played if keys is None or t.key in keys]
    common.agree_on(trajectories, data)
    if not trajectories:
        raise UserError(f"{data}: holds no episode to annotate")
    scores = train_progress.scores_of(policy, data, trajectories, rows)
    mask = scores.step_mask
    hidden = scores.end_hidden
    if peft.is_adapter(progress_folder / common.ADAPTER):
        hidden = adapted_hidden(policy, progress_folder / common.ADAPTER, trajectories, rows)
    contributions = np.asarray(heads.read(head, hidden)) * mask
    grounded = np.zeros(mask.shape, np.float32)
    for i, trajectory in enumerate(trajectories):
        grounded[i, : len(trajectory.steps)] = [step.grounded for step in trajectory.steps]
    final_reward = np.array([t.final_reward for t in trajectories], np.float32)
    credits = credit.credit(
        settings.credit, contributions, final_reward, mask, jax.random.key(seed),
        residual=settings.credit_residual,
    )  # fmt: skip
    rewards = credit.fused_reward(
        credits, grounded, mask,
        alpha=settings.alpha, beta=settings.beta, grounding=settings.grounding,
    )  # fmt: skip
    key = scoring.policy_key(policy.folder)
    annotated = [
        dataclasses.replace(_with(t, c, r, ref), ref_policy=key)
        for t, c, r, ref in zip(
            trajectories, contributions.tolist(), np.asarray(rewards).tolist(), scores.log_probs,
            strict=True,
        )
    ]  # fmt: skip
    by_key = {t.key: t for t in annotated}
    every = [by_key.get(t.key, t) for t in played]
    distributed.first_alone(f"write {out}", lambda: store.write(out, every))
    return annotated


def progress_head(policy: common.Policy, progress_folder: pathlib.Path) -> Params:
    """The stage's progress head, or else the one that lies beside the policy.

    Raises:
      UserError: there is none that reads this policy's hidden states.
    """
    trained = tensors.load_heads(progress_folder).get("progress")
    if trained is not None:
        return trained
    if "progress" not in policy.heads:
        raise UserError(
            f"{progress_folder}: holds no progress head, nor does {policy.folder}; run "
            "train_progress first"
        )
    if policy.trunk:
        raise UserError(
            f"{policy.folder}: its progress head reads the hidden states of {policy.trunk}; give "
            "that with --policy"
        )
    return policy.heads["progress"]


def adapted_hidden(
    policy: common.Policy,
    adapter_folder: pathlib.Path,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
) -> np.ndarray:
    """[N, S, D] what the trunk with the estimator's adapters says at the end of each step."""
    lora, adapter = peft.load_adapter(adapter_folder, policy.config)
    trunk = {"policy": jax.device_get(lora_lib.merge(lora, policy.params, adapter))}
    return scoring.score(
        policy.config, trunk, trajectories, rows, temperature=1.0, title="contributions"
    ).end_hidden


def _with(
    trajectory: Trajectory, contributions: list[float], rewards: list[float], ref: np.ndarray
) -> Trajectory:
    steps = tuple(
        dataclasses.replace(step, contribution=c, reward=r)
        for step, c, r in zip(trajectory.steps, contributions, rewards, strict=False)
    )
    return dataclasses.replace(trajectory, steps=steps, ref_log_probs=tuple(ref.tolist()))


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    folder = workdir / f"iteration_{_ITERATION.value}"
    annotated = run(
        folder / "annotated.jsonl",
        _POLICY.value or str(workdir / "sft" / "policy"),
        pathlib.Path(_DATA.value) if _DATA.value else folder / "explore" / "trajectories.jsonl",
        folder / "progress",
        flags_lib.read(CreditConfig),
        flags_lib.read(RowsConfig),
        flags_lib.SEED.value,
        compute=flags_lib.read(ComputeConfig),
    )
    print(f"RESULT annotated={len(annotated)} out={folder / 'annotated.jsonl'}")


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string("policy", "", "Folder of the trunk; W/sft/policy by default.")
    _DATA = flags.DEFINE_string("data", "", "Episodes; W/iteration_I/explore by default.")
    _ITERATION = flags.DEFINE_integer("iteration", 0, "The round.")
    flags_lib.define(CreditConfig, RowsConfig, ComputeConfig, DistributedConfig)
    flags_lib.run(common.stage(main), flags_lib.WORKDIR, flags_lib.SEED)
