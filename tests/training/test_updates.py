"""The update functions: an update is the same however its batch was dealt out.

Tolerances: gradients and losses are sums in float32 whose order differs, so they agree to
1e-5 relative to the largest entry; parameters after Adam, whose step is divided by the
gradient's own size, to 2e-3 of the learning rate for all but entries whose gradient is rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spa_jax import batching
from spa_jax.config import RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads, tree
from spa_jax.stage_config import PpoConfig
from spa_jax.training import (
    estimator_data,
    estimator_update,
    partition,
    ppo_data,
    ppo_update,
    scoring,
    sft_update,
)
from spa_jax.training import state as state_lib
from tests import tiny

CONFIG = tiny.tiny_config()
ROWS = RowsConfig(row_length=48, policy_slots=24, step_slots=8, rows_per_device=1)
PPO = PpoConfig(kl_coef=0.1, entropy_coef=0.01, value_coef=0.5)
RATE = 0.1
SGD = state_lib.Guarded(*optax.sgd(RATE))  # no gradient here is infinite


def _episodes(count: int = 9):
    rng = np.random.default_rng(3)
    return [
        tiny.random_trajectory(rng, f"task_{i}", steps=1 + i % 3, context=8) for i in range(count)
    ]


def _params():
    hidden = jnp.zeros((1, CONFIG.hidden_size))
    value = heads.Head(width=8).init(jax.random.key(1), hidden)["params"]
    value["out"]["kernel"] = jnp.ones_like(value["out"]["kernel"]) * 0.3  # not 0 from the start
    return {"policy": tiny.tiny_params(CONFIG), "value": value}


def _pack(episodes, rows: RowsConfig = ROWS):
    return batching.pack(episodes, **rows.packing)


def _ppo_batches(episodes, rows: RowsConfig, devices: int):
    """As `train_ppo` makes them, from given values."""
    steps = max(len(t.steps) for t in episodes)
    values = np.random.default_rng(4).normal(size=(len(episodes), 4)).astype(np.float32)
    table = ppo_data.make_table(episodes, values[:, :steps], PPO)
    made = ppo_data.make_update(
        episodes, table, np.arange(len(episodes)), rows, PPO, devices=devices
    )
    return made.batches, made.counts


def _sft(devices: int, rows: RowsConfig):
    packed = _pack(_episodes(), rows)
    cut = batching.microbatches(packed, rows.rows_per_device, devices)
    batches = [sft_update.SftBatch(batch) for batch in cut]
    counts = {"tokens": float(packed.token_mask.sum())}
    return sft_update.make_loss(CONFIG), {"policy": _params()["policy"]}, batches, counts


def _ppo(devices: int, rows: RowsConfig):
    batches, counts = _ppo_batches(_episodes(), rows, devices)
    return ppo_update.make_loss(CONFIG, PPO, 0.7), _params(), batches, counts


def _estimator(devices: int, rows: RowsConfig, kind: str = "answer", members: int = 2):
    rng = np.random.default_rng(5)
    count, steps, size = 9, 3, CONFIG.hidden_size
    features = estimator_update.StepFeatures(
        hidden=rng.normal(size=(count, steps, size)).astype(np.float32),
        start=rng.normal(size=(count, size)).astype(np.float32),
        step_mask=(np.arange(steps) < rng.integers(1, 4, (count, 1))).astype(np.float32),
        final_reward=rng.integers(0, 2, count).astype(np.float32),
    )
    progress = estimator_update.init(
        kind, 8, members, key=jax.random.key(2), features=features, clock={}
    )
    progress = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) * 0.3 if "out" in jax.tree_util.keystr(path) else x,
        progress,
    )
    per_batch = devices * rows.rows_per_device
    batches = [
        estimator_data.feature_batch(
            features, np.arange(i, min(i + per_batch, count)), per_batch, devices
        )
        for i in range(0, count, per_batch)
    ]
    return estimator_update.make_loss(0.7), {"progress": progress}, batches, {"trajectories": count}


UPDATES = {"sft": _sft, "estimator": _estimator, "ppo": _ppo}
# (devices or mesh, rows a device a microbatch): on one device, on several with accumulation,
# with parameters in parts, and with the work on a row in parts too.
DEALS = [(1, 9), (2, 1), (8, 1), ((2, 4), 1), ((1, 2), 1), ((2, 2, 2), 1), ((1, 1, 2), 1)]


def _trainer(deal, loss_fn, optimizer, frozen=None):
    if isinstance(deal, tuple):
        return partition.Mesh(loss_fn, optimizer, deal, frozen=frozen)
    return partition.Pmap(loss_fn, optimizer, deal, frozen=frozen)


def _updated(make, deal, rows_per_device: int, optimizer=SGD):
    """(metrics, parameters before, state) after one update of all nine episodes."""
    rows = dataclasses.replace(ROWS, rows_per_device=rows_per_device)
    devices = deal[0] * deal[1] if isinstance(deal, tuple) else deal
    loss_fn, params, batches, counts = make(devices, rows)
    trainer = _trainer(deal, loss_fn, optimizer)
    assert trainer.devices == devices
    state = trainer.replicate(state_lib.create(params, optimizer))
    state, metrics = trainer.update(state, batches, counts)
    if isinstance(trainer, partition.Pmap):
        for leaf in jax.tree.leaves(jax.device_get(state)):
            assert (np.asarray(leaf) == np.asarray(leaf)[:1]).all(), "the devices' copies differ"
    return metrics, params, jax.device_get(trainer.unreplicate(state))


def _close(ours, theirs, tolerance: float = 1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", UPDATES)
def test_dealing_the_batch_out_changes_nothing(name):
    """Loss sums, the gradient (SGD's move) and so the parameters, under pmap and on meshes."""
    one = None
    for deal in DEALS:
        metrics, before, after = _updated(UPDATES[name], *deal)
        move = jax.tree.map(lambda a, b: (a - b) / RATE, after.params, before)
        assert int(after.update) == 1 and int(after.skipped) == 0
        if one is None:
            one = (metrics, move)
            assert metrics["grad_norm"] > 1e-3
            continue
        assert metrics.keys() == one[0].keys()
        for key, value in metrics.items():
            assert value == pytest.approx(one[0][key], rel=2e-5, abs=2e-5), (deal, key)
        _close(move, one[1], 2e-4)  # a difference of parameters: their rounding over the move


def test_nor_does_it_where_the_factors_of_products_are_rounded(monkeypatch):
    """Up to a factor that a sum in another order rounds the other way."""
    compute = dataclasses.replace(CONFIG.compute, matmul_dtype="bfloat16")
    rounded = dataclasses.replace(CONFIG, compute=compute)
    monkeypatch.setattr(f"{__name__}.CONFIG", rounded)
    moves = []
    for deal in ((1, 9), (2, 1), ((2, 4), 1)):
        metrics, before, after = _updated(_sft, *deal)
        moves.append(jax.tree.map(lambda a, b: (a - b) / RATE, after.params, before))
        _close(moves[-1], moves[0], 1e-2)
    monkeypatch.undo()
    exact, before, after = _updated(_sft, 1, 9)
    assert metrics["nll"] != pytest.approx(exact["nll"], rel=1e-6), "nothing was rounded"
    assert metrics["nll"] == pytest.approx(exact["nll"], rel=1e-2)


def _same_opening(episodes, ids=(5, 6, 7, 8, 9)):
    """The episodes, each behind the same instruction."""
    n = len(ids)
    return [
        dataclasses.replace(
            t,
            token_ids=(*ids, *t.token_ids),
            step_id=(-1,) * n + tuple(t.step_id),
            log_probs=(0.0,) * n + tuple(t.log_probs),
            ref_log_probs=None,
        )
        for t in episodes
    ]


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_shared_instruction_changes_nothing_but_the_work(name, monkeypatch):
    opened = _same_opening(_episodes())
    monkeypatch.setattr(f"{__name__}._episodes", lambda: opened)
    found = {}
    for share in (False, True):
        rows = dataclasses.replace(ROWS, share_prefix=share)
        packed = _pack(opened, rows)
        assert (packed.segment_ids == batching.SHARED).any() == share
        loss_fn, params, batches, counts = UPDATES[name](1, rows)
        trainer = partition.Pmap(loss_fn, SGD, 1)
        state, metrics = trainer.update(
            trainer.replicate(state_lib.create(params, SGD)), batches, counts
        )
        move = jax.tree.map(
            lambda a, b: (a - b) / RATE, jax.device_get(partition.unreplicate(state.params)), params
        )
        found[share] = metrics, move, int((packed.segment_ids != 0).sum())
    assert found[True][2] < found[False][2]
    for key, value in found[True][0].items():
        assert value == pytest.approx(found[False][0][key], rel=2e-5, abs=2e-5), key
    _close(found[True][1], found[False][1], 2e-4)


def test_scores_behind_a_shared_instruction():
    opened = _same_opening(_episodes())
    kinds = [dataclasses.replace(ROWS, share_prefix=share) for share in (True, False)]
    ours, theirs = (
        scoring.score(CONFIG, _params(), opened, rows, temperature=0.7, title="scores")
        for rows in kinds
    )
    for name in ("end_hidden", "value_hidden", "values", "step_mask"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5)
    for a, b in zip(ours.log_probs, theirs.log_probs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_scores_are_the_same_where_lower_states_are_asked_for():
    opened, params = _same_opening(_episodes()), _params()
    plain, both = (
        scoring.score(
            CONFIG, params, opened, ROWS, temperature=0.7, title="scores", train_layers=layers
        )
        for layers in (0, 1)
    )
    assert plain.lower_states is None
    for name in ("end_hidden", "value_hidden", "values", "step_mask"):
        np.testing.assert_allclose(getattr(both, name), getattr(plain, name), atol=1e-5)
    for a, b in zip(both.log_probs, plain.log_probs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    frozen = {"policy": tree.split(CONFIG, params["policy"], 1)[1]}
    wanted = scoring.lower_states(
        CONFIG, partition.Pmap(None, SGD, frozen=frozen), opened, ROWS, title="lower"
    )
    for a, b in zip(both.lower_states, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_adam_too(name="estimator"):
    optimizer = state_lib.adamw(RATE, clip_norm=1.0, weight_decay=0.01)
    _, before, one = _updated(UPDATES[name], 1, 9, optimizer)
    _, _, eight = _updated(UPDATES[name], 8, 1, optimizer)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.params, before)
    assert max(jax.tree.leaves(moved)) > RATE / 2
    _close(eight.opt_state, one.opt_state, 1e-4)
    wrong = [
        np.mean(np.abs(a - b) > 2e-3 * RATE)
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True)
    ]
    assert max(wrong) < 0.01


# --- the loss ---------------------------------------------------------------------------------


def test_a_step_whose_reward_is_zero_is_a_step():
    """It is counted, whitened over, trained on, and it discounts what comes after it."""
    rng = np.random.default_rng(9)
    episode = tiny.random_trajectory(rng, steps=3)
    steps = [
        dataclasses.replace(s, reward=r) for s, r in zip(episode.steps, (0, 0, 1), strict=True)
    ]
    episode = dataclasses.replace(episode, steps=tuple(steps))
    ppo = PpoConfig(gamma=0.5, gae_lambda=1.0)
    table = ppo_data.make_table([episode], np.zeros((1, 3), np.float32), ppo)
    np.testing.assert_allclose(table.returns, [[0.25, 0.5, 1.0]])
    _, (batch,), counts, *_ = ppo_data.make_update(
        [episode], table, np.array([0]), dataclasses.replace(ROWS, row_length=64), ppo, devices=1
    )
    assert counts == {"tokens": sum(s >= 0 for s in episode.step_id), "steps": 3}
    white = (np.array([0.25, 0.5, 1.0]) - 7 / 12) / np.std([0.25, 0.5, 1.0])
    np.testing.assert_allclose(batch.advantages[0, 0, :3], white, rtol=1e-5)
    assert batch.rows.step_mask.sum() == 3


def test_the_ppo_loss_by_hand(monkeypatch):
    """One row, two steps, three tokens; every number below is worked out on paper.

    Tokens 0 and 1 belong to step 0 (A = 1), token 2 to step 1 (A = -2).  Ratios 1.5 (clipped
    to 1.2), 1, 0.5 (clipped to 0.8):  -1.2, -1, +1.6  -> sum -0.6.
    Values 0.5 and 0 against old ones 0 and 0, returns 1 and -1, clip 0.2:
    1/2 (max(0.25, 0.64) + max(1, 1)) = 0.82.
    """
    packed = batching.empty(1, 8, 4, 2)
    packed.token_mask[0, :3] = 1
    packed.token_step[0, :3] = [0, 0, 1]
    packed.targets[0, :3] = [1, 1, 1]
    packed.step_mask[0] = 1
    p = np.array([0.3, 0.4, 0.2])  # pi(token)
    packed.log_probs[0, :3] = np.log(p / [1.5, 1.0, 0.5])
    packed.ref_log_probs[0, :3] = np.log(p * [1, 2, 1])
    logits = np.zeros((1, 4, 2), np.float32)
    logits[0, :3] = np.log(np.stack([1 - p, p], -1))
    monkeypatch.setattr(ppo_update.forward, "rows_hidden", lambda *_: jnp.zeros((1, 8, 1)))
    monkeypatch.setattr(ppo_update.forward, "policy_logits", lambda *_: jnp.asarray(logits))
    monkeypatch.setattr(ppo_update.heads, "read", lambda *_: jnp.array([[0.5, 0.0]]))
    batch = ppo_update.PpoBatch(
        rows=packed,
        advantages=np.array([[1.0, -2.0]], np.float32),
        returns=np.array([[1.0, -1.0]], np.float32),
        old_values=np.zeros((1, 2), np.float32),
    )
    ppo = PpoConfig(clip=0.2, value_clip=0.2, value_coef=0.1, kl_coef=0.3, entropy_coef=0.01)
    loss, sums = ppo_update.ppo_loss(
        _params(),
        {},
        batch,
        {"tokens": 3.0, "steps": 2.0},
        config=CONFIG,
        ppo=ppo,
        temperature=1.0,
    )
    entropy = -np.sum(p * np.log(p) + (1 - p) * np.log(1 - p))
    kl = 2 - 1 - np.log(2)
    assert float(sums["policy_loss"]) == pytest.approx(-0.6, abs=1e-5)
    assert float(sums["value_loss"]) == pytest.approx(0.82, abs=1e-5)
    assert float(sums["kl"]) == pytest.approx(kl, abs=1e-5)
    assert float(sums["entropy"]) == pytest.approx(entropy, abs=1e-5)
    assert float(sums["ratio"]) == pytest.approx(3.0, abs=1e-5)
    # "clipped" counts where the clipped term is the larger loss: tokens 0 and 2.
    assert float(sums["clipped"]) == 2
    wanted = -0.6 / 3 + 0.1 * 0.82 / 2 + 0.3 * kl / 3 - 0.01 * entropy / 3
    assert float(loss) == pytest.approx(wanted, abs=1e-5)


# --- frozen layers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_top_layers_learn_alone_what_they_learn_in_the_whole_model(name, monkeypatch):
    """Same sums and the same move, though the frozen part was computed in other rows."""
    opened = _same_opening(_episodes())
    monkeypatch.setattr(f"{__name__}._episodes", lambda: opened)
    rows = dataclasses.replace(ROWS, row_length=64)
    loss_fn, params, batches, counts = UPDATES[name](2, rows)
    trained, frozen = tree.split(CONFIG, params["policy"], 1)
    whole = tree.join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params["policy"])
    jax.tree.map(np.testing.assert_array_equal, whole, params["policy"])

    def updated(parts, frozen, batches):
        trainer = partition.Pmap(loss_fn, SGD, 2, frozen=frozen)
        state = trainer.replicate(state_lib.create(parts, SGD))
        state, metrics = trainer.update(state, batches, counts)
        after = jax.device_get(partition.unreplicate(state.params))
        return metrics, jax.tree.map(lambda a, b: (a - b) / RATE, after, parts)

    metrics, move = updated(params, None, batches)
    parts, frozen = params | {"policy": trained}, {"policy": frozen}
    lower_states = scoring.lower_states(
        CONFIG,
        partition.Pmap(None, SGD, frozen=frozen),
        opened[::-1],
        dataclasses.replace(rows, row_length=100, policy_slots=60, step_slots=20),
        title="lower",
    )[::-1]
    assert [len(b) for b in lower_states] == [len(t.token_ids) for t in opened]
    from_lower = [
        dataclasses.replace(b, lower_states=batching.scatter_tokens(lower_states, b.rows))
        for b in batches
    ]
    top_metrics, top_move = updated(parts, frozen, from_lower)
    for key in metrics.keys() - {"grad_norm"}:
        assert top_metrics[key] == pytest.approx(metrics[key], rel=2e-5, abs=2e-5), key
    assert 1e-3 < top_metrics["grad_norm"] < metrics["grad_norm"]
    move["policy"] = tree.split(CONFIG, move["policy"], 1)[0]
    _close(top_move, move, 2e-4)


def test_a_model_without_a_layer_to_freeze_is_refused():
    layers = CONFIG.num_layers
    with pytest.raises(UserError, match=f"{layers} layers to train: the model has {layers}"):
        tree.split(CONFIG, _params()["policy"], layers)


# --- the state ------------------------------------------------------------------------------


@pytest.mark.parametrize("deal", [2, (1, 2)], ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_leaves_the_state_untouched(poison, deal):
    optimizer = state_lib.adamw(RATE, clip_norm=1.0, weight_decay=0.01)
    loss_fn, params, batches, counts = _estimator(2, ROWS)
    trainer = _trainer(deal, loss_fn, optimizer)
    state = trainer.replicate(state_lib.create(params, optimizer))
    state, _ = trainer.update(state, batches, counts)
    before = jax.device_get(trainer.unreplicate(state))
    bad = jax.tree.map(np.array, batches)
    bad[1].hidden[1, 0, 0, 0] = poison  # one number, on the second device
    state, metrics = trainer.update(state, bad, counts)
    after = jax.device_get(trainer.unreplicate(state))
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)
    assert (after.update, after.skipped) == (2, 1)
    state, metrics = trainer.update(state, batches, counts)  # and it goes on
    last = jax.device_get(trainer.unreplicate(state))
    assert np.isfinite(metrics["grad_norm"]) and last.skipped == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), last.params, after.params)
    assert any(jax.tree.leaves(moved))


