"""A policy in two: what a stage trains of it, and what it only reads.

                    trained                              frozen
    everything      {"policy": the tree}                 {}
    top layers      {"policy": theirs and the norm's}    {"policy": the rest}
    adapters        {"adapter": a tree of its own}       {"base": the tree}

Only what is trained gets gradients and an optimiser, and only that is in a checkpoint.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spa_jax.config import LoraConfig
from spa_jax.models import lora as lora_lib
from spa_jax.models import tree
from spa_jax.models.config import ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class Parts:
    """The two parts.

    Attributes:
      trained: what is trained, at the stage's start.
      frozen: what is not.
      lora: the adapters' shape; rank 0: there are none.
    """

    trained: Params
    frozen: Params
    lora: LoraConfig = LoraConfig()

    def on_parts(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, frozen, ...)` of policies and layers, as one of these parts.

        Losses know nothing of adapters: they get a policy's tree with the adapters in it.
        """
        if not self.lora.rank:
            return function

        def adapted(params: Params, frozen: Params, *rest: Any) -> Any:
            policy = lora_lib.attach(self.lora, frozen["base"], params["adapter"])
            others = {name: tree for name, tree in params.items() if name != "adapter"}
            beside = {name: tree for name, tree in frozen.items() if name != "base"}
            return function({"policy": policy, **others}, beside, *rest)

        return adapted

    def frozen_in(self, dtype: str) -> Params:
        """The frozen part in the dtype that it is computed in; `frozen` itself stays exact."""
        return cast(self.frozen, dtype)

    def merge(self, trained: Params) -> Params:
        """The policy's tree from both parts, on the host in float32, with adapters merged.

        Args:
          trained: the trained part as it is now, on the host; other trees in it are passed over.
        """
        trained = cast(trained, "float32")
        if self.lora.rank:
            return jax.device_get(
                lora_lib.merge(self.lora, self.frozen["base"], trained["adapter"])
            )
        return tree.join(trained["policy"], self.frozen.get("policy", {}))


def cast(tree: Params, dtype: str) -> Params:
    """Arrays of the host in another dtype; those that are in it are not copied."""
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False), tree)


def split(config: ModelConfig, params: Params, train_layers: int) -> Parts:
    """All of the policy is trained, or its top layers if `train_layers` is not 0.

    What is trained is in --param_dtype.

    Raises:
      UserError: if the model has no layer left to freeze.
    """
    trained, frozen = tree.split(config, params, train_layers)
    trained = cast(trained, config.compute.param_dtype)
    return Parts({"policy": trained}, {"policy": frozen} if frozen else {})


def adapt(lora: LoraConfig, base: Params, adapter: Params) -> Parts:
    """The adapter is trained, on a base that is left as it is."""
    return Parts({"adapter": adapter}, {"base": base}, lora)
