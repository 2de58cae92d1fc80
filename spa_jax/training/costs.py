"""What an update costs, beside what the machine can do: for the metrics of every training stage."""

import resource
import sys
from collections.abc import Sequence

import jax

from spa_jax import chips
from spa_jax.models.config import ModelConfig
from spa_jax.training import memory
from spa_jax.trajectory import Trajectory

_GIB = 2**30


def update_flops(
    config: ModelConfig,
    trajectories: Sequence[Trajectory],
    *,
    layers: int = 0,
    adapters: bool = False,
) -> float:
    """The products of an update that the method asks for, whatever is computed twice.

        forward     2 (L P sum_i t_i + V D sum_i w_i)  +  L 4 H d sum_i t_i^2 / 2
        backward    as much again for the activations, and for the weights that are trained

    P is the number of a layer's weights that multiply, V D the output layer, t_i the tokens of
    episode i and w_i those that the policy wrote; a token attends over those before it, so half of
    t_i^2 pairs count.  Source: PaLM, arXiv 2204.02311, appendix B (which counts all pairs, and the
    output layer at all tokens).

    Args:
      config: the model's shape.
      trajectories: the update's episodes.
      layers: that are trained, from the top; those below were computed once; 0: all.
      adapters: whether adapters are trained, and no weight; their own products are not counted.
    """
    depth = layers or config.num_layers
    lengths = [len(t.token_ids) for t in trajectories]
    written = sum(number >= 0 for t in trajectories for number in t.step_id)
    in_layers = memory.layer_matrices(config) / config.num_layers * depth * sum(lengths)
    products = 2.0 * (in_layers + config.vocab_size * config.hidden_size * written)
    pairs = sum(length**2 for length in lengths) / 2
    attention = depth * 4.0 * config.num_heads * config.head_dim * pairs
    return (2 if adapters else 3) * (products + attention)


def of_update(
    config: ModelConfig,
    trajectories: Sequence[Trajectory],
    seconds: float,
    *,
    layers: int,
    adapters: bool,
) -> dict[str, float]:
    """`shares` of an update that took so long on all devices; arguments as `update_flops`."""
    flops = update_flops(config, trajectories, layers=layers, adapters=adapters)
    return shares(flops, seconds, jax.devices())


def shares(flops: float, seconds: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """What a stage's metrics say of an update's cost.

    Args:
      flops: of the update.
      seconds: that it took.
      devices: all that shared it, of all processes.

    Returns:
      `mfu`, the share of the devices' peak, where it is known (`chips.peak`), and `memory_gib`.
    """
    found = {"memory_gib": memory_gib()}
    peak = chips.peak(devices[0].device_kind)
    if peak is not None and seconds > 0:
        found["mfu"] = flops / seconds / (peak.flops * len(devices))
    return found


def memory_gib() -> float:
    """The most memory that was in use so far, GiB: of the fullest local device that tells it.

    On a CPU it is the process's.
    """
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max(stats.get("peak_bytes_in_use", 0) for stats in told)
    if most:
        return most / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
