"""From annotated trajectories to the batches of a policy update, on the host.

A `Table` holds what an objective reads and makes by (trajectory, place).  A place is a step; with
`gae=token` it is a token's position in its trajectory, and those that the policy wrote count:

    step_id       -1 -1  0  0 -1  1        two steps of rewards 5 and 7
    gae=step      rewards  5  7            mask  1  1
    gae=token     rewards  0  0  0  5  0  7   mask  0  0  1  1  0  1    (paid at a step's end)

`gae=token` is then step GAE over places: context tokens are no places, so an observation's
length changes nothing here either.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spa_jax import batching
from spa_jax.batching import PackedRows
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.rl import advantages, archer, critic, losses, objectives, ragen
from spa_jax.stage_config import PpoConfig
from spa_jax.training import scoring
from spa_jax.training.ppo_update import PpoBatch
from spa_jax.training.sft_update import SftBatch
from spa_jax.trajectory import Trajectory

_FOLDS = 8  # of the ridge critic

# (rows, lower_states) of a microbatch -> [..., R, P] a number each policy-token slot.
Forward = Callable[[PackedRows, np.ndarray | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Table:
    """Arrays [N, K] by (trajectory, place).

    Attributes:
      rewards: r, 0 but where `ends` is 1.
      values: V of the policy at the stage's start; 0 without a critic.
      advantages: A, not whitened.
      returns: G.
      mask: 1 where a place counts.
      ends: 1 where a step ends; with `gae=step` the same as `mask`.
    """

    rewards: np.ndarray
    values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    mask: np.ndarray
    ends: np.ndarray

    def take(self, chosen: np.ndarray) -> "Table":
        """The rows of the chosen trajectories."""
        fields = (field.name for field in dataclasses.fields(self))
        return Table(**{name: getattr(self, name)[chosen] for name in fields})


def make_table(
    trajectories: Sequence[Trajectory],
    values: np.ndarray | None,
    ppo: PpoConfig,
    *,
    action_values: np.ndarray | None = None,
) -> Table:
    """The table of all episodes.

    --step_baseline changes the advantages alone: a critic still learns the returns.

    Args:
      trajectories: N annotated trajectories.
      values: [N, S], or [N, T] by position with `gae=token`; None without a critic.
      ppo: the objective and its settings.
      action_values: [N, S] Q, for an objective with a critic of actions.

    Raises:
      UserError: if the objective compares rollouts and no task has two.
    """
    group, objective = _groups(trajectories), objectives.OBJECTIVES[ppo.objective]
    if objective.group and len(np.unique(group)) == len(group):
        raise UserError(
            f"--objective={ppo.objective} compares a task's rollouts with each other, and no task "
            "has two: explore with --rollouts of at least 2"
        )
    places = _token_places(trajectories) if ppo.gae == "token" else _step_places(trajectories)
    rewards, mask, ends = places
    values = np.zeros_like(rewards) if values is None else values
    advantage, returns = objectives.advantages_and_returns(
        ppo.objective,
        rewards,
        values,
        mask,
        group,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        state=states(trajectories) if objective.states else None,
        action_values=action_values,
    )
    if ppo.step_baseline:
        advantage = advantages.less_step_mean(advantage, mask)
    return Table(
        rewards=rewards,
        values=values,
        advantages=np.asarray(advantage),
        returns=np.asarray(returns),
        mask=mask,
        ends=ends,
    )


def fitted_values(
    trajectories: Sequence[Trajectory], hidden: np.ndarray, ppo: PpoConfig
) -> np.ndarray:
    """[N, S] values of `critic.cross_fitted_values`: no episode's own task was fitted on.

    Args:
      trajectories: N annotated trajectories.
      hidden: [N, S, D] a frozen policy's hidden state before each step.
      ppo: the discount.

    Raises:
      UserError: if all episodes are of one task.
    """
    fold, folds = folds_of(trajectories, "--critic=ridge", "--critic=head")
    rewards, mask, _ = _step_places(trajectories)
    _, to_go = advantages.step_gae(
        rewards, np.zeros_like(rewards), mask, gamma=ppo.gamma, gae_lambda=1.0
    )
    return np.asarray(critic.cross_fitted_values(hidden, to_go, mask, fold, folds=folds))


def fitted_critic(
    trajectories: Sequence[Trajectory], scores: scoring.Scores, ppo: PpoConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(Q, V) [N, S] of `archer.utterance_critic`; arguments and errors as `fitted_values`."""
    fold, folds = folds_of(trajectories, "--objective=archer", "another --objective")
    rewards, mask, _ = _step_places(trajectories)
    q, v = archer.utterance_critic(
        scores.value_hidden,
        scores.end_hidden,
        rewards,
        mask,
        fold,
        folds=folds,
        gamma=ppo.gamma,
    )
    return np.asarray(q), np.asarray(v)


