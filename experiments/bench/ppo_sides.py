"""The two sides of `ppo`: the same PPO update by us and by transformers with PyTorch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench import ppo_peer, updates
from spa_jax.config import LoraConfig, RowsConfig
from spa_jax.models import heads
from spa_jax.models import lora as lora_lib
from spa_jax.models.config import ModelConfig, Params
from spa_jax.stage_config import PpoConfig
from spa_jax.training import partition, ppo_data, ppo_update, scoring
from spa_jax.training import parts as parts_lib
from spa_jax.training import state as state_lib
from spa_jax.trajectory import Trajectory

PPO = PpoConfig(learning_rate=1e-5, kl_coef=0.05)
LORA = LoraConfig(rank=8, alpha=16.0, targets=("q", "v"))
MINIBATCH = 4
_SAME = 2e-3  # relative: what the two sides' gradient norms may differ by


def random_head(kind: type, size: int) -> Params:
    """A head whose output is not 0 from the start."""
    made = jax.jit(kind().init)(jax.random.key(1), np.zeros((1, size), np.float32))["params"]
    kernel = made["out"]["kernel"]
    return {**made, "out": {**made["out"], "kernel": kernel + 0.05}}


@dataclasses.dataclass(frozen=True)
class Sides:
    """The same weights and episodes on both sides.

    Attributes:
      config: the model's shape.
      params, value: the policy's and the value head's parameters.
      episodes: with recorded log-probabilities of this policy.
      table: of the episodes.
      groups: the episodes of each optimiser step.
      rows: our static shape.
      adapter: for LoRA; None: everything is trained.
    """

    config: ModelConfig
    params: Params
    value: Params
    episodes: list[Trajectory]
    table: ppo_data.Table
    groups: list[np.ndarray]
    rows: RowsConfig
    adapter: Params | None


def make(
    episodes: Sequence[Trajectory],
    rows: RowsConfig,
    *,
    group: int,
    config: ModelConfig,
    params: Params,
    lora: bool,
) -> Sides:
    """Both sides' work; the log-probabilities are recorded as sampling and annotating do."""
    value = random_head(heads.Head, config.hidden_size)
    adapter = None
    if lora:
        adapter = lora_lib.init(LORA, params, jax.random.key(2))
        for leaves in adapter["layers"].values():
            leaves["b"] = 0.01 * jax.random.normal(jax.random.key(3), leaves["b"].shape)
    policy = params if adapter is None else lora_lib.merge(LORA, params, adapter)
    played = scoring.score(
        config, {"policy": policy, "value": value}, episodes, rows, temperature=1.0, title=""
    )
    base = scoring.score(config, {"policy": params}, episodes, rows, temperature=1.0, title="")
    recorded = [
        dataclasses.replace(t, log_probs=tuple(a.tolist()), ref_log_probs=tuple(b.tolist()))
        for t, a, b in zip(episodes, played.log_probs, base.log_probs, strict=True)
    ]
    table = ppo_data.make_table(recorded, played.values, PPO)
    order = np.random.default_rng(0).permutation(len(recorded))
    groups = [order[i : i + group] for i in range(0, len(recorded), group)]
    return Sides(
        config=config,
        params=params,
        value=value,
        episodes=recorded,
        table=table,
        groups=groups,
        rows=rows,
        adapter=adapter,
    )


class Ours:
    """Our passes over the work of `Sides`."""

    def __init__(self, sides: Sides) -> None:
        """Places the parameters; compiles nothing yet."""
        self._sides, optimizer = sides, updates.adamw()
        parts = parts_lib.split(sides.config, sides.params, 0)
        self._policy = sides.params
        if sides.adapter is not None:
            parts = parts_lib.adapt(LORA, sides.params, sides.adapter)
            self._policy = lora_lib.merge(LORA, sides.params, sides.adapter)
        loss = parts.on_parts(ppo_update.make_loss(sides.config, PPO, 1.0))
        self._trainer = partition.make(sides.rows, loss, optimizer, frozen=parts.frozen)
        trained = parts.trained | {"value": sides.value}
        self._state = self._trainer.replicate(state_lib.create(trained, optimizer))

    def forward(self) -> scoring.Scores:
        """Log-probabilities, values and hidden states of the episodes."""
        params = {"policy": self._policy, "value": self._sides.value}
        return scoring.score(
            self._sides.config,
            params,
            self._sides.episodes,
            self._sides.rows,
            temperature=1.0,
            title="",
        )

    def update(self) -> float:
        """The optimiser steps, with the packing of their rows; the first gradient's norm."""
        norms = []
        for chosen in self._sides.groups:
            made = ppo_data.make_update(
                self._sides.episodes,
                self._sides.table,
                chosen,
                rows=self._sides.rows,
                ppo=PPO,
                devices=self._trainer.devices,
            )
            self._state, sums = self._trainer.update(self._state, made.batches, made.counts)
            norms.append(sums["grad_norm"])
        jax.block_until_ready(self._state)
        return norms[0]


class Theirs:
    """PyTorch's passes over the work of `Sides`, in padded minibatches."""

    def __init__(self, sides: Sides, *, pad_to_batch: bool = False) -> None:
        """Copies the weights and makes the minibatches; neither is timed.

        Args:
          sides: the work.
          pad_to_batch: pad to the longest row of an optimiser step, as trl's PPOTrainer does
            and so the released code; else to the longest of the minibatch.
        """
        self._peer = ppo_peer.Peer(
            sides.config,
            jax.device_get(sides.params),
            jax.device_get(sides.value),
            ppo=PPO,
            lora=LORA,
            adapter=sides.adapter,
        )
        self._groups = []
        for chosen in sides.groups:
            table = sides.table.take(chosen)
            given = ppo_data.by_place(table, PPO)
            cuts = [slice(i, i + MINIBATCH) for i in range(0, len(chosen), MINIBATCH)]
            longest = max(len(sides.episodes[i].token_ids) for i in chosen)
            self._groups.append(
                [
                    ppo_peer.batch(
                        [sides.episodes[i] for i in chosen[cut]],
                        {name: array[cut] for name, array in given.items()},
                        longest if pad_to_batch else 0,
                    )
                    for cut in cuts
                ]
            )
        self.padded = sum(one.tokens.numel() for group in self._groups for one in group)

    def forward(self, *, everywhere: bool) -> Any:
        """Log-probabilities and values."""
        batches = [one for group in self._groups for one in group]
        return self._peer.forward(batches, everywhere=everywhere)

    def update(self, *, everywhere: bool) -> float:
        """The optimiser steps; the first gradient's norm."""
        return self._peer.update(self._groups, everywhere=everywhere)


def check_same(ours: float, theirs: float) -> None:
    """Refuses to compare different work."""
    if not abs(ours - theirs) <= _SAME * theirs:
        raise AssertionError(f"the gradients differ: norm {ours:.6g} here, {theirs:.6g} in PyTorch")
    print(f"  first gradient's norm {ours:.6g} here, {theirs:.6g} in PyTorch")
