"""Episodes get their contributions, rewards and the reference policy's log-probabilities."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from spa_jax.attribution import credit
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import lora as lora_lib
from spa_jax.models.config import Params
from spa_jax.models.io import huggingface, peft, pretrained, tensors
from spa_jax.policy import ADAPTER, TRUNK, Policy
from spa_jax.stage_config import CreditConfig
from spa_jax.training import estimator_data, estimator_update, scoring, step_credits
from spa_jax.training.estimator_data import final_rewards
from spa_jax.trajectory import Trajectory
from spa_jax.truth import Key


def annotate(
    trajectories: Sequence[Trajectory],
    scores: scoring.Scores,
    contributions: np.ndarray,
    *,
    expected: np.ndarray,
    settings: CreditConfig,
    seed: int,
    reference: str,
    branches: Mapping[Key, np.ndarray] | None = None,
) -> list[Trajectory]:
    """The same episodes with contributions and fused rewards.

    Args:
      trajectories: N episodes.
      scores: of them under the reference policy.
      contributions: [N, S] c_k; 0 where there is no step.
      expected: [N] the reward that the estimator expects before the first step.
      settings: whose credit the steps get, and how grounding enters.
      seed: of the placebos.
      reference: names the reference policy (`provenance.policy_digest`).
      branches: as in `step_credits.of`.

    Raises:
      UserError: the episodes do not say what the credit is made of.
    """
    mask = scores.step_mask
    grounded = np.zeros(mask.shape, np.float32)
    for i, trajectory in enumerate(trajectories):
        grounded[i, : len(trajectory.steps)] = [step.grounded for step in trajectory.steps]
    own = step_credits.of(settings.credit, trajectories, scores, branches)
    credits = credit.credit(
        settings.credit if own is None else "spa",  # a credit of its own is shared out already
        contributions if own is None else own,
        final_rewards(trajectories),
        mask,
        jax.random.key(seed),
        residual=settings.credit_residual,
    )
    rewards = credit.fused_reward(
        credits,
        grounded,
        mask,
        alpha=settings.alpha,
        beta=settings.beta,
        grounding=settings.grounding,
    )
    annotated = []
    for t, c, b, r, ref in zip(
        trajectories,
        contributions.tolist(),
        expected.tolist(),
        np.asarray(rewards).tolist(),
        scores.log_probs,
        strict=True,
    ):
        steps = tuple(
            dataclasses.replace(step, contribution=contribution, reward=reward)
            for step, contribution, reward in zip(t.steps, c, r, strict=False)
        )
        annotated.append(
            dataclasses.replace(
                t,
                steps=steps,
                expected=b,
                ref_log_probs=tuple(ref.tolist()),
                ref_policy=reference,
            )
        )
    return annotated


def contributions(
    base: Policy,
    progress: pathlib.Path,
    trajectories: Sequence[Trajectory],
    scores: scoring.Scores,
    rows: RowsConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """What the estimator of a folder gives each step, and expects before the first.

    Args:
      base: the trunk, or the policy beside which the head lies.
      progress: the folder of the estimator.
      trajectories: N episodes.
      scores: of them under `base`.
      rows: the static shape.

    Returns:
      ([N, S] c_k, 0 where there is no step; [N] the reward that is expected before the first).
    """
    head = progress_head(base, progress)
    trunk = _own_trunk(base, progress)
    if trunk is not None:
        scores = scoring.score(
            base.config,
            {"policy": trunk},
            trajectories,
            rows,
            temperature=1.0,
            title="contributions",
            chat=base.chat,
        )
    paper = estimator_update.kind_of(head) == estimator_update.PAPER
    features = estimator_data.features_of(scores, trajectories, paper=paper)
    given, expected = estimator_update.contributions(head, features)
    return np.asarray(given), np.asarray(expected)


def head_folder(progress: pathlib.Path, base: str) -> pathlib.Path:
    """The folder of the head that is read: the estimator's, or else the policy's.

    Args:
      progress: the folder of the estimator.
      base: the policy beside which a head may lie.

    Raises:
      UserError: there is none in either.
    """
    for folder in (progress, pretrained.resolve(base)):
        if tensors.heads_file(folder):
            return folder
    raise UserError(
        f"{progress}: holds no progress head, nor does {base}; run train_progress first"
    )


def progress_head(base: Policy, progress: pathlib.Path) -> Params:
    """The head of an estimator's folder, or else the one that lies beside the policy.

    Raises:
      UserError: there is none that reads this policy's hidden states.
    """
    trained = tensors.load_heads(progress).get("progress")
    if trained is not None:
        return trained
    if "progress" not in base.heads:
        raise UserError(
            f"{progress}: holds no progress head, nor does {base.folder}; run train_progress first"
        )
    if base.trunk:
        raise UserError(
            f"{base.folder}: its progress head reads the hidden states of {base.trunk}; give that "
            "with --policy"
        )
    return base.heads["progress"]


def _own_trunk(base: Policy, progress: pathlib.Path) -> Params | None:
    """The weights that an estimator of this folder reads, if they were trained with its heads."""
    if peft.is_adapter(progress / ADAPTER):
        lora, adapter = peft.load_adapter(progress / ADAPTER, base.config)
        return jax.device_get(lora_lib.merge(lora, base.params, adapter))
    if (progress / TRUNK).is_dir():
        return huggingface.load_pretrained(progress / TRUNK)[1]
    return None
