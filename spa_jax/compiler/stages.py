"""The programs of a run's stages, lowered from shapes for devices that need not be here."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spa_jax import batching
from spa_jax.config import LoraConfig, RowsConfig
from spa_jax.models import axes, heads
from spa_jax.models.config import ModelConfig, Params
from spa_jax.rl import objectives
from spa_jax.sampling import placement, tuning
from spa_jax.sampling import programs as engine_programs
from spa_jax.stage_config import RFT, Settings
from spa_jax.training import (
    estimator_update,
    forward,
    memory,
    partition,
    ppo_update,
    sft_update,
)
from spa_jax.training import state as state_lib
from spa_jax.training.memory import Need
from spa_jax.training.parts import Parts


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a stage.

    Attributes:
      name: what it does.
      lower: lowers it.
      beside: bytes that lie on a device while it runs and are no argument of it.
      flops: of its products, by theory; 0: not said.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    beside: float = 0.0
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
      name: sft, scoring, estimator, ppo, prefill or decode.
      programs: what it runs on the devices.
      plan: what `training.memory` says that it needs of each.
      cache: the engine's shape, of a stage that has a cache.
    """

    name: str
    programs: list[Program]
    plan: Need
    cache: engine_programs.Shape | None = None


class Stages:
    """The stages of a run on some devices."""

    def __init__(
        self, settings: Settings, config: ModelConfig, devices: Sequence[jax.Device]
    ) -> None:
        """Lowers nothing yet.

        Args:
          settings: of the run.
          config: the model, as it is computed on these devices.
          devices: all of them, or a topology's.
        """
        self._settings, self._config, self._devices = settings, config, list(devices)
        self._rows = settings.rows
        _, self._fsdp, self._tensor = (
            partition.mesh_shape(self._rows.mesh, len(devices))
            if self._rows.partition == "mesh"
            else (len(devices), 1, 1)
        )

    def __iter__(self) -> Iterator[Stage]:
        yield self._sft()
        yield self._scoring()
        yield self._estimator()
        yield self._ppo()
        yield from self._engine()

    def _sft(self) -> Stage:
        sft = self._settings.sft
        parts = self._parts("sft", sft.train_layers)
        return self._update(
            "sft",
            parts,
            loss=parts.on_parts(sft_update.make_loss(self._config)),
            batch=sft_update.SftBatch(self._packed(), self._lower_states(parts)),
            counts=["tokens"],
            train_layers=sft.train_layers,
            averaged=sft.ema,
        )

    def _ppo(self) -> Stage:
        ppo, rows = self._settings.ppo, self._rows
        parts = self._parts("ppo", ppo.train_layers)
        trained_head = ppo.objective != RFT and (
            objectives.OBJECTIVES[ppo.objective].critic and ppo.critic == "head"
        )
        if ppo.objective == RFT:
            loss = sft_update.make_loss(self._config)
            batch: Any = sft_update.SftBatch(self._packed(), self._lower_states(parts))
        else:
            temperature = self._settings.sampling.temperature
            loss = ppo_update.make_loss(self._config, ppo, temperature)
            places = rows.policy_slots if ppo.gae == "token" else rows.step_slots
            number = self._of_rows(places)
            batch = ppo_update.PpoBatch(
                self._packed(), number, number, number, self._lower_states(parts)
            )
        return self._update(
            "ppo",
            parts,
            loss=parts.on_parts(loss),
            batch=batch,
            counts=["tokens", "steps"],
            head={"value": self._head()} if trained_head else {},
            train_layers=ppo.train_layers,
        )

    def _estimator(self) -> Stage:
        progress, config = self._settings.progress, self._config
        episodes = -(-progress.batch_size // len(self._devices))
        steps, width = self._rows.step_slots, config.hidden_size
        shape = len(self._devices), episodes
        features = estimator_update.StepFeatures(
            hidden=_float32(*shape, steps, width),
            start=_float32(*shape, width),
            step_mask=_float32(*shape, steps),
            final_reward=_float32(*shape),
        )
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), features)
        made = jax.eval_shape(
            lambda key, features: estimator_update.init(
                progress.estimator,
                progress.width,
                progress.heads,
                key=key,
                features=features,
                clock={},
            ),
            jax.random.key(0),
            one,
        )
        params = {"progress": made}
        lora = self._settings.adapters("progress")
        if not lora.rank and progress.trunk == "frozen":
            loss = estimator_update.make_loss(progress.prefix_weight)
            trainer = partition.Pmap(loss, _adamw(), self._devices)
            return Stage(
                "estimator",
                _programs(trainer, params, {}, features, ["trajectories"]),
                memory.estimator(config, progress, steps=steps, episodes=episodes),
            )
        parts = self._parts("progress", 0)
        return self._update(
            "estimator",
            parts,
            loss=parts.on_parts(estimator_update.make_trunk_loss(config, progress.prefix_weight)),
            batch=estimator_update.EstimatorRows(
                self._packed(), self._of_rows(self._rows.step_slots)
            ),
            counts=["trajectories"],
            head=params,
        )

    def _scoring(self) -> Stage:
        config, temperature = self._config, self._settings.sampling.temperature

        def score(placed: Params, _: Params, rows: batching.PackedRows) -> dict[str, jax.Array]:
            return forward.score(config, placed["policy"], rows, temperature=temperature)

        weights = _cast_matrices(memory.shapes(config), config.dtype)
        trainer = self._trainer(_no_loss, _adamw())
        tokens = self._rows.rows_per_device * self._rows.row_length
        return Stage(
            "scoring",
            [
                Program(
                    "pass",
                    lambda: trainer.lower_forward(
                        score, {"policy": {"policy": weights}}, {}, self._packed()
                    ),
                    flops=2 * (memory.layer_matrices(config) * tokens + self._logits_flops() / 2),
                )
            ],
            memory.forward(config, self._rows, fsdp=self._fsdp, tensor=self._tensor),
        )

    def _engine(self) -> Iterator[Stage]:
        sampling, config = self._settings.sampling, self._config
        tensor = sampling.sampling_tensor
        placement.check(config, tensor)
        devices = placement.groups(self._devices, tensor)[0]
        shape = engine_programs.Shape(
            config=dataclasses.replace(
                config, compute=dataclasses.replace(config.compute, attention="xla")
            ),
            dtype=np.dtype(jnp.dtype(config.dtype)),
            slots=sampling.slots,
            context_length=sampling.context_length,
            steps=engine_programs.STEPS,
            end_of_turn=(2,),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            devices=devices,
            tuning=tuning.of(devices[0].platform, config.num_kv_heads // tensor),
            cache_dtype=np.dtype(sampling.cache_dtype) if sampling.cache_dtype else None,
        )
        read = shape.rows * shape.tuning.chunks[-1]
        plan = memory.exploration(config, sampling, read)
        names = engine_programs.names_of(shape)
        for stage in ("prefill", "decode"):
            longest = [name for name in names if name.startswith(stage)][-1]
            program = Program(longest, functools.partial(_lower_engine, shape, longest))
            yield Stage(stage, [program], plan, cache=shape)

    def _update(
        self,
        name: str,
        parts: Parts,
        *,
        loss: Any,
        batch: Any,
        counts: list[str],
        head: Params | None = None,
        train_layers: int = 0,
        averaged: float = 0.0,
    ) -> Stage:
        """A stage that trains a policy, or what reads it."""
        optimizer = _adamw()
        if averaged:
            optimizer = state_lib.averaged(optimizer, averaged)
        trainer = self._trainer(loss, optimizer)
        frozen = _cast(parts.frozen, self._config.dtype)
        params = parts.trained | (head or {})
        plan = memory.update(
            self._config,
            self._rows,
            parts.lora,
            train_layers=train_layers,
            fsdp=self._fsdp,
            tensor=self._tensor,
            averaged=averaged > 0,
        )
        made = _programs(trainer, params, frozen, batch, counts)
        moments = jax.eval_shape(optimizer.init, params)
        cut = {"fsdp": self._fsdp, "tensor": self._tensor}
        beside = {
            "accumulate": memory.device_bytes(moments, **cut),
            "apply": memory.device_bytes(frozen, **cut),
        }
        flops = {"accumulate": 0.0 if train_layers else self._update_flops(parts.lora)}
        return Stage(
            name,
            [
                dataclasses.replace(p, beside=beside[p.name], flops=flops.get(p.name, 0.0))
                for p in made
            ],
            plan,
        )

    def _update_flops(self, lora: LoraConfig) -> float:
        """Of a microbatch's products, without attention's."""
        tokens = self._rows.rows_per_device * self._rows.row_length
        passes = 4 if lora.rank else 6
        again = 2 if self._config.compute.remat == "layer" else 0
        layers = (passes + again) * memory.layer_matrices(self._config) * tokens
        chunked = 0 < self._config.compute.logits_chunk < self._rows.slots
        return layers + (passes / 2 + chunked) * self._logits_flops()

    def _logits_flops(self) -> float:
        """Of one projection of all policy slots onto the vocabulary."""
        return 2.0 * self._config.vocab_size * self._config.hidden_size * self._rows.slots

    def _trainer(self, loss: Any, optimizer: state_lib.Guarded) -> partition.Trainer:
        return partition.make(self._rows, loss, optimizer, devices=self._devices)

    def _parts(self, stage: Any, train_layers: int) -> Parts:
        """What a stage trains, in shapes."""
        lora = self._settings.adapters(stage)
        trained, frozen = memory.split(self._config, lora, train_layers)
        if lora.rank:
            return Parts({"adapter": trained}, {"base": frozen}, lora)
        trained = _cast(trained, self._config.compute.param_dtype)
        return Parts({"policy": trained}, {"policy": frozen} if frozen else {})

    def _head(self) -> Params:
        fresh = heads.Head()
        hidden = _float32(1, 1, self._config.hidden_size)
        return jax.eval_shape(fresh.init, jax.random.key(0), hidden)["params"]

    def _packed(self) -> batching.PackedRows:
        rows: RowsConfig = self._rows
        row = batching.empty(1, rows.row_length, rows.policy_slots, rows.step_slots)
        return jax.tree.map(lambda x: self._of_rows(*x.shape[1:], dtype=x.dtype), row)

    def _of_rows(self, *shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        """Something of every row of a microbatch."""
        data = len(self._devices) // self._tensor
        return jax.ShapeDtypeStruct((data, self._rows.rows_per_device, *shape), dtype)

    def _lower_states(self, parts: Parts) -> jax.ShapeDtypeStruct | None:
        """What frozen lower layers have made of the rows."""
        if "policy" not in parts.frozen:
            return None
        length, config = self._rows.row_length, self._config
        return self._of_rows(length, config.hidden_size, dtype=jnp.dtype(config.dtype))


def _programs(
    trainer: partition.Trainer, params: Params, frozen: Params, batch: Any, counts: list[str]
) -> list[Program]:
    """An update's two."""
    made: dict[str, jax.stages.Lowered] = {}

    def lowered(name: str) -> jax.stages.Lowered:
        if not made:
            made.update(trainer.lower(params, frozen, batch, counts))
        return made[name]

    return [Program(name, functools.partial(lowered, name)) for name in ("accumulate", "apply")]


def _lower_engine(shape: engine_programs.Shape, name: str) -> jax.stages.Lowered:
    return engine_programs.lower(shape, [name])[name]


def _no_loss(*_: Any) -> Any:
    raise NotImplementedError("scoring has no loss")


def _adamw() -> state_lib.Guarded:
    """An optimiser; its settings are numbers in the program, and no shape depends on them."""
    return state_lib.adamw(optax.constant_schedule(1e-5), clip_norm=1.0, weight_decay=0.0)


def _cast(tree: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tree)


def _cast_matrices(tree: Params, dtype: str) -> Params:
    """The shapes of `axes.cast`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, jnp.dtype(dtype) if axes.names(path) else x.dtype
        ),
        tree,
    )


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)
