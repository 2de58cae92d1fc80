"""Parameter trees cut, joined and laid out anew; the tree itself is described in `transformer`."""

import jax
import numpy as np

from spa_jax.models import limits
from spa_jax.models.config import ModelConfig, Params


def depth(params: Params) -> int:
    """How many layers a tree holds."""
    return int(jax.tree.leaves(params["layers"])[0].shape[0])


def split(config: ModelConfig, params: Params, train_layers: int) -> tuple[Params, Params]:
    """Parts a model into what is trained and what is frozen.

        train_layers = 2 of 5:   trained  {layers 3, 4; norm}
                                 frozen   {embed; layers 0, 1, 2; unembed}

    Args:
      config: the model's shape.
      params: the whole tree.
      train_layers: how many of the top layers are trained; 0 trains everything.

    Returns:
      (trained, frozen); `join` puts them together again.

    Raises:
      UserError: if the model has no layer left to freeze.
    """
    if not train_layers:
        return params, {}
    limits.check_train_layers(config, train_layers)
    cut = config.num_layers - train_layers
    trained = {"norm": params["norm"], "layers": jax.tree.map(lambda x: x[cut:], params["layers"])}
    frozen = {name: value for name, value in params.items() if name != "norm"}
    return trained, {**frozen, "layers": jax.tree.map(lambda x: x[:cut], params["layers"])}


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree, on the host, from the parts that `split` made."""
    if not frozen:
        return trained
    layers = jax.tree.map(
        lambda low, top: np.concatenate([low, top]), frozen["layers"], trained["layers"]
    )
    return {**frozen, **trained, "layers": layers}


def unstack(params: Params, dtype: str | None = None, matmul_dtype: str | None = None) -> Params:
    """The tree for `transformer.cached_hidden_states`: `layers` is a list of one-layer trees.

    A scan would copy each layer's weights out of the stack on every decoded token,
    which for a token at a time is more traffic than the matrix products themselves.
    Kernels are transposed, see `layers.Linear`, and cast to `matmul_dtype`, the other matrices to
    `dtype` (None: as they are), once and for all: a decoded token reads each of them.
    """

    def one(i: int) -> Params:
        layer = jax.tree.map(lambda x: x[i], params["layers"])
        return {
            name: {"transposed" if key == "kernel" else key: x.T for key, x in part.items()}
            for name, part in layer.items()
        }

    def typed(path: tuple, x: jax.Array) -> jax.Array:
        of_kernels = matmul_dtype if path[-1].key == "transposed" else None
        return x.astype(of_kernels or dtype or x.dtype) if x.ndim > 1 else x

    made = {**params, "layers": [one(i) for i in range(depth(params))]}
    return jax.tree_util.tree_map_with_path(typed, made)
