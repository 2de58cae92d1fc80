"""Where the wall clock of playing went."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spa_jax.sampling.engine import Usage

# Environments are the bottleneck if the engine waits for them for this share of the time.
_WAITS = 0.2


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of a `Rollout.play` went.

    Attributes:
      wall_s: seconds in all.
      waiting_s: seconds in which the engine waited for environments.
      env_s: seconds that environments took for steps, each counted by itself.
      env_steps: how many.
      slots: episodes played at once.
      usage: what the engine did in that time.
    """

    wall_s: float
    waiting_s: float
    env_s: float
    env_steps: int
    slots: int
    usage: "Usage"

    def metrics(self) -> dict[str, float]:
        """Name -> number, for the log: shares of the wall clock, tokens a second, occupancy."""
        wall, usage = max(self.wall_s, 1e-9), self.usage
        host = wall - usage.prefill_s - usage.decode_s - self.waiting_s
        return {
            "seconds": self.wall_s,
            "prefill_share": usage.prefill_s / wall,
            "decode_share": usage.decode_s / wall,
            "waiting_share": self.waiting_s / wall,
            "host_share": max(0.0, host) / wall,
            "occupancy": usage.occupancy,
            **({"bandwidth_share": usage.read_s / usage.decode_s} if usage.read_s else {}),
            "tokens_per_second": usage.generated / wall,
            "generated_tokens": usage.generated,
            "prefilled_tokens": usage.prefilled,
            "reused_tokens": usage.reused,
            "env_steps": self.env_steps,
            "env_step_seconds": self.env_s / max(self.env_steps, 1),
        }

    def bottleneck(self) -> str:
        """What to say if the environments are too slow for the engine; "" if they are not.

        Waiting for their processes to start does not count: no wait for a step is longer than all
        steps together.
        """
        share = min(self.waiting_s, self.env_s) / max(self.wall_s, 1e-9)
        if share < _WAITS:
            return ""
        step = 1e3 * self.env_s / max(self.env_steps, 1)
        return (
            f"environments are the bottleneck: the policy waited for them {share:.0%} of the time "
            f"({step:.0f} ms a step with {self.slots} episodes at once). Raise --slots, so that "
            "more episodes think while others act; if a step then takes longer, the environments "
            "have too few processor cores: run python -m experiments.serve_env on a machine with "
            "more, and give its --env_address"
        )