def test_nor_does_a_ppo_batch():
    optimizer = state_lib.adamw(RATE, clip_norm=1.0, weight_decay=0.0)
    loss_fn, params, batches, counts = _ppo(2, ROWS)
    trainer = partition.Pmap(loss_fn, optimizer, 2)
    bad = jax.tree.map(np.array, batches)
    bad[0].rows.log_probs[1, 0, 0] = np.nan
    state = trainer.replicate(state_lib.create(params, optimizer))
    state, metrics = trainer.update(state, bad, counts)
    after = jax.device_get(trainer.unreplicate(state))
    assert (after.update, after.skipped) == (1, 1) and not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after.params, params)


@pytest.mark.parametrize("deal", [2, (1, 2)], ids=str)
def test_an_update_compiles_once_moves_nothing_unasked_and_donates_its_state(deal):
    """Counted are all programs that XLA is asked for; a transfer that nobody named raises."""
    optimizer = state_lib.adamw(RATE, clip_norm=1.0, weight_decay=0.0)
    loss_fn, params, batches, counts = _estimator(2, ROWS)
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    trainer = _trainer(deal, loss_fn, optimizer)
    state = trainer.replicate(state_lib.create(params, optimizer))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state, _ = trainer.update(state, batches, counts)
        first = len(compiled)
        with jax.transfer_guard("disallow"):
            for count in (9, 3):
                old = state
                state, _ = trainer.update(state, batches, {"trajectories": count})
                assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        assert len(compiled) == first > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert int(jax.device_get(trainer.unreplicate(state)).update) == 3


