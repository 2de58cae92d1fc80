"""The arithmetic of the authors' released scripts, as they compute it, quirks included.

The one place with parity behaviour: nothing else in the package reads it but the check that
compares it with numbers recorded from that code (`python -m experiments.check_parity`).  Q numbers
are those of the list of differences that the recorded numbers came with; "TRL" is TRL 0.10.1,
whose PPO trainer the released one (StepTool's) is built on.  Names are TRL's, so that its
configurations can be read as they are.

B rows, T tokens, V vocabulary, S scores, b rows of a minibatch.  Arrays a token are [B, T-1]:
position t predicts token t + 1.

What the default does instead is in `rl/advantages.py` and `rl/losses.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

Params = dict[str, Any]  # parts of a model by name, each a pytree of arrays
# (params, tokens [b, T], attention mask [b, T]) -> (logits [b, T, V], values [b, T]).
Forward = Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

KL_PENALTIES = ("kl", "abs", "mse", "full")
_EPSILON = 1e-8  # TRL's, in whitening
_CLIP_EPSILON = 1e-6  # PyTorch's, in clip_grad_norm_
_KL_ERROR = 0.2  # the adaptive coefficient's largest error
_STOP_ABOVE = 1.5  # times target_kl


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of the released PPO that change a number; names are TRL's `PPOConfig`'s.

    Attributes:
      batch_size: rows of a step.
      mini_batch_size: rows of a forward and backward pass; token means are taken over these.
      gradient_accumulation_steps: minibatches of an optimiser step.
      ppo_epochs: passes over the batch.
      gamma, lam: of GAE, a token.
      adap_kl_ctrl: the KL coefficient moves towards `target` with `horizon`; else it stays.
      kl_penalty: see `kl_penalty`.
      learning_rate: of Adam, constant.
      cliprange, cliprange_value: of the ratio, and of the value's move.
      vf_coef: weight of the value loss.
      whiten_rewards: rewards are whitened before GAE, their mean kept.
      max_grad_norm: None, or the norm that the first update is clipped to.
      ratio_threshold: a minibatch whose mean ratio is above has no loss.
      early_stopping: no further epoch once the last minibatch's KL is above 1.5 `target_kl`.
    """

    batch_size: int
    mini_batch_size: int
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 4
    gamma: float = 1.0
    lam: float = 0.95
    adap_kl_ctrl: bool = True
    kl_penalty: str = "kl"
    target: float = 6.0
    horizon: float = 10_000.0
    learning_rate: float = 1.41e-5
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    whiten_rewards: bool = False
    max_grad_norm: float | None = None
    ratio_threshold: float = 10.0
    early_stopping: bool = False
    target_kl: float = 1.0


# --- Masked means -------------------------------------------------------------------------------


def masked_mean(x: chex.Array, mask: chex.Array) -> jax.Array:
    """sum(x * mask) / sum(mask): nan without a masked number, and where one of x is (Q25)."""
    return jnp.sum(x * mask) / jnp.sum(mask)


def masked_var(x: chex.Array, mask: chex.Array, *, unbiased: bool = True) -> jax.Array:
    """The variance over the mask, times n / (n - 1): nan for a single number (Q25)."""
    variance = masked_mean(jnp.square(x - masked_mean(x, mask)), mask)
    if not unbiased:
        return variance
    n = jnp.sum(mask).astype(variance.dtype)
    return variance * (n / (n - 1))


