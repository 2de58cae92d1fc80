"""The policy's update over annotated episodes: PPO, an objective without a critic, or rft."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from spa_jax import batching
from spa_jax import policy as policy_lib
from spa_jax.config import RowsConfig
from spa_jax.models import heads
from spa_jax.models.config import Params
from spa_jax.models.io import pretrained
from spa_jax.policy import Policy
from spa_jax.rl import losses, objectives
from spa_jax.stage_config import RFT, PpoConfig
from spa_jax.training import (
    costs,
    partition,
    ppo_data,
    ppo_update,
    schedule,
    scoring,
    sft_update,
)
from spa_jax.training import state as state_lib
from spa_jax.training.loop import Loop, Outcome
from spa_jax.training.state import TrainState
from spa_jax.training.trainable import Trainable
from spa_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Learner:
    """What an update of the policy is made from.

    Attributes:
      trainable: what is trained of the policy that played.
      trajectories: the episodes; for rft the won ones.
      scores: of them under the critic's policy; None without a critic.
      head: {"value": the value head} if one is trained along.
      ppo: the objective and its settings.
      rows: the static shape.
      temperature: the policy is softmax(logits / temperature).
      lower_states_file: where the estimator's pass kept what frozen layers make of the episodes.
    """

    trainable: Trainable
    trajectories: Sequence[Trajectory]
    scores: scoring.Scores | None
    head: dict[str, Params]
    ppo: PpoConfig
    rows: RowsConfig
    temperature: float
    lower_states_file: pathlib.Path

    def run(self, out: pathlib.Path, *, seed: int, constants: Mapping[str, float]) -> TrainState:
        """All updates, from the newest checkpoint if there is one.

        Args:
          out: gets metrics.jsonl and checkpoints.
          seed: of the order of the trajectories.
          constants: metrics that are the same for every update.

        Returns:
          The last state, on the host, without the optimiser's part.
        """
        ppo, trajectories, parts = self.ppo, self.trajectories, self.trainable.parts
        config = self.trainable.policy.config
        optimizer = state_lib.adamw(
            optax.constant_schedule(ppo.learning_rate),
            clip_norm=state_lib.CLIP_NORM,
            weight_decay=0.0,
        )
        loss = (
            sft_update.make_loss(config)
            if ppo.objective == RFT
            else ppo_update.make_loss(config, ppo, self.temperature)
        )
        frozen = parts.frozen_in(config.dtype)
        trainer = partition.make(self.rows, parts.on_parts(loss), optimizer, frozen=frozen)
        make = self._updates(trainer)
        loop = Loop(
            out,
            trainer=trainer,
            params=parts.trained | self.head,
            carry={"kl_coef": np.float64(ppo.kl_coef)} if ppo.kl_target else None,
            every=ppo.checkpoint_every,
            max_skipped_share=self.rows.max_skipped_share,
        )
        lengths = [len(t.token_ids) for t in trajectories]
        total = ppo.epochs * -(-len(trajectories) // ppo.batch_size)

        def step(update: int, state: TrainState, carry: Mapping[str, Any]) -> Outcome:
            tick = time.time()
            chosen = schedule.batch_of(update, lengths, ppo.batch_size, seed)
            kl_coef = float(carry["kl_coef"]) if ppo.kl_target else ppo.kl_coef
            made = make(chosen, state.params, kl_coef)
            state, sums = trainer.update(state, made.batches, made.counts)
            tokens = float(batching.token_count(made.packed))
            episodes = [trajectories[i] for i in chosen]
            line = ppo_data.update_metrics(sums, made, episodes)
            line |= {
                "tokens": tokens,
                "tokens_per_second": tokens / (time.time() - tick),
                "padding_share": batching.padding_share(*(b.rows for b in made.batches)),
                **constants,
            }
            line |= costs.of_update(
                config,
                episodes,
                time.time() - tick,
                layers=ppo.train_layers,
                adapters=bool(parts.lora.rank),
            )
            if not ppo.kl_target:
                return Outcome(state, line)
            assert made.kl is not None
            after = losses.adapted_kl_coef(
                kl_coef,
                made.kl,
                target=ppo.kl_target,
                episodes=len(chosen),
                horizon=ppo.kl_horizon,
            )
            line |= {"kl_coef": kl_coef, "kl_episode": made.kl}
            return Outcome(state, line, carry={"kl_coef": np.float64(after)})

        state = loop.run(step, total=total, title="ppo")
        # The moments are twice the size of all else, and nobody reads them.
        return trainer.fetch(dataclasses.replace(state, opt_state=None))

    def _updates(
        self, trainer: partition.Trainer
    ) -> Callable[[np.ndarray, Any, float], ppo_data.Update]:
        """(indices of episodes, parameters on the devices, KL weight) -> an update's data."""
        ppo, rows, trajectories = self.ppo, self.rows, self.trajectories
        parts, config = self.trainable.parts, self.trainable.policy.config
        lower = self._lower_states(trainer)
        if ppo.objective == RFT:
            return lambda chosen, *_: ppo_data.make_rft_update(
                trajectories, chosen, rows, devices=trainer.devices, lower_states=lower
            )
        values = None if self.scores is None else self.scores.values
        action_values = None
        if ppo.gae == "token":
            run = trainer.forward(parts.on_parts(ppo_update.make_token_values(config)))
            at_start = functools.partial(run, trainer.replicate(parts.trained | self.head))
            values = ppo_data.token_values(
                at_start, trajectories, rows, devices=trainer.devices, lower_states=lower
            )
        if self.scores is not None and ppo.critic == "ridge":
            values = ppo_data.fitted_values(trajectories, self.scores.value_hidden, ppo)
        if self.scores is not None and objectives.OBJECTIVES[ppo.objective].actions:
            action_values, values = ppo_data.fitted_critic(trajectories, self.scores, ppo)
        table = ppo_data.make_table(trajectories, values, ppo, action_values=action_values)
        log_probs = trainer.forward(
            parts.on_parts(ppo_update.make_log_probs(config, self.temperature))
        )
        return lambda chosen, now, kl_coef: ppo_data.make_update(
            trajectories,
            table,
            chosen,
            rows,
            ppo,
            devices=trainer.devices,
            lower_states=lower,
            log_probs=functools.partial(log_probs, now),
            kl_coef=kl_coef,
        )

    def _lower_states(self, trainer: partition.Trainer) -> list[np.ndarray] | None:
        """What the frozen layers make of the episodes: what the estimator's pass kept, or one more.

        The estimator read them with the base policy, whose lower layers are this policy's if no
        round has trained them.
        """
        parts, config = self.trainable.parts, self.trainable.policy.config
        lower = scoring.cached_lower_states(
            self.lower_states_file, config, parts.frozen, self.trajectories
        )
        if lower is not None:
            return lower
        return scoring.lower_states(
            config, trainer, self.trajectories, self.rows, title="frozen layers"
        )


