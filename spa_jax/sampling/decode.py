"""Prefill and decode of many conversations at once: the jit-compiled inside of the engine.

Everything here is pure: (params, state, ...) -> (state, ...).  A *slot* is a row of the
key/value cache that holds one conversation; the cache place of a token is its position:

    slot 0   <user> You see a mug <assistant> take mug <eot>
    cache     0      1   2   3  4   5          6    7              length = 8
                                                          ^ <eot> is sampled but not yet fed:
                                                            it opens the next chunk

B slots, C cache places, M new tokens a turn, D hidden, V vocabulary.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

from spa_jax.models import transformer
from spa_jax.models.transformer import ModelConfig, Params

_BLOCK = 256  # vocabulary entries a block of the two-level inverse CDF


@struct.dataclass
class SlotState:
    """What the device holds of every slot.

    Attributes:
      cache: the transformer's cache, rows are slots.
      hidden: [B, D], the state of each slot's newest token (its logits come next).
      length: [B] int32, tokens in the cache.
    """

    cache: list[transformer.LayerCache]
    hidden: jax.Array
    length: jax.Array


@struct.dataclass
class Turn:
    """What one call of `decode_turn` wrote.

    Attributes:
      tokens: [B, M] int32; the first `count` are real.
      log_probs: [B, M] float32, log softmax(logits / temperature)[token].
      count: [B] int32.
      ended: [B] bool, whether the turn closed with the end-of-turn token.
    """

    tokens: jax.Array
    log_probs: jax.Array
    count: jax.Array
    ended: jax.Array


def empty_state(config: ModelConfig, slots: int, length: int) -> SlotState:
    """All slots empty."""
    return SlotState(
        cache=transformer.empty_cache(config, slots, length),
        hidden=jnp.zeros((slots, config.hidden_size), jnp.float32),
        length=jnp.zeros((slots,), jnp.int32),
    )


def prefill(
    config: ModelConfig,
    params: Params,
    state: SlotState,
    tokens: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    slots: jax.Array | None = None,
) -> SlotState:
    """Appends a chunk of tokens to some slots.

    Args:
      config: the model's shape.
      params: the tree of `transformer.unstack`.
      state: the slots.
      tokens: [A, T] int32, the chunk, padded on the right.
      starts: [A] int32, each slot's length before the chunk (0 empties the slot).
      counts: [A] int32, how many of the T tokens are real; 0 leaves the slot as it is.
      slots: [A] int32, the slots to append to, an entry >= B being padding; None: all B in
        their order, which spares the copy of their caches.

    Returns:
      The slots with the chunk in their caches; `hidden` is that of the last real token.
    """
    chex.assert_rank([tokens, starts, counts], [2, 1, 1])
    cache_length = state.cache[0][1].shape[2]
    offset = jnp.arange(tokens.shape[1])
    positions = jnp.where(offset < counts[:, None], starts[:, None] + offset, cache_length)
    take = (lambda x: x) if slots is None else (lambda x: x.at[slots].get(mode="clip"))
    put = (lambda _, y: y) if slots is None else (lambda x, y: x.at[slots].set(y, mode="drop"))
    hidden, cache = transformer.cached_hidden_states(
        config, params, tokens, positions, jax.tree.map(take, state.cache)
    )
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    last_hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    real = counts > 0
    return SlotState(
        cache=jax.tree.map(put, state.cache, cache),
        hidden=put(state.hidden, jnp.where(real[:, None], last_hidden, take(state.hidden))),
        length=put(state.length, jnp.where(real, starts + counts, take(state.length))),
    )


def copy_cache(state: SlotState, source: jax.Array, target: jax.Array) -> SlotState:
    """Gives one slot the cache of another; how much of it counts is for the caller to know.

    Args:
      state: the slots.
      source: int32, the slot to copy from.
      target: int32, the slot to copy to.

    Returns:
      The slots; `hidden` and `length` are as they were.
    """
    copied = jax.tree.map(lambda x: x.at[target].set(x[source]), state.cache)
    return SlotState(cache=copied, hidden=state.hidden, length=state.length)


def truncate(scaled: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits outside the top k, or outside the smallest set of mass top_p, become -inf.

    Args:
      scaled: [B, V] logits / temperature.
      top_k: 0 keeps all.
      top_p: 1 keeps all (nucleus sampling, arXiv 1904.09751).

    Returns:
      [B, V].
    """
    if top_k > 0:
        kth = jax.lax.top_k(scaled, top_k)[0][:, -1:]
        scaled = jnp.where(scaled < kth, -jnp.inf, scaled)
    if top_p < 1.0:
        ordered = -jnp.sort(-scaled, -1)
        before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
        floor = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
    return scaled


