"""What the updates read off packed rows: log-probabilities, values, hidden states."""

import jax
import jax.numpy as jnp

from spa_jax.batching import PackedRows
from spa_jax.models import axes, heads, transformer
from spa_jax.models.config import ModelConfig, Params
from spa_jax.rl import losses


def rows_hidden(
    config: ModelConfig, params: Params, rows: PackedRows, lower_states: jax.Array | None = None
) -> jax.Array:
    """[R, L, D] last hidden states of packed rows.

    `lower_states` are as in `transformer.hidden_states`.
    """
    return transformer.hidden_states(
        config,
        params,
        rows.tokens,
        rows.positions,
        rows.segment_ids,
        lower_states=lower_states,
    )


def rows_lower_states(config: ModelConfig, frozen: Params, rows: PackedRows) -> jax.Array:
    """[R, L, D] hidden states of packed rows after the frozen layers {"policy": ...}."""
    policy = axes.gathered(frozen["policy"], config.dtype)
    return transformer.lower_states(config, policy, rows.tokens, rows.positions, rows.segment_ids)


def with_frozen(config: ModelConfig, params: Params, frozen: Params) -> Params:
    """The policy's tree that a forward pass from `lower_states` reads.

    It holds every trained entry, and the frozen entries without a trained one of the same name.
    With frozen lower layers, `layers` and `norm` are the trained ones and `embed` is frozen.
    On a mesh all of it but the layers is whole.
    """
    return axes.gathered({**frozen.get("policy", {}), **params["policy"]}, config.dtype)


def at(hidden: jax.Array, index: jax.Array) -> jax.Array:
    """[R, n, D]: the hidden states [R, L, D] at the columns [R, n]."""
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def policy_logits(
    params: Params, hidden: jax.Array, rows: PackedRows, temperature: float
) -> jax.Array:
    """[R, P, V] logits / temperature where a policy token is predicted, and nowhere else."""
    return transformer.logits(params, at(hidden, rows.token_index)) / temperature


def policy_terms(
    config: ModelConfig,
    params: Params,
    hidden: jax.Array,
    rows: PackedRows,
    temperature: float,
    *,
    with_entropy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What losses need of the distribution that each policy token was drawn from.

    With more than --logits_chunk slots in the rows, they are projected one chunk after the other,
    and once more in the backward pass: no array is as large as all slots times the vocabulary.
    Chunks are as equal as they can be, so that little is projected for nothing.

        R P = 7 slots, at most 5 a chunk        [s0 s1 s2 s3] [s4 s5 s6 --]      (-- = no slot)

    Args:
      config: the model's shape.
      params: the decoder's tree.
      hidden: [R, L, D] last hidden states.
      rows: the rows.
      temperature: the policy is softmax(logits / temperature).
      with_entropy: whether the entropy is wanted.

    Returns:
      [R, P] log-probabilities of the targets, and the sum of the policy's entropy over all policy
      tokens, in nats (0 if it is not wanted).
    """

    def terms(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple:
        log_probs = log_probs_of(logits, targets)
        return log_probs, losses.entropy(logits, mask) if with_entropy else jnp.float32(0)

    slots = rows.targets.size
    chunk = projected_at_once(config.compute.logits_chunk, slots)
    if chunk == slots:
        logits = policy_logits(params, hidden, rows, temperature)
        return terms(logits, rows.targets, rows.token_mask)

    def in_chunks(x: jax.Array) -> jax.Array:
        """[R, P, ...] -> [chunks, 1, chunk, ...]."""
        flat = jnp.reshape(x, (slots, *x.shape[2:]))
        flat = jnp.pad(flat, [(0, -slots % chunk)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(-1, 1, chunk, *flat.shape[1:])

    @jax.checkpoint
    def project(args: tuple) -> tuple[jax.Array, jax.Array]:
        hidden, targets, mask = args
        return terms(transformer.logits(params, hidden) / temperature, targets, mask)

    chosen = (at(hidden, rows.token_index), rows.targets, rows.token_mask)
    log_probs, entropy = jax.lax.map(project, jax.tree.map(in_chunks, chosen))
    return log_probs.reshape(-1)[:slots].reshape(rows.targets.shape), jnp.sum(entropy)


def projected_at_once(most: int, slots: int) -> int:
    """How many slots are projected onto the vocabulary at once: the size of a chunk.

    The slots are cut into as few chunks of at most `most` as can be, and these are made equal.

    Args:
      most: the largest chunk allowed; 0: no limit.
      slots: how many there are.
    """
    return -(-slots // -(-slots // most)) if 0 < most < slots else slots


def log_probs_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[R, P] log softmax(logits)[target] of logits [R, P, V] and targets [R, P]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def score(
    config: ModelConfig,
    params: Params,
    rows: PackedRows,
    frozen: Params | None = None,
    *,
    temperature: float,
) -> dict[str, jax.Array]:
    """One forward pass over data, without gradients.

    Args:
      config: the model's shape.
      params: {"policy": decoder, or its top layers; "value": head, optional}.
      rows: packed rows.
      frozen: {"policy": the other layers}, whose states are wanted too.
      temperature: the policy is softmax(logits / temperature).

    Returns:
      All float32: log_probs [R, P]; end_hidden [R, S, D] at each step's last token; value_hidden
      [R, S, D] and values [R, S] (0 without a value head) at the last context token before each
      step; answer_hidden [R, S, D] at the last token before the next.  With `frozen`, in the
      model's dtype, lower_states [R, L, D].
    """
    lower = {"lower_states": rows_lower_states(config, frozen, rows)} if frozen else {}
    policy = with_frozen(config, params, frozen or {})
    hidden = rows_hidden(config, policy, rows, **lower)
    log_probs, _ = policy_terms(config, policy, hidden, rows, temperature)
    value_hidden = at(hidden, rows.value_index).astype(jnp.float32)
    values = jnp.zeros(rows.value_index.shape, jnp.float32)
    return lower | {
        "log_probs": log_probs,
        "end_hidden": at(hidden, rows.end_index).astype(jnp.float32),
        "value_hidden": value_hidden,
        "answer_hidden": at(hidden, rows.answer_index).astype(jnp.float32),
        "values": heads.read(params["value"], value_hidden) if "value" in params else values,
    }