def folds_of(trajectories: Sequence[Trajectory], flag: str, instead: str) -> tuple[np.ndarray, int]:
    """([N] the fold of each trajectory, how many): a task's are in one.

    Raises:
      UserError: if all are of one task; names the flag that fits values, and what to do instead.
    """
    group = _groups(trajectories)
    folds = min(_FOLDS, int(group.max()) + 1)
    if folds < 2:
        raise UserError(
            f"{flag} fits each task's values on the other tasks' episodes, and there is "
            f"one task only: explore more with --games, or use {instead}"
        )
    return group % folds, folds


def _groups(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[N] int32: trajectories of the same task have the same number."""
    _, group = np.unique([t.task for t in trajectories], return_inverse=True)
    return group.astype(np.int32)


def states(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[N, S] int32, in [0, N S): the state that each step left from.

    Steps of the same task with the same number read the same observation, word for word.
    """
    shape = (len(trajectories), scoring.max_steps(trajectories))
    number: dict[tuple[str, str], int] = {}
    found = np.zeros(shape, np.int32)
    for i, t in enumerate(trajectories):
        for k, step in enumerate(t.steps):
            found[i, k] = number.setdefault((t.task, step.observation.strip()), len(number))
    return found


def _step_places(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, ...]:
    """(rewards, mask, ends) [N, S]: a step counts if the policy wrote a token in it."""
    shape = (len(trajectories), scoring.max_steps(trajectories))
    rewards, mask = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i, t in enumerate(trajectories):
        rewards[i, : len(t.steps)] = [step.reward for step in t.steps]
        mask[i, [k for k in set(t.step_id) if k >= 0]] = 1
    return rewards, mask, mask


def _token_places(trajectories: Sequence[Trajectory]) -> tuple[np.ndarray, ...]:
    """(rewards, mask, ends) [N, T]: the tokens that the policy wrote."""
    shape = (len(trajectories), max(len(t.token_ids) for t in trajectories))
    rewards, mask, ends = (np.zeros(shape, np.float32) for _ in range(3))
    for i, t in enumerate(trajectories):
        last = {k: at for at, k in enumerate(t.step_id) if k >= 0}
        for k, at in last.items():
            rewards[i, at], ends[i, at] = t.steps[k].reward or 0.0, 1
        mask[i, : len(t.step_id)] = np.asarray(t.step_id) >= 0
    return rewards, mask, ends


def token_values(
    run: Forward,
    trajectories: Sequence[Trajectory],
    rows: RowsConfig,
    *,
    devices: int,
    lower_states: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """[N, T] V by (trajectory, position) at each token that the policy wrote, for `gae=token`.

    V is read where the token is predicted, so the value of a step's first token is the one that
    `gae=step` reads.

    Args:
      run: `ppo_update.make_token_values` with the policy as it is at the stage's start.
      trajectories: all N.
      rows: the static shape.
      devices: that share the work.
      lower_states: as in `make_update`.
    """
    packed = batching.pack(trajectories, **rows.packing)
    values = np.zeros((len(trajectories), max(len(t.token_ids) for t in trajectories)), np.float32)
    for part in batching.microbatches(packed, rows.rows_per_device, devices):
        lower = scoring.lower_states_in_rows(lower_states, range(len(trajectories)), part)
        values += gather_policy_tokens(run(part, lower), part, values.shape)
    return values


def less_kl(table: Table, kl: np.ndarray, ppo: PpoConfig, coefficient: float) -> Table:
    """The table of an update with `kl=reward`.

        r'_k = r_k - c_kl KL_k,   KL_k = sum of log pi(a_t) - log pi_ref(a_t) over step k's tokens

    pi is the policy at the update's start.  This estimate of the KL (k1), and not the loss term's
    k3, belongs into a reward: as a reward its policy gradient is that of the KL, k3's is not.
    Advantages and returns are linear in rewards, so what the KL adds is computed by itself; a
    group's baseline does not hold it, which adds no bias.

    Args:
      table: of the update's n episodes.
      kl: [n, K] at the ends of their steps, in nats.
      ppo: the objective.
      coefficient: c_kl.
    """
    paid = coefficient * kl
    with_critic = objectives.OBJECTIVES[ppo.objective].critic
    gae_lambda = ppo.gae_lambda if with_critic else 1.0
    minus, _ = advantages.step_gae(
        paid, np.zeros_like(paid), table.mask, gamma=ppo.gamma, gae_lambda=gae_lambda
    )
    return dataclasses.replace(
        table,
        rewards=table.rewards - paid,
        advantages=table.advantages - np.asarray(minus),
        returns=table.returns - np.asarray(minus),
    )


class Update(NamedTuple):
    """What an update is made from.

    Attributes:
      packed: its rows.
      batches: its microbatches, with a leading device axis.
      counts: its global counts, which normalise the loss.
      table: that of its episodes; None for `rft`.
      kl: the mean KL of its episodes, in nats; None without `kl=reward`.
    """

    packed: PackedRows
    batches: list[Any]
    counts: dict[str, float]
    table: Table | None
    kl: float | None = None


def make_update(
    trajectories: Sequence[Trajectory],
    table: Table,
    chosen: np.ndarray,
    rows: RowsConfig,
    ppo: PpoConfig,
    *,
    devices: int,
    lower_states: Sequence[np.ndarray] | None = None,
    log_probs: Forward | None = None,
    kl_coef: float | None = None,
) -> Update:
    """An update's microbatches, whitened over all its places.

    Args:
      trajectories: all N.
      table: of all N.
      chosen: [n] the update's.
      rows: the static shape.
      ppo: the objective.
      devices: that share the update.
      lower_states: of each trajectory, if layers are frozen (`scoring.lower_states`).
      log_probs: of the policy at the update's start, for `kl=reward`.
      kl_coef: the weight of the KL now; None: as the objective says.
    """
    packed = batching.pack([trajectories[i] for i in chosen], **rows.packing)
    counts = {"tokens": float(packed.token_mask.sum()), "steps": float(packed.step_mask.sum())}
    cut = list(batching.microbatches(packed, rows.rows_per_device, devices, rows.row_buckets))
    lower = [scoring.lower_states_in_rows(lower_states, chosen, part) for part in cut]
    table, mean = table.take(chosen), None
    if ppo.kl == "reward":
        assert log_probs is not None
        kl = sum(
            step_kl(log_probs(part, states), part, table, ppo)
            for part, states in zip(cut, lower, strict=True)
        )
        coefficient = ppo.kl_coef if kl_coef is None else kl_coef
        table = less_kl(table, np.asarray(kl), ppo, coefficient)
        mean = float(np.mean(np.sum(kl, -1)))
    given = by_place(table, ppo)
    put = _scatter_tokens if ppo.gae == "token" else batching.scatter_steps
    batches = []
    for part, states in zip(cut, lower, strict=True):
        in_slots = {name: put(values, part) for name, values in given.items()}
        batches.append(PpoBatch(rows=part, lower_states=states, **in_slots))
    return Update(packed, batches, counts, table, mean)


def won(trajectories: Sequence[Trajectory], source: object) -> list[Trajectory]:
    """The distinct won episodes: what rejection-sampling fine-tuning clones.

    Source: RFT, arXiv 2308.01825, section 3.3, which also keeps distinct samples only.

    Args:
      trajectories: episodes of exploration.
      source: their file, for the message.

    Raises:
      UserError: if none was won.
    """
    distinct = {(t.task, t.token_ids): t for t in reversed(trajectories) if t.success}
    if not distinct:
        raise UserError(
            f"{source}: none of the {len(trajectories)} episodes was won, so --objective=rft has "
            "nothing to clone: explore more (--games, --rollouts), start from a better base "
            "(--sft_epochs), or choose an objective that learns from lost episodes too"
        )
    return list(distinct.values())[::-1]


def uncertain(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The episodes of the tasks whose rewards are spread most: what `--objective=ragen` keeps."""
    final = np.array([t.final_reward for t in trajectories], np.float32)
    kept = ragen.most_uncertain(final, _groups(trajectories))
    return [t for t, keep in zip(trajectories, kept, strict=True) if keep]


def make_rft_update(
    trajectories: Sequence[Trajectory],
    chosen: np.ndarray,
    rows: RowsConfig,
    *,
    devices: int,
    lower_states: Sequence[np.ndarray] | None = None,
) -> Update:
    """As `make_update`, for the negative log-likelihood of the tokens that the policy wrote."""
    packed = batching.pack([trajectories[i] for i in chosen], **rows.packing)
    batches = [
        SftBatch(part, scoring.lower_states_in_rows(lower_states, chosen, part))
        for part in batching.microbatches(packed, rows.rows_per_device, devices, rows.row_buckets)
    ]
    return Update(packed, batches, {"tokens": float(packed.token_mask.sum())}, None)


def by_place(table: Table, ppo: PpoConfig) -> dict[str, np.ndarray]:
    """What a `PpoBatch` holds beside its rows, [n, K] each; advantages whitened where they are."""
    advantage = table.advantages
    if objectives.OBJECTIVES[ppo.objective].whiten:
        advantage = np.asarray(advantages.whiten(advantage, table.mask))
    return {"advantages": advantage, "returns": table.returns, "old_values": table.values}


def _places_of_tokens(rows: PackedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(used slots [..., R, P], trajectory [n], position in it [n]) of the rows' policy tokens."""
    used = np.asarray(rows.token_mask) > 0
    trajectory = np.take_along_axis(rows.step_trajectory, rows.token_step, -1)[used]
    position = np.take_along_axis(rows.positions, rows.token_index, -1)[used] + 1
    return used, trajectory, position


def _scatter_tokens(values: np.ndarray, rows: PackedRows) -> np.ndarray:
    """[..., R, P] from numbers [N, T] by (trajectory, position); 0 in unused slots."""
    used, trajectory, position = _places_of_tokens(rows)
    out = np.zeros(used.shape, values.dtype)
    out[used] = values[trajectory, position]
    return out


def gather_policy_tokens(
    values: np.ndarray, rows: PackedRows, shape: tuple[int, int]
) -> np.ndarray:
    """[N, T] by (trajectory, position) from numbers [..., R, P] in policy-token slots."""
    used, trajectory, position = _places_of_tokens(rows)
    out = np.zeros(shape, np.float32)
    out[trajectory, position] = np.asarray(values)[used]
    return out


def step_kl(log_probs: np.ndarray, rows: PackedRows, table: Table, ppo: PpoConfig) -> np.ndarray:
    """Each step's KL of a microbatch, at the step's end, for `less_kl`.

    Args:
      log_probs: [..., R, P] under the policy at the update's start.
      rows: the microbatch's rows, with the same leading axes.
      table: of the update's episodes, for its shape.
      ppo: where a step ends.

    Returns:
      [n, K], in nats; 0 for steps that are not in these rows.
    """
    per_step = np.zeros(np.shape(rows.step_mask), np.float32)
    *lead, slot = np.nonzero(np.asarray(rows.token_mask))
    log_ratio = np.asarray(log_probs) - rows.ref_log_probs
    at = (*lead, slot)
    np.add.at(per_step, (*lead, rows.token_step[at]), log_ratio[at])
    if ppo.gae == "step":
        return batching.gather_steps(per_step, rows, *table.mask.shape)[0]
    last = np.zeros_like(log_ratio)
    ends = _scatter_tokens(table.ends, rows) > 0
    last[ends] = np.take_along_axis(per_step, rows.token_step, -1)[ends]
    return gather_policy_tokens(last, rows, table.mask.shape)


def update_metrics(
    sums: Mapping[str, float], update: Update, trajectories: Sequence[Trajectory]
) -> dict[str, float]:
    """Means of an update, from its sums and global counts.

    Args:
      sums: of the loss function, with "grad_norm".
      update: what was computed.
      trajectories: the update's.

    Returns:
      name -> number; what the objective does not have (a value loss, advantages) is left out.
    """
    tokens, table = update.counts["tokens"], update.table
    metrics = {
        "grad_norm": sums["grad_norm"],
        "rollout_success": float(np.mean([t.success for t in trajectories])),
        "mean_steps": float(np.mean([len(t.steps) for t in trajectories])),
    }
    if table is None:
        return metrics | {"loss": sums["nll"] / tokens}
    metrics |= {
        "policy_loss": sums["policy_loss"] / tokens,
        "kl": sums["kl"] / tokens,
        "approx_kl": sums["approx_kl"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "clip_fraction": sums["clipped"] / tokens,
        "mean_ratio": sums["ratio"] / tokens,
        "effective_share": losses.effective_share(sums["ratio"], sums["ratio_squared"], tokens),
        "step_reward": float(table.rewards[table.ends > 0].mean()),
    }
    used = table.mask > 0
    if "value_loss" in sums:
        metrics["value_loss"] = sums["value_loss"] / used.sum()
    if "value_loss" in sums or table.values.any():
        returns, values = table.returns[used], table.values[used]
        left = float(np.var(returns - values) / max(np.var(returns), 1e-8))
        metrics["explained_variance"] = 1 - left
    return metrics
