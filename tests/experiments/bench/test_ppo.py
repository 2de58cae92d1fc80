"""The PPO subject: its work, its arithmetic of time and FLOP, and that both sides do the same."""

import dataclasses
import importlib
import pathlib

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.bench import ppo, ppo_sides, updates
from spa_jax.errors import UserError
from spa_jax.models import heads, transformer
from tests import tiny

INPUTS = pathlib.Path(__file__).parents[2] / "golden" / "released" / "timing_inputs.npz"
CONFIG = dataclasses.replace(tiny.tiny_config(), tie_embeddings=False)


@pytest.fixture
def parts():
    """The flags of the program, with the rehearsal's parts."""
    for name, value in {
        "parts": ["step", "ragged", "scoring"],
        "timing_inputs": str(INPUTS),
        "trajectories": "",
        "rounds": 1,
        "rehearsal": True,
    }.items():
        if name not in flags.FLAGS:
            kind = {list: flags.DEFINE_list, bool: flags.DEFINE_bool, int: flags.DEFINE_integer}
            kind.get(type(value), flags.DEFINE_string)(name, value, "")
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(parts=["step"], timing_inputs=str(INPUTS), rounds=1, rehearsal=True):
        yield


def test_the_timed_work_is_that_of_the_inputs():
    episodes = ppo.timing_inputs(INPUTS, 8192)
    with np.load(INPUTS) as arrays:
        ids, mask, scores = arrays["ids"], arrays["frag_mask"], arrays["scores"]
    assert len(episodes) == 8 and ppo._written(episodes) == 8 * mask.sum() == 1280
    for t, row, rewards in zip(episodes, ids, scores, strict=True):
        np.testing.assert_array_equal(t.token_ids, row)
        np.testing.assert_array_equal(np.asarray(t.step_id) >= 0, mask)
        np.testing.assert_allclose([s.reward for s in t.steps], rewards, rtol=1e-6)
        assert sorted({k for k in t.step_id if k >= 0}) == list(range(8))


def test_inputs_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        ppo.timing_inputs(tmp_path / "absent.npz", 8192)
    np.savez(tmp_path / "other.npz", ids=np.zeros((2, 4), int))
    with pytest.raises(UserError, match="array frag_mask is missing"):
        ppo.timing_inputs(tmp_path / "other.npz", 8192)
    np.savez(
        tmp_path / "odd.npz",
        ids=np.zeros((2, 4), int),
        frag_mask=np.array([0, 1, 0, 1]),
        scores=np.zeros((2, 3)),
    )
    with pytest.raises(UserError, match="do not fit each other"):
        ppo.timing_inputs(tmp_path / "odd.npz", 8192)


@pytest.mark.parametrize("length", [64, 70, 300, 2000])
def test_episodes_of_a_length(length):
    t = ppo.of_length("t", length, 50)
    assert len(t.token_ids) == len(t.step_id) == length and max(t.token_ids) < 50
    assert len(t.steps) == length // 64 == max(t.step_id) + 1
    assert sum(k >= 0 for k in t.step_id) == 20 * len(t.steps)


def test_calls_take_turns(monkeypatch):
    made, clock = [], iter(range(100))
    monkeypatch.setattr(updates.time, "perf_counter", lambda: next(clock))
    calls = {name: (lambda name=name: made.append(name)) for name in "abc"}
    times = updates.take_turns(calls, 2)
    assert "".join(made) == "abc" + "abc" + "bca"
    assert times == {name: [1, 1] for name in "abc"}


def test_a_ratio_is_the_median_of_the_rounds():
    assert updates.ratio([1.0, 2.0, 1.0], [2.0, 3.0, 9.0]) == 2.0
    times = {"f": [1.0, 2.0], "u": [5.0, 7.0]}
    assert ppo._added(times, ("f", 2), ("u", 1)) == [7.0, 11.0]


def test_flops_by_hand():
    params = jax.device_get(tiny.random_params(CONFIG))
    layers = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 3)
    size = CONFIG.num_heads * CONFIG.head_dim
    # Trajectories of 3 and 1 tokens see 1 + 2 + 3 and 1 keys; two products of `size` each.
    wanted = 2 * (4 * layers + 2 * CONFIG.vocab_size * CONFIG.hidden_size)
    wanted += 2 * 2 * CONFIG.num_layers * size * 7
    assert updates.forward_flops(CONFIG, params, [3, 1], 2) == wanted
    assert updates.update_flops(10.0, lora=False) == 30
    assert updates.update_flops(10.0, lora=True) == 20


def test_the_timed_model_has_as_many_parameters_as_the_released_one():
    shapes = jax.eval_shape(lambda: transformer.init(ppo.TIMED, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 7_096_576


def test_without_pytorch_it_says_what_to_install(parts, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match="make setup-peers"):
        ppo.run()


def test_a_part_that_there_is_not_is_refused(parts):
    with flagsaver.flagsaver(parts=["stop"]), pytest.raises(UserError, match="--parts=stop"):
        ppo.run()


@pytest.mark.parametrize("lora", [False, True])
def test_both_sides_compute_the_same(lora):
    """The first gradient, before and after an optimiser step, and log-probabilities and values."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    params = jax.tree.map(lambda x: 0.2 * x, tiny.random_params(CONFIG))
    episodes = [ppo.of_length(f"t{i}", n, CONFIG.vocab_size) for i, n in enumerate((70, 130, 64))]
    rows = ppo._rows_for(episodes, 128, 2)
    sides = ppo_sides.make(episodes, rows, group=2, config=CONFIG, params=params, lora=lora)
    ours, theirs = ppo_sides.Ours(sides), ppo_sides.Theirs(sides)
    scores = ours.forward()
    for everywhere in (False, True):
        (log_probs, values), *_ = theirs.forward(everywhere=everywhere)
        chosen = sides.groups[0]
        wanted = [scores.log_probs[i][np.asarray(episodes[i].step_id) >= 0] for i in chosen]
        np.testing.assert_allclose(log_probs, np.concatenate(wanted), atol=1e-4)
        wanted = [scores.values[i, : len(episodes[i].steps)] for i in chosen]
        np.testing.assert_allclose(values, np.concatenate(wanted), atol=1e-4)
    for _ in range(2):  # weights have moved before the second
        norm = ours.update()
        assert theirs.update(everywhere=False) == pytest.approx(norm, rel=1e-3)
    assert theirs.update(everywhere=True) == pytest.approx(ours.update(), rel=1e-3)


def test_heads_are_read_as_they_are():
    torch = pytest.importorskip("torch")
    from experiments.bench import ppo_peer

    params = ppo_sides.random_head(heads.Head, 16)
    hidden = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    theirs = ppo_peer.head(params)(torch.tensor(hidden))[:, 0].detach()
    np.testing.assert_allclose(theirs, heads.read(params, hidden), atol=1e-5)


def test_other_work_is_not_compared():
    ppo_sides.check_same(1.0, 1.001)
    for other in (1.01, float("nan")):
        with pytest.raises(AssertionError, match="the gradients differ"):
            ppo_sides.check_same(1.0, other)


def test_a_rehearsal_ends_with_the_ratios(parts, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    with flagsaver.flagsaver(parts=["step", "ragged", "scoring"]):
        ppo.run()
    *_, last = capsys.readouterr().out.splitlines()
    figures = dict(part.split("=") for part in last.split()[1:])
    assert last.startswith("RESULT ")
    for name in (
        "full_step",
        "full_update",
        "lora_step",
        "ragged",
        "ragged_minibatches",
        "scoring_time_of_plain",
    ):
        assert float(figures[name]) > 0