# --- meshes ---------------------------------------------------------------------------------


def test_a_mesh_holds_each_parameter_and_its_moments_in_parts():
    optimizer = state_lib.adamw(RATE, clip_norm=1.0, weight_decay=0.0)
    trainer = partition.Mesh(sft_update.make_loss(CONFIG), optimizer, (2, 4))
    params = {"policy": _params()["policy"]}
    state = trainer.replicate(state_lib.create(params, optimizer))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    device = jax.local_devices()[3]
    here = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    assert whole / 4 <= here < whole / 3.5
    kernel = state.params["policy"]["layers"]["gate"]["kernel"]  # [2 layers, 32, 64]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 64)
    jax.tree.map(np.testing.assert_array_equal, trainer.unreplicate(state).params, params)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    trainer = partition.Mesh(sft_update.make_loss(CONFIG), SGD, (1, 3))
    with pytest.raises(UserError, match=r"--mesh=fsdp:3 does not divide the 32 of policy/.*\["):
        trainer.create({"policy": _params()["policy"]})


def test_the_mesh_flag():
    shape = partition.mesh_shape
    assert shape("data:2,fsdp:4", 8) == (2, 4, 1) and shape("fsdp:4", 8) == (1, 4, 1)
    assert shape("", 8) == (8, 1, 1) and shape("fsdp:2, data:3", 8) == (3, 2, 1)
    assert shape("tensor:2,fsdp:4", 8) == (1, 4, 2)
    assert shape("fsdp:*", 8) == (1, 8, 1) and shape("fsdp:*,tensor:2,data:2", 8) == (2, 2, 2)
    bad_ones = ("data", "data:0", "data:two", "model:2", "data:2,data:2", "data:-1")
    for bad in (*bad_ones, "data:*,fsdp:*"):
        with pytest.raises(UserError, match="data:A,fsdp:B,tensor:C"):
            shape(bad, 8)
    for most in ("data:3,fsdp:3", "fsdp:4,tensor:4"):
        with pytest.raises(UserError, match="there are 8"):
            shape(most, 8)
