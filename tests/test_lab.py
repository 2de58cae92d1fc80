"""The lab's base policy: its folder is one that every stage reads."""

import dataclasses
import json

import pytest

from spa_jax import chat, lab, policy, provenance, store
from spa_jax.errors import UserError
from tests import runs

SMALL = lab.LabConfig(layers=2, width=32, heads=2, feed_forward=48, vocabulary=300)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(run, folder) of a policy that SFT starts from."""
    run = runs.make(tmp_path_factory.mktemp("making"), "", seed=3)
    run = dataclasses.replace(run, policy=str(run.workdir / "start"))
    runs.demonstrate(run)
    lab.write_start(run, SMALL)
    return run, run.workdir / "start"


def test_the_start_is_a_policy_with_a_chat_format(start):
    run, folder = start
    found = policy.load(folder)
    assert dataclasses.replace(found.config, compute=SMALL.model.compute) == SMALL.model
    assert (found.config.num_kv_heads, found.config.head_dim) == (1, 16)
    names = found.tokenizer.convert_ids_to_tokens([0, 1, 2])
    assert names == ["<|user|>", "<|assistant|>", "<|end|>"] and found.chat.end_of_turn == 2
    demo = next(t for t in store.read(run.demonstrations("train")) if len(t.steps) == 2)
    ids = chat.encode_trajectory(found.chat, demo).token_ids
    text = found.tokenizer.decode(ids)
    see, take = demo.steps[0].observation, demo.steps[0].response
    turns = [f"Do it.\n\n{see}<|assistant|>{take}<|end|>", f"{see}<|assistant|>{take}<|end|>"]
    assert text == "<|user|>" + "<|user|>".join(turns)
    assert len(ids) < len(text) / 2  # what the texts repeat was merged


def test_any_text_can_be_written(start):
    found = policy.load(start[1])
    odd = "Ünïcode <|end|> \x00 7"
    assert 2 not in found.chat.next_turn(odd)
    assert found.chat.decode(found.chat.response(odd)) == odd


def test_the_start_is_the_same_for_the_same_seed(start, tmp_path):
    run, folder = start
    for seed, same in ((3, True), (4, False)):
        other = runs.make(tmp_path / str(seed), tmp_path / str(seed) / "start", seed=seed)
        runs.demonstrate(other)
        lab.write_start(other, SMALL)
        digests = {provenance.policy_digest(path) for path in (folder, other.policy)}
        assert (len(digests) == 1) is same


def test_what_is_made_is_not_made_again(start, tmp_path):
    _, folder = start
    out = folder.rename(tmp_path / "lab")
    record = {
        "settings": dataclasses.asdict(SMALL),
        "seed": 3,
        "digest": provenance.policy_digest(out),
    }
    (out / lab.RECORD).write_text(json.dumps(record))
    assert lab.make(out, SMALL, 3) == record
    with pytest.raises(UserError, match="--updates was 1200, is 7; --seed was 3, is 4.*another --"):
        lab.make(out, dataclasses.replace(SMALL, updates=7), 4)
    (out / lab.RECORD).write_text(json.dumps(record | {"digest": "0"}))
    with pytest.raises(UserError, match="its weights are not those"):
        lab.make(out, SMALL, 3)
    (out / lab.RECORD).unlink()
    with pytest.raises(UserError, match="holds another policy"):
        lab.make(out, SMALL, 3)


def test_what_is_begun_goes_on_with_its_own_settings_alone(tmp_path):
    asked = {"settings": dataclasses.asdict(SMALL), "seed": 0}
    (tmp_path / "lab" / "making").mkdir(parents=True)
    (tmp_path / "lab" / "making" / lab.RECORD).write_text(json.dumps(asked))
    with pytest.raises(UserError, match="--games was 5000, is 9"):
        lab.make(tmp_path / "lab", dataclasses.replace(SMALL, games=9), 0)


def test_no_two_splits_or_seeds_share_a_generator(tmp_path):
    seeds = [
        command[command.index("--seed") + 1]
        for horizon in ("8", "16", "32")
        for seed in (0, 1)
        for command in lab.commands(tmp_path, lab.LabConfig(horizon=horizon), seed)
    ]
    assert len(set(seeds)) == len(seeds) == 18


def test_shapes_that_cannot_be_are_refused():
    for wrong in ({"heads": 3}, {"heads": 16}, {"width": 100}):
        with pytest.raises(UserError, match="--heads=.*--width="):
            lab.LabConfig(**wrong)
