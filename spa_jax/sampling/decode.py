"""Prefill and decode of many conversations at once: the jit-compiled inside of the engine.

Everything here is pure: (params, state, ...) -> (state, ...).  A *slot* is a row of the
key/value cache that holds one conversation; the cache place of a token is its position:

    slot 0   <user> You see a mug <assistant> take mug <eot>
    cache     0      1   2   3  4   5          6    7              length = 8
                                                          ^ <eot> is sampled but not yet fed:
                                                            it opens the next chunk

B slots, C cache places, D hidden, V vocabulary.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from spa_jax.models import transformer
from spa_jax.models.config import ModelConfig, Params
from spa_jax.models.kernels import attention
from spa_jax.models.kernels.attention import CacheOrder

_BLOCK = 256  # vocabulary entries a block of the two-level inverse CDF


@struct.dataclass
class SlotState:
    """What the device holds of every slot.

    Attributes:
      cache: the transformer's cache, rows are slots.
      hidden: [B, D], the state of each slot's newest token (its logits come next).
      length: [B] int32, tokens in the cache.
    """

    cache: list[attention.LayerCache]
    hidden: jax.Array
    length: jax.Array


class PrefillRows(NamedTuple):
    """Chunks of tokens to append: A rows of at most T tokens, of a host's or a device's arrays.

        T = 4      slots  starts  tokens     newest
        row 0        5      10    a b c d    no
        row 1        5      14    e f - -    yes      slot 5 reads a b c d e f
        row 2        7       0    g h i -    yes

    Attributes:
      slots: [A] int32, the slot to append each row to; an entry >= B is padding.
      tokens: [A, T] int32, the chunks, padded on the right.
      starts: [A] int32, the slot's length before the chunk (0 empties the slot).
      counts: [A] int32, how many of the T tokens are real.
      newest: [A] bool, whether the chunk is the last one of its slot; true once a slot.
    """

    slots: chex.Array
    tokens: chex.Array
    starts: chex.Array
    counts: chex.Array
    newest: chex.Array


@struct.dataclass
class Chunk:
    """What one call of `decode_chunk` wrote, of N steps.

    Attributes:
      tokens: [B, N + 1] int32; the first `count` are real.
      log_probs: [B, N + 1] float32, log softmax(logits / temperature)[token].
      count: [B] int32.
      ended: [B] bool, whether the turn closed with an end-of-turn token.
      writing: [B] bool, whether the turn goes on in the next chunk.
    """

    tokens: jax.Array
    log_probs: jax.Array
    count: jax.Array
    ended: jax.Array
    writing: jax.Array


def empty_state(
    config: ModelConfig,
    slots: int,
    length: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> SlotState:
    """All slots empty, of that type; the cache too, unless it has one of its own."""
    return SlotState(
        cache=transformer.empty_cache(config, slots, length, cache_dtype or dtype),
        hidden=jnp.zeros((slots, config.hidden_size), dtype),
        length=jnp.zeros((slots,), jnp.int32),
    )


def prefill(
    config: ModelConfig,
    params: Params,
    state: SlotState,
    rows: PrefillRows,
    *,
    order: CacheOrder | None = None,
) -> SlotState:
    """Appends chunks of tokens to some slots.

    A slot may have several rows, with chunks that follow each other: in every layer the keys of
    all rows are in the cache before any row looks at it.

    Args:
      config: the model's shape.
      params: the tree of `tree.unstack`.
      state: the slots.
      rows: the chunks.
      order: of the cache's axes in memory, where it is known; it changes no result.

    Returns:
      The slots with the chunks in their caches; `hidden` is that of a slot's last real token.
    """
    slots, tokens, starts, counts, newest = rows
    chex.assert_rank([slots, tokens, starts, counts, newest], [1, 2, 1, 1, 1])
    cache_length = state.cache[0][1].shape[2]
    offset = jnp.arange(tokens.shape[1])
    positions = jnp.where(offset < counts[:, None], starts[:, None] + offset, cache_length)
    hidden, cache = transformer.cached_hidden_states(
        config, params, tokens, positions, state.cache, rows=slots, order=order
    )
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    last_hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    ends = jnp.where(newest, slots, state.length.shape[0])
    return SlotState(
        cache=cache,
        hidden=state.hidden.at[ends].set(last_hidden, mode="drop"),
        length=state.length.at[ends].set(starts + counts, mode="drop"),
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


def inverse_cdf(uniform: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws token ids with one uniform number a row: the first v with CDF(v) > u.

    One number a row instead of one a vocabulary entry: the Gumbel trick spends more time
    on random bits than a small model spends on its logits.  The CDF is summed in two
    levels, blocks of 256 and then within the block.

    Args:
      uniform: [B] in [0, 1).
      weights: [B, V], probabilities up to a factor a row.

    Returns:
      [B] int32 ids and [B] the sums of the rows' weights.
    """
    rows, size = weights.shape
    blocks = -(-size // _BLOCK)
    weights = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - size)))
    weights = weights.reshape(rows, blocks, _BLOCK)
    mass = jnp.cumsum(weights.sum(-1), -1)
    target = uniform * mass[:, -1]
    block = jnp.minimum((mass <= target[:, None]).sum(-1), blocks - 1)
    inside = jnp.take_along_axis(weights, block[:, None, None], 1)[:, 0]
    before = jnp.take_along_axis(mass, block[:, None], 1)[:, 0] - inside.sum(-1)
    within = jnp.cumsum(inside, -1) + before[:, None]
    # Rounding may leave no entry above the target: then the last one with any mass is it.
    last = _BLOCK - 1 - jnp.argmax(inside[:, ::-1] > 0, -1)
    offset = jnp.minimum((within <= target[:, None]).sum(-1), last)
    return (block * _BLOCK + offset).astype(jnp.int32), mass[:, -1]


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
    peak = scaled.max(-1, keepdims=True)
    # One exponential an entry serves the draw and the log-probability: on a CPU they are most
    # of what is left to do once the logits are there.
    weights = jnp.exp(scaled - peak)
    if temperature == 0:
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        total = weights.sum(-1)
    else:
        uniform = jax.vmap(jax.random.uniform)(keys)
        tokens, total = inverse_cdf(uniform, weights)
        if top_k > 0 or top_p < 1.0:
            weights = jnp.exp(truncate(scaled, top_k, top_p) - peak)
            tokens, _ = inverse_cdf(uniform, weights)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], 1)[:, 0]
    return tokens, chosen - peak[:, 0] - jnp.log(total)


