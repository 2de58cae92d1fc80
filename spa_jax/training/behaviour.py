"""Are the annotated episodes those that this update is for?  Who sampled them, and how."""

import pathlib
from collections.abc import Sequence

import numpy as np
import tqdm

from spa_jax import provenance
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.policy import Policy
from spa_jax.stage_config import RFT, PpoConfig
from spa_jax.training import scoring
from spa_jax.trajectory import Trajectory

_MISMATCH = 0.01  # nats between sampler and trainer that are worth a word; float32 has 1e-5
_MISMATCH_EPISODES = 6  # scored for that where the objective needs no scores of the policy


def temperature(source: pathlib.Path, trajectories: Sequence[Trajectory], ppo: PpoConfig) -> float:
    """The temperature that the episodes were sampled at.

    Args:
      source: their file, for the messages.
      trajectories: the episodes.
      ppo: the objective.

    Raises:
      UserError: if there is none, or PPO's ratio would not be that of the sampler.
    """
    if not trajectories:
        raise UserError(f"{source}: holds no episode to train on")
    for t in trajectories:
        if t.sampling is None or any(step.reward is None for step in t.steps):
            raise UserError(
                f"{source}: episode {t.key} has no "
                + ("recorded sampling" if t.sampling is None else "rewards: run annotate first")
            )
    kinds = {t.sampling for t in trajectories if t.sampling is not None}
    temperatures = {kind.temperature for kind in kinds}
    if ppo.objective == RFT:
        return 1.0  # no ratio is taken to the policy that sampled
    if len(temperatures) > 1:
        raise UserError(f"{source}: episodes of several temperatures: {sorted(temperatures)}")
    truncated = any(k.temperature == 0 or k.top_k or k.top_p < 1 for k in kinds)
    if truncated and not ppo.allow_truncated_behaviour:
        raise UserError(
            f"{source}: sampled greedily or with top-k/top-p, so its log-probabilities are not "
            "those of the distribution it was drawn from; explore with --temperature=1 --top_k=0 "
            "--top_p=1, or give --allow_truncated_behaviour"
        )
    return temperatures.pop() or 1.0


def check_reference(
    source: pathlib.Path,
    trajectories: Sequence[Trajectory],
    reference: pathlib.Path,
    ppo: PpoConfig,
) -> None:
    """Refuses log-probabilities of a reference policy that has been replaced since.

    Episodes that were annotated before their reference was noted are taken as they are.

    Raises:
      UserError: they are of another policy than the one in the folder `reference`, or the KL to it
        is wanted and they are missing.
    """
    if ppo.kl_coef and any(t.ref_log_probs is None for t in trajectories):
        raise UserError(f"{source}: holds no reference log-probabilities: run annotate first")
    noted = {t.ref_policy for t in trajectories} - {""}
    if noted and reference.exists():
        if noted != {provenance.policy_digest(reference)}:
            raise UserError(
                f"{source}: its reference log-probabilities are not of {reference} as it is now: "
                "run annotate again"
            )


def sampler_mismatch(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    scores: scoring.Scores | None,
    rows: RowsConfig,
) -> float:
    """Largest |log-prob recorded while sampling - log-prob of the forward pass|, in nats.

    Args:
      policy: that sampled.
      trajectories: the episodes.
      scores: of them under the policy; None: a few of them are scored for this.
      rows: the static shape.
    """
    if scores is None:
        assert trajectories[0].sampling is not None  # see `temperature`
        drawn = trajectories[0].sampling.temperature
        trajectories = [t for t in trajectories if t.sampling and t.sampling.temperature == drawn]
        trajectories = trajectories[:_MISMATCH_EPISODES]
        scores = scoring.score(
            policy.config,
            {"policy": policy.params},
            trajectories,
            rows,
            temperature=drawn or 1.0,
            title="sampler mismatch",
        )
    found = max(
        float(np.max(np.abs(np.asarray(t.log_probs, np.float32) - log_probs)))
        for t, log_probs in zip(trajectories, scores.log_probs, strict=True)
    )
    if found > _MISMATCH:
        tqdm.tqdm.write(
            f"the log-probabilities recorded while sampling differ from the trainer's by up to "
            f"{found:.3f} nats: the first update's ratios are wrong by as much"
        )
    return found