def whiten(x: chex.Array, mask: chex.Array, *, shift_mean: bool = True) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-8), mean and var over the mask; all of x is shifted and scaled.

    Args:
      x: [...] numbers.
      mask: [...] 1 where a number counts for mean and variance.
      shift_mean: False adds the mean back.

    Returns:
      [...]; also where the mask is 0.
    """
    mean = masked_mean(x, mask)
    y = (x - mean) * jax.lax.rsqrt(masked_var(x, mask) + _EPSILON)
    return y if shift_mean else y + mean


# --- Rewards and advantages ---------------------------------------------------------------------


def policy_mask(frag_mask: chex.Array) -> jax.Array:
    """[B, T-1] where a trained token is predicted, from the trained tokens [B, T] of the row.

    `frag_mask` begins at column 0 also where a row is padded on the left: with left padding the
    mask lies on other tokens than those it means (Q9).
    """
    chex.assert_rank(frag_mask, 2)
    return jnp.asarray(frag_mask)[:, 1:]


def kl_penalty(log_probs: chex.Array, ref_log_probs: chex.Array, kind: str) -> jax.Array:
    """What the KL costs at each position, before the coefficient.

        kl    log pi(a) - log ref(a)          abs   its absolute value
        mse   half its square                 full  sum_a pi(a) (log pi(a) - log ref(a))

    Args:
      log_probs: [..., T] of the tokens; [..., T, V] of the vocabulary for "full".
      ref_log_probs: the same under the reference.
      kind: one of `KL_PENALTIES`.

    Returns:
      [..., T], in nats.

    Raises:
      ValueError: another kind.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    difference = log_probs - ref_log_probs
    if kind == "kl":
        return difference
    if kind == "abs":
        return jnp.abs(difference)
    if kind == "mse":
        return 0.5 * jnp.square(difference)
    if kind == "full":
        return jnp.sum(jnp.exp(log_probs) * difference, -1)
    raise ValueError(f"kl_penalty {kind!r} is none of {', '.join(KL_PENALTIES)}")


def score_rewards(
    scores: chex.Array, n_scores: chex.Array, mask: chex.Array, *, weighted: bool = True
) -> jax.Array:
    """The scores at the steps' last tokens, from the last step backwards (Q2, Q3).

        mask      0 1 1 0 1 1 1 0 1 0        steps end where a 1 is followed by a 0, or by nothing
        step             2     1   0         counted from the end: j
        reward    . . *  . . . *  . * .      scores[n-1-j] * j:  the last step gets 0

    Steps that touch are one.  Scores for which there is no step are those of the first steps; with
    fewer scores than steps the first steps get none.

    Args:
      scores: [B, S]; float16 scores are multiplied in float16 (Q15).
      n_scores: [B] how many of a row's S are scores: n.
      mask: [B, T-1] of `policy_mask`.
      weighted: False leaves the factor j out.

    Returns:
      [B, T-1] float32; 0 elsewhere.
    """
    chex.assert_rank([scores, n_scores, mask], [2, 1, 2])
    inside = jnp.asarray(mask) != 0
    after = jnp.pad(inside[:, 1:], ((0, 0), (0, 1)))
    ends = inside & ~after
    from_end = jnp.cumsum(ends[:, ::-1], 1)[:, ::-1] - 1
    index = jnp.asarray(n_scores)[:, None] - 1 - from_end
    score = jnp.take_along_axis(jnp.asarray(scores), jnp.clip(index, 0, scores.shape[1] - 1), 1)
    if weighted:
        score = score * from_end.astype(score.dtype)
    return jnp.where(ends & (index >= 0), score, 0.0).astype(jnp.float32)


class Advantages(NamedTuple):
    """Of `token_gae`; [B, T-1] each.

    Attributes:
      values: the values times the mask.
      raw: advantages before whitening.
      whitened: the advantages that the policy loss gets.
      returns: raw + values, what the value loss gets.
    """

    values: jax.Array
    raw: jax.Array
    whitened: jax.Array
    returns: jax.Array


