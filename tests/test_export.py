"""A trained policy written for other programs, and read back: the logits stay the same.

Where PyTorch, transformers and PEFT are installed, they load what was written.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from spa_jax import annotation, files, policy, provenance, store
from spa_jax.config import LORA_TARGETS, LoraConfig
from spa_jax.errors import UserError
from spa_jax.export import export
from spa_jax.models import heads, lora, transformer
from spa_jax.models.io import huggingface, tensors
from spa_jax.run import Run
from spa_jax.stages import annotate
from spa_jax.training import trainable
from tests import runs, tiny

MODELS = {
    "tied": tiny.tiny_config(),
    "untied": tiny.tiny_config(tied=False),
    "biased": dataclasses.replace(tiny.tiny_config(), model_type="qwen2", qkv_bias=True),
}
TOKENS = np.random.default_rng(0).integers(3, 384, (2, 9)).astype(np.int32)
AT = np.broadcast_to(np.arange(9, dtype=np.int32), TOKENS.shape)


def _logits(config, params) -> np.ndarray:
    hidden = transformer.hidden_states(config, params, TOKENS, AT, np.ones_like(TOKENS))
    return np.asarray(transformer.logits(params, hidden))


def _noise(tree, scale: float = 0.1):
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: np.asarray(x + scale * rng.normal(size=x.shape).astype(np.float32)), tree
    )


def _head(module):
    return _noise(module.init(jax.random.key(0), jnp.zeros((1, 32)))["params"])


def _write_run(run: Run, model: str, settings: LoraConfig) -> np.ndarray:
    """A base policy, and a round's policy with heads as the stages write them; its logits."""
    config, here = MODELS[model], run.round(0)
    params = _noise(tiny.tiny_params(config), 0.02)  # biases too
    tokenizer = tiny.tiny_tokenizer(run.workdir / "tokenizer")
    huggingface.save_pretrained(run.base, config, params, tokenizer)
    made = trainable.make(policy.load(run.base), lora=settings, seed=0)
    trained = _noise(made.parts.trained)
    made.save(here.policy, trained=trained, heads={"value": _head(heads.Head(8))}, version=7)
    here.progress.mkdir()
    tensors.save_heads(here.progress, {"progress": _head(heads.Head(16))})
    files.mark_done(here.progress, 0.0, trunk="../../sft/policy")
    if not settings.rank:
        return _logits(config, trained["policy"])
    return _logits(config, lora.attach(settings, params, trained["adapter"]))


@pytest.fixture(scope="module", params=MODELS)
def finished(request, tmp_path_factory):
    """(a run, its adapters, the logits of its policy while it was trained)."""
    run = runs.make(tmp_path_factory.mktemp(request.param))
    settings = LoraConfig(rank=3, alpha=6.0, targets=LORA_TARGETS)
    return run, settings, _write_run(run, request.param, settings)


