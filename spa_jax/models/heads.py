"""Heads that read one number a position off the decoder's hidden states.

Both are LayerNorm -> Dense -> gelu -> Dense(1) in float32, whatever the
decoder's dtype: a contribution is a small difference, and bfloat16 has three
digits.  The input is normalised because a decoder's hidden states have a few
coordinates that are hundreds of times larger than the rest.  Both start at
exactly 0: a random head would predict sum_k c_k = +-sqrt(n) for an episode of
n steps, and a random value would shift every first advantage.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def _mlp(hidden: jax.Array, width: int) -> jax.Array:
    x = nn.LayerNorm(name="norm", dtype=jnp.float32)(hidden.astype(jnp.float32))
    x = nn.gelu(nn.Dense(width, name="hidden")(x))
    return nn.Dense(1, name="out", kernel_init=nn.initializers.zeros)(x)[..., 0]


class ProgressHead(nn.Module):
    """c_k = MLP(h) at the last token of step k (SPA-RL, arXiv 2505.20732, section 3).

    Attributes:
      width: units of the hidden layer.
    """

    width: int = 256

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D], any float dtype -> contributions [...], float32."""
        return _mlp(hidden, self.width)


class ValueHead(nn.Module):
    """V_k = MLP(h) at the last context token before step k; V = 0 before training.

    Attributes:
      width: units of the hidden layer.
    """

    width: int = 256

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D], any float dtype -> values [...], float32."""
        return _mlp(hidden, self.width)
