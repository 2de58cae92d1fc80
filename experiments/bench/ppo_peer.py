"""The passes of a PPO update written plainly in transformers and PyTorch, on our weights.

Rows are padded to the longest of their minibatch, or of the whole batch as trl's PPOTrainer does.
`everywhere` is what calling a transformers model does: logits of all tokens; without it the
vocabulary is projected on the tokens that the policy wrote only, which a careful program does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench import peers
from spa_jax.config import LoraConfig
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.io import peft as peft_io
from spa_jax.stage_config import PpoConfig
from spa_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Batch:
    """A minibatch as PyTorch reads it; tensors, position t of [B, T-1] predicts token t + 1.

    Attributes:
      tokens: [B, T].
      attention_mask: [B, T]; None if no row is padded.
      token_mask: [B, T-1] bool, where a token of the policy's is predicted.
      value_mask: [B, T-1] bool, the last context token before each step.
      targets, log_probs, ref_log_probs, advantages: [n] of the policy's tokens, in row order.
      returns, old_values: [s] of the steps, in row order.
    """

    tokens: Any
    attention_mask: Any
    token_mask: Any
    value_mask: Any
    targets: Any
    log_probs: Any
    ref_log_probs: Any
    advantages: Any
    returns: Any
    old_values: Any


def batch(
    trajectories: Sequence[Trajectory], by_step: Mapping[str, np.ndarray], width: int = 0
) -> Batch:
    """The batch of trajectories, each step of which has a token of the policy's.

    Args:
      trajectories: B encoded ones.
      by_step: "advantages", "returns" and "old_values", [B, S] by (trajectory, step).
      width: tokens of a row, if the longest has fewer.
    """
    torch = peers.torch()
    lengths = [len(t.token_ids) for t in trajectories]
    shape = (len(trajectories), max(width, *lengths))
    tokens, attention = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    written, before = np.zeros(shape, bool), np.zeros(shape, bool)
    numbers: dict[str, list[Any]] = {
        name: []
        for name in ("targets", "log_probs", "ref_log_probs", "advantages", "returns", "old_values")
    }
    for i, t in enumerate(trajectories):
        n, step = lengths[i], np.asarray(t.step_id)
        at = np.flatnonzero(step >= 0)
        tokens[i, :n], attention[i, :n] = t.token_ids, 1
        written[i, at - 1] = True
        _, first = np.unique(step[at], return_index=True)
        before[i, at[first] - 1] = True
        numbers["targets"] += tokens[i, at].tolist()
        numbers["log_probs"] += np.asarray(t.log_probs)[at].tolist()
        numbers["ref_log_probs"] += np.asarray(t.ref_log_probs)[at].tolist()
        numbers["advantages"] += by_step["advantages"][i, step[at]].tolist()
        for name in ("returns", "old_values"):
            numbers[name] += by_step[name][i, : len(t.steps)].tolist()
    targets = torch.tensor(numbers.pop("targets"))
    return Batch(
        torch.tensor(tokens),
        torch.tensor(attention) if min(lengths) < shape[1] else None,
        torch.tensor(written[:, :-1]),
        torch.tensor(before[:, :-1]),
        targets,
        **{name: torch.tensor(values, dtype=torch.float32) for name, values in numbers.items()},
    )


class Peer:
    """A policy with a value head in PyTorch, and its optimiser.

    Attributes:
      model: transformers' model, with an adapter in it if there is one.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        value: Params,
        *,
        ppo: PpoConfig,
        lora: LoraConfig,
        adapter: Params | None,
    ) -> None:
        """Copies the weights.

        Args:
          config: the model's shape.
          params: the policy's.
          value: the value head's.
          ppo: the objective's settings.
          lora: the adapter's shape.
          adapter: it, or None: everything is trained.
        """
        torch = peers.torch()
        self.model = peers.model(config, params)
        if adapter is not None:
            self.model = _adapted(self.model, lora, adapter)
        self._head, self._ppo = head(value), ppo
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._trained = [*trained, *self._head.parameters()]
        self._optimizer = torch.optim.Adam(self._trained, ppo.learning_rate)

    def forward(self, batches: Sequence[Batch], *, everywhere: bool) -> list[Any]:
        """Log-probabilities [n] and values [s] of batches, without gradients."""
        with peers.torch().no_grad():
            return [self._look(one, everywhere)[::2] for one in batches]

    def update(self, groups: Sequence[Sequence[Batch]], *, everywhere: bool) -> float:
        """An optimiser step from each group of batches; the first gradient's norm."""
        torch, norm = peers.torch(), None
        for group in groups:
            tokens = sum(len(one.targets) for one in group)
            steps = sum(len(one.returns) for one in group)
            self._optimizer.zero_grad(set_to_none=True)
            for one in group:
                self._loss(one, tokens, steps, everywhere).backward()
            if norm is None:
                grads = [p.grad.norm() for p in self._trained if p.grad is not None]
                norm = float(torch.stack(grads).norm())
            self._optimizer.step()
        assert norm is not None
        return norm

    def _look(self, one: Batch, everywhere: bool) -> tuple[Any, Any, Any]:
        """(log-probabilities [n], entropy [n], values [s]) of a batch."""
        torch = peers.torch()
        hidden = self.model.model(
            input_ids=one.tokens, attention_mask=one.attention_mask
        ).last_hidden_state[:, :-1]
        if everywhere:
            logits = self.model.lm_head(hidden)
            log_pi = torch.log_softmax(logits, -1)[one.token_mask]
        else:
            log_pi = torch.log_softmax(self.model.lm_head(hidden[one.token_mask]), -1)
        with torch.no_grad():
            entropy = -(log_pi.exp() * log_pi).sum(-1)
        chosen = log_pi.gather(-1, one.targets[:, None])[:, 0]
        return chosen, entropy, self._head(hidden[one.value_mask])[:, 0]

    def _loss(self, one: Batch, tokens: int, steps: int, everywhere: bool) -> Any:
        """`ppo_update.ppo_loss` with its defaults, written again."""
        torch, ppo = peers.torch(), self._ppo
        log_probs, _, values = self._look(one, everywhere)
        ratio = torch.exp(log_probs - one.log_probs)
        cut = torch.clamp(ratio, 1 - ppo.clip, 1 + ppo.clip)
        policy = torch.maximum(-one.advantages * ratio, -one.advantages * cut).sum()
        low, high = one.old_values - ppo.value_clip, one.old_values + ppo.value_clip
        moved = torch.maximum(torch.minimum(values, high), low)
        errors = (values - one.returns) ** 2, (moved - one.returns) ** 2
        value = 0.5 * torch.maximum(*errors).sum()
        log_ratio = one.ref_log_probs - log_probs
        kl = (torch.expm1(log_ratio) - log_ratio).sum()
        return (policy + ppo.kl_coef * kl) / tokens + ppo.value_coef * value / steps