@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_what_is_written_comes_back_in(finished, adapter, tmp_path):
    run, _, logits = finished
    out = tmp_path / "out"
    assert export(run.round(0).ppo, out, adapter=adapter) == ["progress", "value"]
    read = policy.load(out)
    np.testing.assert_allclose(_logits(read.config, read.params), logits, atol=2e-5)
    value = policy.load(run.round(0).policy).heads["value"]
    jax.tree.map(np.testing.assert_array_equal, read.heads["value"], value)
    progress = tensors.load_heads(run.round(0).progress)["progress"]
    jax.tree.map(np.testing.assert_array_equal, read.heads["progress"], progress)
    assert read.version == 7
    assert read.trunk == str(run.base)  # the head's; not this policy
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    again = tmp_path / "again"
    export(out, again, adapter=adapter)  # an exported folder is a policy like any other
    for file in ("heads/heads.safetensors", "spa_jax.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_a_model_card_says_what_it_is_and_names_no_folder_of_ours(finished, tmp_path):
    run, _, logits = finished
    provenance.record_run(run, "run_spa", ["run_spa", f"--workdir={run.workdir}"])
    won = {"games": 100, "successes": 57, "low": 0.472, "high": 0.663}
    files.write_json(run.evaluation("spa") / "summary.json", {"success": won, "grounding": 0.9})
    export(run.round(0).ppo, tmp_path / "agent", dtype="bfloat16")
    card = (tmp_path / "agent" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# agent" in card
    assert "| spa | 100 | 57 | 47.2 - 66.3% | 0.900 |" in card and "jax " in card
    for file in (tmp_path / "agent").rglob("*"):
        assert file.is_dir() or str(run.workdir).encode() not in file.read_bytes(), file
    stored = safetensors.numpy.load_file(tmp_path / "agent" / "model.safetensors")
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    read = policy.load(tmp_path / "agent")
    np.testing.assert_allclose(_logits(read.config, read.params), logits, atol=0.05)


def test_the_files_are_named_as_transformers_and_peft_name_them(finished, tmp_path):
    run, settings, _ = finished
    for adapter in (False, True):
        export(run.round(0).ppo, tmp_path / str(adapter), adapter=adapter)
    merged = safetensors.numpy.load_file(tmp_path / "False" / "model.safetensors")
    base = safetensors.numpy.load_file(run.base / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {
        k: (v.shape, np.dtype(np.float32)) for k, v in base.items()
    }
    settings_file = json.loads((tmp_path / "True" / "adapter_config.json").read_text())
    assert settings_file["base_model_name_or_path"] == str(run.base)
    assert (settings_file["r"], settings_file["lora_alpha"]) == (3, 6)
    assert settings_file["target_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    written = safetensors.numpy.load_file(tmp_path / "True" / "adapter_model.safetensors")
    assert len(written) == 2 * 7 * 2
    for letter, shape in (("A", (3, 64)), ("B", (32, 3))):
        name = f"base_model.model.model.layers.1.mlp.down_proj.lora_{letter}.weight"
        assert (written[name].shape, written[name].dtype) == (shape, np.float32)
    product = written[name] @ written[name.replace("lora_B", "lora_A")] * settings.scale
    kernel = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_allclose(merged[kernel], base[kernel] + product, atol=1e-5)


def test_transformers_loads_the_folder(finished, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    run, _, logits = finished
    export(run.round(0).ppo, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(theirs, logits, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "look"}], tokenize=False)
    assert "<|im_start|>user\nlook<|im_end|>" in chat


def test_peft_loads_the_adapter(finished, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    run, _, logits = finished
    export(run.round(0).ppo, tmp_path / "out", adapter=True)
    named = peft.PeftConfig.from_pretrained(str(tmp_path / "out")).base_model_name_or_path
    base = transformers.AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
        with model.disable_adapter():
            without = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(theirs, logits, rtol=0, atol=1e-4)
    assert np.abs(without - logits).max() > 0.1
    # And what PEFT itself writes is read.
    model.save_pretrained(str(tmp_path / "theirs"))
    read = policy.load(tmp_path / "theirs")
    np.testing.assert_allclose(_logits(read.config, read.params), logits, atol=2e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    """A run without adapters."""
    run = runs.make(tmp_path_factory.mktemp("plain"))
    _write_run(run, "tied", LoraConfig())
    return run


def test_the_estimator_comes_back_in_with_its_trunk(plain, tmp_path):
    """Contributions from the exported base and head are those from the run's own files."""
    here, data = plain.round(0), tmp_path / "explore" / "trajectories.jsonl"
    store.write(data, runs.episodes(3, seed=2))
    export(plain.base, tmp_path / "out", progress=str(here.progress))
    alone = runs.make(tmp_path / "alone")  # its round trained no estimator
    found = [
        annotate.run(plain, 0, data=data),
        annotate.run(alone, 0, base=str(tmp_path / "out"), data=data),
    ]
    ours, theirs = ([s.contribution for t in part for s in t.steps] for part in found)
    assert np.std(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    export(here.ppo, tmp_path / "trained")
    read = policy.load(tmp_path / "trained")
    with pytest.raises(UserError, match=f"hidden states of {plain.base}"):
        annotation.progress_head(read, tmp_path / "nothing")
    with pytest.raises(UserError, match="progress: holds no progress head, nor does .*train_prog"):
        annotate.run(alone, 0, base=str(plain.base), data=data)


def test_what_is_refused(plain, tmp_path):
    new = tmp_path / "new"
    with pytest.raises(UserError, match="--lora_rank; leave --adapter out"):
        export(plain.round(0).ppo, new, adapter=True)
    with pytest.raises(UserError, match=f"--checkpoint={tmp_path}/nowhere: holds no policy"):
        export(tmp_path / "nowhere", new)
    with pytest.raises(UserError, match=f"--progress={plain.sft}: holds no progress head"):
        export(plain.sft, new, progress=str(plain.sft))
    assert not list(tmp_path.iterdir())


def test_adapters_that_are_not_ours_are_refused_by_name(finished, tmp_path):
    run, _, _ = finished
    export(run.round(0).ppo, tmp_path / "out", adapter=True)
    settings = tmp_path / "out" / "adapter_config.json"
    good = json.loads(settings.read_text())
    for changed, said in (
        ({"use_dora": True}, "use_dora=True: it must be False"),
        ({"r": 4}, "ask for"),
        ({"base_model_name_or_path": "nobody/nothing"}, "'nobody/nothing', and no such folder"),
    ):
        settings.write_text(json.dumps(good | changed))
        with pytest.raises(UserError, match=said):
            policy.load(tmp_path / "out")
    settings.write_text(json.dumps(good))
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
        policy.load(tmp_path / "out")