@functools.partial(jax.jit, static_argnames=("gamma", "lam", "whiten_rewards"))
def token_gae(
    values: chex.Array,
    rewards: chex.Array,
    mask: chex.Array,
    *,
    gamma: float,
    lam: float,
    whiten_rewards: bool = False,
) -> Advantages:
    """GAE over all tokens of a row, those that were read included (Q5).

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}

    with r and V times the mask, so that no value crosses the end of a step and what a later step
    earned fades by gamma lam with every token read in between.

    Args:
      values: [B, T-1] V.
      rewards: [B, T-1] r.
      mask: [B, T-1] of `policy_mask`.
      gamma: discount a token.
      lam: lambda.
      whiten_rewards: whitens r over the mask first, keeping its mean; what lies outside the
        mask is then no longer 0.

    Returns:
      `Advantages`.
    """
    chex.assert_rank([values, rewards, mask], 2)
    chex.assert_equal_shape([values, rewards, mask])
    v_t, r_t = values * mask, rewards * mask
    if whiten_rewards:
        r_t = whiten(r_t, mask, shift_mean=False)
    v_next = jnp.pad(v_t[:, 1:], ((0, 0), (0, 1)))
    delta_t = r_t + gamma * v_next - v_t

    def back(a_next: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = delta + gamma * lam * a_next
        return a, a

    _, a_t = jax.lax.scan(back, jnp.zeros_like(delta_t[:, 0]), delta_t.T, reverse=True)
    raw: jax.Array = a_t.T
    return Advantages(v_t, raw, whiten(raw, mask), raw + v_t)


def next_kl_coef(coefficient: float, kl: float, config: Config) -> float:
    """The KL coefficient of the next step.

        coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * batch_size / horizon)

    Args:
      coefficient: that of this step.
      kl: the step's `objective/kl`, in nats a row.
      config: the settings; without `adap_kl_ctrl` the coefficient stays.
    """
    if not config.adap_kl_ctrl:
        return coefficient
    error = min(max(kl / config.target - 1.0, -_KL_ERROR), _KL_ERROR)
    return coefficient * (1.0 + error * config.batch_size / config.horizon)


# --- One minibatch ------------------------------------------------------------------------------


class Minibatch(NamedTuple):
    """Rows of a batch, with what was computed of them before the first update; [b, T-1] each.

    Attributes:
      tokens, attention_mask: [b, T].
      mask: of `policy_mask`.
      log_probs: the old ones, recomputed from the policy at the start of the step (Q11).
      values: the old ones, times the mask.
      advantages: whitened.
      returns: of `token_gae`.
    """

    tokens: jax.Array
    attention_mask: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array


class Outputs(NamedTuple):
    """What a forward pass over a minibatch gives, [b, T-1] each.

    Attributes:
      log_probs: of the tokens.
      values: of the value head, everywhere.
      entropy: of the next token's distribution.
    """

    log_probs: jax.Array
    values: jax.Array
    entropy: jax.Array


def outputs(logits: jax.Array, values: jax.Array, tokens: jax.Array) -> Outputs:
    """`Outputs` of logits [b, T, V] and values [b, T] over tokens [b, T]."""
    logits = logits[:, :-1]
    log_pi = jax.nn.log_softmax(logits, -1)
    chosen = jnp.take_along_axis(log_pi, tokens[:, 1:, None], -1)[..., 0]
    entropy = jax.nn.logsumexp(logits, -1) - jnp.sum(jax.nn.softmax(logits, -1) * logits, -1)
    return Outputs(chosen, values[:, :-1], entropy)


def losses(
    new: Outputs, batch: Minibatch, config: Config
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a minibatch and its statistics, under TRL's names.

        policy = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),   rho = pi / pi_old
        value  = mean max((V - G)^2, (clip(V, V_old - eps_v, V_old + eps_v) - G)^2) / 2
        loss   = policy + vf_coef value, and 0 if mean rho > ratio_threshold

    Means are over the minibatch's mask, whatever the other minibatches of the update hold (Q19).

    Args:
      new: of the current policy.
      batch: the minibatch.
      config: the settings.

    Returns:
      (the loss, {"loss/policy": ..., ...}); scalars, but for policy/advantages and
      policy/ratio [b, T-1].
    """
    mask, g_t, v_old, a_t = batch.mask, batch.returns, batch.values, batch.advantages
    mean = functools.partial(masked_mean, mask=mask)
    low, high = v_old - config.cliprange_value, v_old + config.cliprange_value
    v_plain = jnp.square(new.values - g_t)
    v_clipped = jnp.square(jnp.maximum(jnp.minimum(new.values, high), low) - g_t)
    value_loss = 0.5 * mean(jnp.maximum(v_plain, v_clipped))
    ratio = jnp.exp(new.log_probs - batch.log_probs)
    p_plain = -a_t * ratio
    p_clipped = -a_t * jnp.clip(ratio, 1.0 - config.cliprange, 1.0 + config.cliprange)
    policy_loss = mean(jnp.maximum(p_plain, p_clipped))
    counted = jnp.where(mean(ratio) > config.ratio_threshold, 0.0, 1.0)
    policy_loss, value_loss = policy_loss * counted, value_loss * counted
    loss = policy_loss + config.vf_coef * value_loss
    stats = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "loss/total": loss,
        "policy/entropy": mean(new.entropy),
        "policy/approxkl": 0.5 * mean(jnp.square(new.log_probs - batch.log_probs)),
        "policy/policykl": mean(batch.log_probs - new.log_probs),
        "policy/clipfrac": mean((p_clipped > p_plain).astype(ratio.dtype)),
        "policy/advantages": a_t,
        "policy/advantages_mean": mean(a_t),
        "policy/ratio": ratio,
        "returns/mean": mean(g_t),
        "returns/var": masked_var(g_t, mask),
        "val/vpred": mean(new.values),
        "val/error": mean(v_plain),
        "val/clipfrac": mean((v_clipped > v_plain).astype(ratio.dtype)),
        "val/mean": mean(v_old),
        "val/var": masked_var(v_old, mask),
    }
    return loss, stats


def clip_gradient(gradient: Params, max_norm: float) -> Params:
    """gradient * min(1, max_norm / (norm + 1e-6)), norm over all of it, as PyTorch clips."""
    scale = jnp.minimum(1.0, max_norm / (optax.global_norm(gradient) + _CLIP_EPSILON))
    return jax.tree.map(lambda g: g * scale, gradient)


# --- One PPO step -------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
      tokens, attention_mask: [B, T] int.
      mask: [B, T-1] of `policy_mask`.
      scores, n_scores: [B, S] and [B], as in `score_rewards`.
    """

    tokens: jax.Array
    attention_mask: jax.Array
    mask: jax.Array
    scores: jax.Array
    n_scores: jax.Array


class State(NamedTuple):
    """A trainer between two steps.

    Attributes:
      trained: the parameters that are trained.
      adam: Adam's state of them.
      kl_coef: the KL coefficient of the next step.
      updates: optimiser steps so far.
    """

    trained: Params
    adam: optax.OptState
    kl_coef: float
    updates: int


class Experience(NamedTuple):
    """What a step computes before its first update; [B, T-1] each.

    Attributes:
      log_probs, ref_log_probs: of the policy and of the reference.
      values: of the value head, everywhere.
      kl: of `kl_penalty`.
      non_score_rewards: -kl_coef * kl.
      rewards: those, plus `score_rewards`.
      advantages: of `token_gae`.
    """

    log_probs: jax.Array
    ref_log_probs: jax.Array
    values: jax.Array
    kl: jax.Array
    non_score_rewards: jax.Array
    rewards: jax.Array
    advantages: Advantages


class Trace(NamedTuple):
    """What happened in a step.

    Attributes:
      experience: before the first update.
      minibatches: [b] row indices of each minibatch, in order.
      outputs: of each minibatch.
      stats: of each minibatch, as `losses` gives them.
      first_gradient: of the first minibatch, after division by the accumulation steps.
      first_update: the first optimiser step's, accumulated and not clipped yet.
    """

    experience: Experience
    minibatches: list[tuple[int, ...]]
    outputs: list[Outputs]
    stats: list[dict[str, jax.Array]]
    first_gradient: Params
    first_update: Params


def start(trained: Params, config: Config, kl_coef: float) -> State:
    """A new trainer; Adam is PyTorch's with its defaults, and no weight decay."""
    return State(trained, optax.adam(config.learning_rate).init(trained), kl_coef, 0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="config")
def collect(
    forward: Forward,
    trained: Params,
    frozen: Params,
    reference: Params,
    batch: Batch,
    *,
    kl_coef: float,
    config: Config,
) -> Experience:
    """Rewards and advantages of a batch, from log-probabilities of the current policy (Q11).

    Args:
      forward: the model.
      trained, frozen: together the policy's parameters.
      reference: the reference policy's parameters.
      batch: the batch.
      kl_coef: the KL coefficient.
      config: the settings.
    """
    logits, values = forward(frozen | trained, batch.tokens, batch.attention_mask)
    ref_logits, _ = forward(reference, batch.tokens, batch.attention_mask)
    new = outputs(logits, values, batch.tokens)
    ref_log_probs = outputs(ref_logits, values, batch.tokens).log_probs
    p, q = new.log_probs, ref_log_probs
    if config.kl_penalty == "full":
        p, q = (jax.nn.log_softmax(x[:, :-1], -1) for x in (logits, ref_logits))
    kl = kl_penalty(p, q, config.kl_penalty)
    rewards = -kl_coef * kl + score_rewards(batch.scores, batch.n_scores, batch.mask)
    settings = {"gamma": config.gamma, "lam": config.lam, "whiten_rewards": config.whiten_rewards}
    return Experience(
        log_probs=new.log_probs,
        ref_log_probs=ref_log_probs,
        values=new.values,
        kl=kl,
        non_score_rewards=-kl_coef * kl,
        rewards=rewards,
        advantages=token_gae(new.values, rewards, batch.mask, **settings),
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def minibatch_gradient(
    forward: Forward, trained: Params, frozen: Params, batch: Minibatch, config: Config
) -> tuple[Params, Outputs, dict[str, jax.Array]]:
    """The gradient of a minibatch's loss, divided by the accumulation steps (Q19).

    Dropout is off, as in the released code, whose forward passes run in eval mode (Q17).

    Returns:
      (gradient of `trained`, `Outputs`, statistics of `losses`).
    """

    def loss(trained: Params) -> tuple[jax.Array, tuple[Outputs, dict[str, jax.Array]]]:
        logits, values = forward(frozen | trained, batch.tokens, batch.attention_mask)
        new = outputs(logits, values, batch.tokens)
        total, stats = losses(new, batch, config)
        return total / config.gradient_accumulation_steps, (new, stats)

    gradient, (new, stats) = jax.grad(loss, has_aux=True)(trained)
    return gradient, new, stats


def step(
    forward: Forward,
    state: State,
    frozen: Params,
    reference: Params,
    batch: Batch,
    *,
    permutations: Sequence[Sequence[int]],
    config: Config,
) -> tuple[State, Trace]:
    """One PPO step of the released trainer.

    Args:
      forward: the model.
      state: the trainer's.
      frozen: the policy's parameters that are not trained.
      reference: the reference policy's parameters.
      batch: the batch.
      permutations: an order of the rows for every epoch that is run; with early stopping there
        may be fewer than `ppo_epochs`, and no more are run.
      config: the settings.

    Returns:
      (the trainer after the step, what happened).  The coefficient moves as the last line of the
      released step does: after the updates, with the KL of before.
    """
    kl_coef = state.kl_coef
    experience = collect(
        forward, state.trained, frozen, reference, batch, kl_coef=kl_coef, config=config
    )
    trace = Trace(experience, [], [], [], {}, {})
    advantages = experience.advantages
    all_rows = Minibatch(
        tokens=batch.tokens,
        attention_mask=batch.attention_mask,
        mask=batch.mask,
        log_probs=experience.log_probs,
        values=advantages.values,
        advantages=advantages.whitened,
        returns=advantages.returns,
    )
    for order in permutations[: config.ppo_epochs]:
        state, trace = _epoch(forward, state, frozen, all_rows, order, config=config, trace=trace)
        kl = float(trace.stats[-1]["policy/policykl"])
        if config.early_stopping and kl > _STOP_ABOVE * config.target_kl:
            break
    after = next_kl_coef(kl_coef, float(mean_kl(experience, batch.mask)), config)
    return state._replace(kl_coef=after), trace


def _epoch(
    forward: Forward,
    state: State,
    frozen: Params,
    all_rows: Minibatch,
    order: Sequence[int],
    *,
    config: Config,
    trace: Trace,
) -> tuple[State, Trace]:
    """One pass over the batch; the minibatches are added to the trace."""
    gradient: Params = {}
    size = config.mini_batch_size
    for number, begin in enumerate(range(0, config.batch_size, size), 1):
        rows = tuple(int(i) for i in order[begin : begin + size])
        batch = jax.tree.map(lambda x, rows=rows: x[jnp.array(rows)], all_rows)
        one, new, stats = minibatch_gradient(forward, state.trained, frozen, batch, config)
        gradient = jax.tree.map(jnp.add, gradient, one) if gradient else one
        trace.minibatches.append(rows)
        trace.outputs.append(new)
        trace.stats.append(stats)
        if not trace.first_gradient:
            trace = trace._replace(first_gradient=one)
        if number % config.gradient_accumulation_steps == 0:
            if not trace.first_update:
                trace = trace._replace(first_update=gradient)
            # The trainer clips with a generator of its parameters, which its first use exhausts:
            # only a trainer's first update is ever clipped (Q18).
            if config.max_grad_norm is not None and not state.updates:
                gradient = clip_gradient(gradient, config.max_grad_norm)
            state, gradient = _update(state, gradient, config), {}
    return state, trace


def _update(state: State, gradient: Params, config: Config) -> State:
    """One step of Adam."""
    trained, adam = _adam(config.learning_rate, state.trained, state.adam, gradient)
    return state._replace(trained=trained, adam=adam, updates=state.updates + 1)


@functools.partial(jax.jit, static_argnums=0)
def _adam(
    learning_rate: float, trained: Params, adam: optax.OptState, gradient: Params
) -> tuple[Params, optax.OptState]:
    moves, adam = optax.adam(learning_rate).update(gradient, adam)
    return optax.apply_updates(trained, moves), adam


def mean_kl(experience: Experience, mask: chex.Array) -> jax.Array:
    """`objective/kl`: the mean over rows of the sum over the mask; may be negative (Q19)."""
    return jnp.mean(jnp.sum(experience.kl * mask, -1))


def statistics(
    state: State, trace: Trace, batch: Batch, query_len: chex.Array, config: Config
) -> dict[str, jax.Array]:
    """The statistics of a step, as TRL and the released trainer compute them.

    Means over minibatches, whatever their numbers of tokens; scores are those of the rows' last
    steps (which are the ones that earn nothing, Q2).

    Args:
      state: the trainer's before the step.
      trace: what happened in the step.
      batch: its batch.
      query_len: [B] tokens before the last step of the row; the rest is the response.
      config: the settings.

    Returns:
      {"objective/kl": ..., ...}: scalars, but for objective/kl_dist, tokens/queries_dist and
      tokens/responses_dist, [B].
    """
    mask, seen = batch.mask, trace.experience
    query = jnp.asarray(query_len, jnp.float32)
    response = jnp.sum(batch.attention_mask, -1) - query
    last = jnp.take_along_axis(batch.scores, batch.n_scores[:, None] - 1, 1)[:, 0]
    stats: dict[str, jax.Array] = {
        "objective/kl": mean_kl(seen, mask),
        "objective/kl_dist": jnp.sum(seen.kl * mask, -1),
        "objective/kl_coef": jnp.asarray(state.kl_coef),
        "objective/entropy": jnp.mean(jnp.sum(-seen.log_probs * mask, -1)),
        "ppo/mean_non_score_reward": masked_mean(seen.non_score_rewards, mask),
        "ppo/mean_scores": jnp.mean(last),
        "ppo/std_scores": jnp.std(last, ddof=1),
        "tokens/queries_dist": query,
        "tokens/responses_dist": response,
        "tokens/queries_len_mean": jnp.mean(query),
        "tokens/queries_len_std": jnp.std(query, ddof=1),
        "tokens/responses_len_mean": jnp.mean(response),
        "tokens/responses_len_std": jnp.std(response, ddof=1),
        "ppo/learning_rate": jnp.asarray(config.learning_rate),
    }
    for name, first in trace.stats[0].items():
        if first.ndim == 0:
            stats[f"ppo/{name}"] = jnp.mean(jnp.stack([one[name] for one in trace.stats]))
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    return stats


# --- The progress model -------------------------------------------------------------------------


def turn_ends(trained: chex.Array) -> jax.Array:
    """[B, T] True at the last trained token of each turn; turns that touch are one.

    Args:
      trained: [B, T] 1 (or True) at the tokens of the turns, as they lie in the padded row.
    """
    inside = jnp.asarray(trained) != 0
    return inside & ~jnp.pad(inside[:, 1:], ((0, 0), (0, 1)))


def turn_values(logits: chex.Array, weight: chex.Array, bias: chex.Array) -> jax.Array:
    """The released progress head: one linear layer on the vocabulary logits (Q4).

    Args:
      logits: [..., V] of the language model at the last token of a turn.
      weight: [1, V].
      bias: [1].

    Returns:
      [...] the turn's value.
    """
    return jnp.sum(logits * weight[0], -1) + bias[0]


def progress_predictions(values: chex.Array, ends: chex.Array) -> jax.Array:
    """[B] the sum of the values [B, T] over a row's turn ends [B, T]; 0 without a turn."""
    return jnp.sum(jnp.where(ends, values, 0.0), -1)


def progress_loss(predictions: chex.Array, labels: chex.Array) -> jax.Array:
    """mean_i (prediction_i - R_i)^2 over the rows of the batch."""
    return jnp.mean(jnp.square(predictions - labels))
