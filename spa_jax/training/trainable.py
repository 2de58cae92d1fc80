"""What a stage trains of a policy, and how the result is written."""

import dataclasses
import os
import pathlib

import jax

from spa_jax import chat_template, files
from spa_jax import policy as policy_lib
from spa_jax.config import LoraConfig
from spa_jax.errors import UserError
from spa_jax.models import lora as lora_lib
from spa_jax.models.config import Params
from spa_jax.models.io import huggingface, peft, tensors
from spa_jax.policy import ABOUT, ADAPTER, Policy
from spa_jax.runtime import distributed
from spa_jax.training import parts as parts_lib
from spa_jax.training.parts import Parts


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What a stage trains of a policy.

    Attributes:
      policy: that it starts from.
      parts: what is trained and what is not.
      base: the folder of the frozen weights, for adapters.
    """

    policy: Policy
    parts: Parts
    base: pathlib.Path

    def save(
        self, folder: pathlib.Path, *, trained: Params, heads: dict[str, Params], version: int
    ) -> None:
        """Writes a policy that `policy.load` reads; an adapter is merged, and lies beside it.

        Of several processes the first writes.

        Args:
          folder: where to.
          trained: the trained part, on the host.
          heads: to lie beside the weights.
          version: the updates that made it.
        """
        if not distributed.is_first():
            return
        config, model = self.policy.config, self.policy.model
        template = chat_template.to_write(self.policy.tokenizer, self.policy.chat_format)
        huggingface.save_pretrained(folder, config, self.parts.merge(trained), model, template)
        if heads:
            tensors.save_heads(folder, heads)
        if self.parts.lora.rank:
            save_adapter(folder / ADAPTER, self.parts.lora, trained["adapter"], self.base)
        about = {"version": version, "chat_format": self.policy.chat_format}
        files.write_json(folder / ABOUT, about)


def make(
    policy: Policy,
    *,
    train_layers: int = 0,
    lora: LoraConfig,
    seed: int,
    reference: pathlib.Path | None = None,
) -> Trainable:
    """What a stage trains of a policy: all of it, its top layers or adapters.

    A new adapter begins on the policy's weights.  The adapter of an earlier round goes on
    instead where it is one on the reference policy: the reference is then the policy with the
    adapter off in every round, and the rank stays.

    Args:
      policy: that the stage starts from.
      train_layers: as in `parts.split`.
      lora: the adapters; rank 0: none.
      seed: of a new adapter.
      reference: the folder of the policy that must not be strayed from, if there is one.
    """
    if not lora.rank:
        parts = parts_lib.split(policy.config, policy.params, train_layers)
        return Trainable(policy, parts, policy.folder)
    adapter = _own_adapter(policy, lora, reference) if reference else None
    if reference and adapter is not None:
        base = policy_lib.load(reference).params
        return Trainable(policy, parts_lib.adapt(lora, base, adapter), reference)
    adapter = jax.device_get(lora_lib.init(lora, policy.params, jax.random.key(seed)))
    return Trainable(policy, parts_lib.adapt(lora, policy.params, adapter), policy.folder)


def _own_adapter(policy: Policy, lora: LoraConfig, base: pathlib.Path) -> Params | None:
    """The policy's adapter, if it is one of this shape on `base`."""
    folder = policy.folder / ADAPTER
    if not peft.is_adapter(folder):
        return None
    try:
        if peft.adapter_base(folder) != base.resolve():
            return None
    except UserError:  # the base is not here any more; the policy's own weights are merged
        return None
    found, adapter = peft.load_adapter(folder, policy.config)
    same = (found.rank, found.alpha) == (lora.rank, lora.alpha)
    return adapter if same and set(found.targets) == set(lora.targets) else None


def save_adapter(
    folder: pathlib.Path, lora: LoraConfig, adapter: Params, base: pathlib.Path
) -> None:
    """Writes an adapter that names its base relative to itself: a run's folder can be moved."""
    relative = os.path.relpath(base.resolve(), folder.resolve())
    peft.save_adapter(folder, lora, adapter, relative)