def head(params: Params) -> Any:
    """A value or progress head (`models.heads`) as a PyTorch module, [..., D] -> [..., 1]."""
    torch = peers.torch()
    size, width = params["hidden"]["kernel"].shape
    made = torch.nn.Sequential(
        torch.nn.LayerNorm(size, eps=1e-6),
        torch.nn.Linear(size, width),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Linear(width, 1),
    )
    names = {"0": "norm", "1": "hidden", "3": "out"}
    tensors = {}
    for index, name in names.items():
        weight = params[name]["scale" if name == "norm" else "kernel"]
        tensors[f"{index}.weight"] = torch.tensor(np.array(weight, np.float32).T.copy())
        tensors[f"{index}.bias"] = torch.tensor(np.array(params[name]["bias"], np.float32))
    made.load_state_dict(tensors)
    return made


def _adapted(model: Any, lora: LoraConfig, adapter: Params) -> Any:
    """The model with PEFT's adapter in it, whose weights are ours; the rest is frozen."""
    peft, torch = peers.require("peft"), peers.torch()
    shape = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=peft_io.modules_of(lora.targets),
    )
    adapted = peft.get_peft_model(model, shape)  # changes the model in place
    tensors = {
        f"base_model.model.{name}": torch.tensor(np.array(array))
        for name, array in peft_io.to_named(jax.device_get(adapter)).items()
    }
    _, unexpected = adapted.load_state_dict(tensors, strict=False)
    if unexpected:
        raise AssertionError(f"PEFT names adapters otherwise: {unexpected}")
    return model
