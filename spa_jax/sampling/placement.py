"""Where the parts of an engine lie: all on one device, or cut over several of one host.

                  q, k, v, gate, up    o, down        vocabulary    cache         all else
    2 devices     outputs / 2          inputs / 2     ids / 2       heads / 2     whole on each

Each device computes its heads and its units; XLA adds up what o and down give of them (Megatron,
arXiv 1909.08053) and brings the logits together.  `models.axes` names the axes that are cut.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from spa_jax.errors import UserError
from spa_jax.models import axes
from spa_jax.models.config import ModelConfig, Params

Devices = tuple[jax.Device, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of an engine, and what lies where.

    Attributes:
      devices: that share each weight and the cache; at least one.
    """

    devices: Devices

    @property
    def replicated(self) -> Sharding:
        """Of what lies whole on each device."""
        return self._cut(PartitionSpec())

    @property
    def cache(self) -> Sharding:
        """Of a layer's keys [slots, heads, K, places], and of its values: by heads."""
        return self._cut(PartitionSpec(None, axes.TENSOR))

    def weights(self, params: Params) -> Any:
        """A tree like a decoder's of what lies where.

        Args:
          params: the tree, stacked or of `tree.unstack`, or some of it; arrays of a host or of
            devices, or shapes.
        """
        sizes = {axes.TENSOR: len(self.devices)}
        return jax.tree_util.tree_map_with_path(
            lambda path, x: self._cut(axes.even(path, x.shape, sizes)), params
        )

    def put(self, params: Params) -> Params:
        """The tree of `weights`, brought to where it says."""
        placed: Params = jax.device_put(params, self.weights(params))
        return placed

    def computed(self, config: ModelConfig) -> ModelConfig:
        """The model as these devices compute it: XLA cuts no kernel but its own."""
        if len(self.devices) == 1:
            return config
        compute = dataclasses.replace(config.compute, attention="xla")
        return dataclasses.replace(config, compute=compute)

    def _cut(self, spec: PartitionSpec) -> Sharding:
        if len(self.devices) == 1:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(Mesh(np.array(self.devices, object), (axes.TENSOR,)), spec)


def groups(devices: Sequence[jax.Device], tensor: int) -> list[Devices]:
    """The devices of each engine: neighbours in their order.

    Args:
      devices: all of a host.
      tensor: how many an engine has.

    Raises:
      UserError: some would be left over.
    """
    if len(devices) % tensor:
        raise UserError(
            f"--sampling_tensor={tensor}: there are {len(devices)} devices here, which is no "
            f"multiple of {tensor}; give a number that divides them"
        )
    return [tuple(devices[i : i + tensor]) for i in range(0, len(devices), tensor)]


def check(config: ModelConfig, tensor: int) -> None:
    """Refuses more devices than share the heads of the cache evenly.

    Args:
      config: the model's shape.
      tensor: devices of an engine.

    Raises:
      UserError: the number of key heads is no multiple of it.
    """
    if config.num_kv_heads % tensor:
        raise UserError(
            f"--sampling_tensor={tensor}: the model has {config.num_kv_heads} key/value heads, "
            f"which is no multiple of {tensor}; give a number that divides them"
        )