def inverse_cdf(uniform: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Draws token ids with one uniform number a row: the first v with CDF(v) > u.

    One number a row instead of one a vocabulary entry: the Gumbel trick spends more time
    on random bits than a small model spends on its logits.  The CDF is summed in two
    levels, blocks of 256 and then within the block.

    Args:
      uniform: [B] in [0, 1).
      log_probs: [B, V].

    Returns:
      [B] int32.
    """
    rows, size = log_probs.shape
    blocks = -(-size // _BLOCK)
    probs = jnp.pad(jnp.exp(log_probs), ((0, 0), (0, blocks * _BLOCK - size)))
    probs = probs.reshape(rows, blocks, _BLOCK)
    mass = jnp.cumsum(probs.sum(-1), -1)
    target = uniform * mass[:, -1]
    block = jnp.minimum((mass <= target[:, None]).sum(-1), blocks - 1)
    inside = jnp.take_along_axis(probs, block[:, None, None], 1)[:, 0]
    before = jnp.take_along_axis(mass, block[:, None], 1)[:, 0] - inside.sum(-1)
    within = jnp.cumsum(inside, -1) + before[:, None]
    # Rounding may leave no entry above the target: then the last one with any mass is it.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, -1)
    offset = jnp.minimum((within <= target[:, None]).sum(-1), last)
    return (block * _BLOCK + offset).astype(jnp.int32)


def draw(
    logits: jax.Array,
    keys: chex.PRNGKey,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability before truncation.

    Args:
      logits: [B, V] float32.
      keys: [B] keys, one an episode and position, so that a token does not depend on the
        slot or the batch that it was drawn in.
      temperature: 0 is greedy (log-probs are then those of temperature 1).
      top_k: see `truncate`.
      top_p: see `truncate`.

    Returns:
      [B] int32 tokens and [B] float32 log softmax(logits / temperature)[token].
    """
    scaled = logits / (temperature or 1.0)
    log_probs = jax.nn.log_softmax(scaled, -1)
    if temperature == 0:
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
    else:
        uniform = jax.vmap(jax.random.uniform)(keys)
        kept = log_probs
        if top_k > 0 or top_p < 1.0:
            kept = jax.nn.log_softmax(truncate(scaled, top_k, top_p), -1)
        tokens = inverse_cdf(uniform, kept)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], 1)[:, 0]


def decode_turn(
    config: ModelConfig,
    params: Params,
    state: SlotState,
    active: jax.Array,
    keys: chex.PRNGKey,
    *,
    end_of_turn: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[SlotState, Turn]:
    """Lets the policy write one turn in every active slot.

    The loop ends when every active slot has ended its turn, reached M tokens, or filled
    its context.  The last token of a turn is sampled but not fed (see the drawing above).

    Args:
      config: the model's shape.
      params: the tree of `transformer.unstack`.
      state: the slots, each prefilled up to where the policy writes.
      active: [B] bool.
      keys: [B] keys, one an episode.
      end_of_turn: the id that closes a turn.
      max_new_tokens: M.
      temperature: see `draw`.
      top_k: see `draw`.
      top_p: see `draw`.

    Returns:
      The slots and the `Turn`.
    """
    slots, cache_length = active.shape[0], state.cache[0][1].shape[2]
    turn = Turn(
        tokens=jnp.zeros((slots, max_new_tokens), jnp.int32),
        log_probs=jnp.zeros((slots, max_new_tokens), jnp.float32),
        count=jnp.zeros((slots,), jnp.int32),
        ended=jnp.zeros((slots,), bool),
    )

    def write(
        index: jax.Array, state: SlotState, turn: Turn, writing: jax.Array
    ) -> tuple[Turn, jax.Array, jax.Array]:
        """Draws token `index` of the slots that still write; says which of them to feed."""
        step_keys = jax.vmap(jax.random.fold_in)(keys, state.length)
        tokens, log_probs = draw(
            transformer.logits(params, state.hidden),
            step_keys,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        turn = Turn(
            tokens=turn.tokens.at[:, index].set(tokens),
            log_probs=turn.log_probs.at[:, index].set(log_probs),
            count=turn.count + writing,
            ended=turn.ended | (writing & (tokens == end_of_turn)),
        )
        feeds = writing & (tokens != end_of_turn) & (index + 1 < max_new_tokens)
        return turn, tokens, feeds & (state.length < cache_length)

    def body(carry: tuple) -> tuple:
        index, state, turn, tokens, feeds = carry
        positions = jnp.where(feeds, state.length, cache_length)
        hidden, cache = transformer.cached_hidden_states(
            config, params, tokens[:, None], positions[:, None], state.cache
        )
        state = SlotState(
            cache=cache,
            hidden=jnp.where(feeds[:, None], hidden[:, 0], state.hidden),
            length=state.length + feeds,
        )
        return index + 1, state, *write(index + 1, state, turn, feeds)

    # Fed, then drawn: the last token of the longest turn costs no forward pass.
    first = write(jnp.int32(0), state, turn, active)
    start = (jnp.int32(0), state, *first)
    _, state, turn, _, _ = jax.lax.while_loop(lambda carry: carry[4].any(), body, start)
    return state, turn