def critic_policy(policy: Policy, reference: pathlib.Path, ppo: PpoConfig) -> Policy:
    """The policy whose hidden states the values are made of.

    A value head reads the policy that is trained, and goes on with it.  The ridge critic is fitted
    anew in every round, so it can read the reference in all of them: the estimator has read these
    episodes with it, and its pass is kept.
    """
    fitted = ppo.critic == "ridge" or (
        ppo.objective != RFT and objectives.OBJECTIVES[ppo.objective].actions
    )
    if not fitted or not reference.exists():
        return policy
    folder = pretrained.resolve(reference)
    if folder == policy.folder:
        return policy
    return policy_lib.load(folder, policy.chat_format, policy.config.compute)


def critic_scores(
    policy: Policy,
    trajectories: Sequence[Trajectory],
    *,
    features: pathlib.Path,
    rows: RowsConfig,
    ppo: PpoConfig,
    temperature: float,
) -> scoring.Scores | None:
    """The scores of the episodes under the critic's policy, and its value head if it has one.

    Args:
      policy: the critic's, see `critic_policy`.
      trajectories: N episodes.
      features: where the estimator's pass is kept: in round 0 it is this one.
      rows: the static shape.
      ppo: the objective.
      temperature: that the episodes were sampled at.

    Returns:
      None for an objective without a critic.
    """
    if ppo.objective == RFT:
        return None
    objective = objectives.OBJECTIVES[ppo.objective]
    if not (objective.critic or objective.actions):
        return None
    read = ("value",) if objective.critic and ppo.critic == "head" else ()
    heads_of = {name: head for name, head in policy.heads.items() if name in read}
    return scoring.cached_score(
        policy.config,
        {"policy": policy.params} | heads_of,
        trajectories,
        rows,
        cache=features,
        policy_folder=policy.folder,
        temperature=temperature,
        title="values",
        chat=policy.chat,
        write=False,
    )


def value_head(policy: Policy, scores: scoring.Scores, seed: int) -> Params:
    """The policy's value head, or a new one."""
    if "value" in policy.heads:
        return policy.heads["value"]
    fresh = jax.jit(heads.Head().init)(jax.random.key(seed), scores.value_hidden[:1, :1])
    return heads.fit_norm(fresh["params"], scores.value_hidden, scores.step_mask)
