"""What a user may ask of a model, checked before anything is computed."""

from spa_jax.errors import UserError
from spa_jax.models.config import ModelConfig


def longest(config: ModelConfig) -> int:
    """The most tokens that the model can attend over."""
    return min(_limits(config).values())


def _limits(config: ModelConfig) -> dict[str, int]:
    limits = {"max_position_embeddings": config.max_position}
    if config.sliding_window:
        limits["sliding_window"] = config.sliding_window
    return limits


def check_length(config: ModelConfig, length: int, what: str) -> None:
    """Refuses more tokens than the model can attend over.

    Args:
      config: the model's shape.
      length: tokens.
      what: what has that many, for the message.

    Raises:
      UserError: names both.
    """
    for name, limit in _limits(config).items():
        if length > limit:
            raise UserError(
                f"{what}: {length} tokens exceed the model's {name}, {limit}; make it shorter"
            )


def check_train_layers(config: ModelConfig, train_layers: int) -> None:
    """Refuses a number of top layers to train that leaves no layer frozen, or is below 1.

    Raises:
      UserError: says what can be given.
    """
    if not 0 < train_layers < config.num_layers:
        raise UserError(
            f"{train_layers} layers to train: the model has {config.num_layers} layers; give "
            f"1 to {config.num_layers - 1}, or 0 to train everything"
        )