def decode_chunk(
    config: ModelConfig,
    params: Params,
    state: SlotState,
    *,
    tokens: jax.Array,
    budget: jax.Array,
    keys: chex.PRNGKey,
    steps: int,
    end_of_turn: tuple[int, ...],
    temperature: float,
    top_k: int,
    top_p: float,
    places: int | None = None,
) -> tuple[SlotState, Chunk]:
    """Lets the policy go on writing in every slot that has a budget, for at most N steps.

    A step feeds the newest token of each writing slot and draws the next one.  A slot whose
    turn begins has no token to feed yet, and draws its first one before the first step:

        N = 3         drawn before   step 0   step 1   step 2      N + 1 tokens at most
        begins              a           b        c        d        (d is fed in the next chunk)
        goes on                         b        c       eot       (eot opens the next turn)

    The loop ends early when every slot has ended its turn, used its budget or filled its
    context.  The last token of a turn is drawn but not fed (see the drawing above).

    Args:
      config: the model's shape.
      params: the tree of `tree.unstack`.
      state: the slots, each prefilled up to where the policy writes.
      tokens: [B] int32, the newest token of a turn that goes on, which was drawn but not
        fed; negative where the turn begins.
      budget: [B] int32, how many tokens the turn may still have; 0: the slot does not write.
      keys: [B] keys, one an episode.
      steps: N.
      end_of_turn: the ids that close a turn.
      temperature: see `draw`.
      top_k: see `draw`.
      top_p: see `draw`.
      places: only the first of the cache are read; no slot that writes may get beyond them in
        these steps.  None: all.

    Returns:
      The slots and the `Chunk`.
    """
    slots, cache_length = tokens.shape[0], state.cache[0][1].shape[2]
    rows = jnp.arange(slots)
    chunk = Chunk(
        tokens=jnp.zeros((slots, steps + 1), jnp.int32),
        log_probs=jnp.zeros((slots, steps + 1), jnp.float32),
        count=jnp.zeros((slots,), jnp.int32),
        ended=jnp.zeros((slots,), bool),
        writing=(budget > 0) & (tokens >= 0) & (state.length < cache_length),
    )

    def draw_next(
        state: SlotState, chunk: Chunk, tokens: jax.Array, drawing: jax.Array
    ) -> tuple[Chunk, jax.Array]:
        """Draws a token in some slots; says in which of all slots to feed the newest."""
        drawn, log_probs = draw(
            transformer.logits(params, state.hidden),
            jax.vmap(jax.random.fold_in)(keys, state.length),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        at = (rows, jnp.where(drawing, chunk.count, steps + 1))
        count = chunk.count + drawing
        ended = drawing & (drawn[:, None] == jnp.array(end_of_turn, jnp.int32)).any(-1)
        feeds = ~ended & (count < budget) & (state.length < cache_length)
        chunk = Chunk(
            tokens=chunk.tokens.at[at].set(drawn, mode="drop"),
            log_probs=chunk.log_probs.at[at].set(log_probs, mode="drop"),
            count=count,
            ended=chunk.ended | ended,
            writing=jnp.where(drawing, feeds, chunk.writing),
        )
        return chunk, jnp.where(drawing, drawn, tokens)

    def step(carry: tuple) -> tuple:
        index, state, chunk, tokens = carry
        feeds = chunk.writing
        positions = jnp.where(feeds, state.length, cache_length)
        hidden, cache = transformer.cached_hidden_states(
            config, params, tokens[:, None], positions[:, None], state.cache, places=places
        )
        state = SlotState(
            cache=cache,
            hidden=jnp.where(feeds[:, None], hidden[:, 0], state.hidden),
            length=state.length + feeds,
        )
        return index + 1, state, *draw_next(state, chunk, tokens, feeds)

    begins = (budget > 0) & (tokens < 0)
    first = jax.lax.cond(
        begins.any(),
        lambda: draw_next(state, chunk, tokens, begins),
        lambda: (chunk, tokens),  # nobody begins: no pass over the vocabulary
    )
    _, state, chunk, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & carry[2].writing.any(),
        step,
        (jnp.int32(0), state, *first),
    )
    return state, chunk
