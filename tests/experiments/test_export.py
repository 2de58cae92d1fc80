"""A trained policy written for other programs, and read back: the logits stay the same.

Where PyTorch, transformers and PEFT are installed, they load what was written.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import annotate, common, export
from spa_jax import store
from spa_jax.config import LORA_TARGETS, LoraConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.models import heads, lora, transformer
from spa_jax.models.io import huggingface, tensors
from spa_jax.stage_config import CreditConfig
from tests import programs, tiny

ROWS = RowsConfig(row_length=128, policy_slots=64, step_slots=16, rows_per_device=1)
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


def _write_run(root: pathlib.Path, model: str, settings: LoraConfig) -> np.ndarray:
    """A base policy, and a round's policy with heads as the stages write them; its logits."""
    config = MODELS[model]
    base = root / "sft" / "policy"
    params = _noise(tiny.tiny_params(config), 0.02)  # biases too
    tokenizer = tiny.tiny_tokenizer(root / "tokenizer")
    huggingface.save_pretrained(base, config, params, tokenizer)
    trainable = common.trainable(common.load_policy(base), 0, settings, 0)
    trained = _noise(trainable.parts.trained)
    round_0 = root / "iteration_0"
    trainable.save(round_0 / "ppo" / "policy", trained, {"value": _head(heads.Head(8))}, 7)
    (round_0 / "progress").mkdir()
    tensors.save_heads(round_0 / "progress", {"progress": _head(heads.Head(16))})
    common.mark_done(round_0 / "progress", 0.0, trunk="../../sft/policy")
    if not settings.rank:
        return _logits(config, trained["policy"])
    return _logits(config, lora.attach(settings, params, trained["adapter"]))


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    """(a run's folder, its adapters, the logits of its policy while it was trained)."""
    root = tmp_path_factory.mktemp(request.param)
    settings = LoraConfig(rank=3, alpha=6.0, targets=LORA_TARGETS)
    return root, settings, _write_run(root, request.param, settings)


@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_what_is_written_comes_back_in(run, adapter, tmp_path):
    root, _, logits = run
    out = tmp_path / "out"
    assert export.run(root / "iteration_0" / "ppo", out, adapter, "") == ["progress", "value"]
    policy = common.load_policy(out)
    np.testing.assert_allclose(_logits(policy.config, policy.params), logits, atol=2e-5)
    value = common.load_policy(root / "iteration_0" / "ppo" / "policy").heads["value"]
    jax.tree.map(np.testing.assert_array_equal, policy.heads["value"], value)
    progress = tensors.load_heads(root / "iteration_0" / "progress")["progress"]
    jax.tree.map(np.testing.assert_array_equal, policy.heads["progress"], progress)
    assert policy.version == 7
    assert policy.trunk == str(root / "sft" / "policy")  # the head's; not this policy
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    again = tmp_path / "again"
    export.run(out, again, adapter, "")  # an exported folder is a policy like any other
    for file in ("heads.safetensors", "spa_jax.json"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_the_files_are_named_as_transformers_and_peft_name_them(run, tmp_path):
    root, settings, _ = run
    for adapter in (False, True):
        export.run(root / "iteration_0" / "ppo", tmp_path / str(adapter), adapter, "")
    merged = safetensors.numpy.load_file(tmp_path / "False" / "model.safetensors")
    base = safetensors.numpy.load_file(root / "sft" / "policy" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {
        k: (v.shape, np.dtype(np.float32)) for k, v in base.items()
    }
    settings_file = json.loads((tmp_path / "True" / "adapter_config.json").read_text())
    assert settings_file["base_model_name_or_path"] == str(root / "sft" / "policy")
    assert (settings_file["r"], settings_file["lora_alpha"]) == (3, 6)
    assert settings_file["target_modules"] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    written = safetensors.numpy.load_file(tmp_path / "True" / "adapter_model.safetensors")
    assert len(written) == 2 * 7 * 2
    for letter, shape in (("A", (3, 64)), ("B", (32, 3))):
        name = f"base_model.model.model.layers.1.mlp.down_proj.lora_{letter}.weight"
        assert (written[name].shape, written[name].dtype) == (shape, np.float32)
    product = written[name] @ written[name.replace("lora_B", "lora_A")] * settings.scale
    kernel = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_allclose(merged[kernel], base[kernel] + product, atol=1e-5)


def test_transformers_loads_the_folder(run, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    root, _, logits = run
    export.run(root / "iteration_0" / "ppo", tmp_path / "out", False, "")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(theirs, logits, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "look"}], tokenize=False)
    assert "<|im_start|>user\nlook<|im_end|>" in chat


def test_peft_loads_the_adapter(run, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    root, _, logits = run
    export.run(root / "iteration_0" / "ppo", tmp_path / "out", True, "")
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
    policy = common.load_policy(tmp_path / "theirs")
    np.testing.assert_allclose(_logits(policy.config, policy.params), logits, atol=2e-5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without adapters."""
    root = tmp_path_factory.mktemp("plain")
    _write_run(root, "tied", LoraConfig())
    return root


def test_the_estimator_comes_back_in_with_its_trunk(plain, tmp_path):
    """Contributions from the exported base and head are those from the run's own files."""
    trunk, progress = plain / "sft" / "policy", plain / "iteration_0" / "progress"
    rng = np.random.default_rng(2)
    episodes = [tiny.random_trajectory(rng, f"task_{i}", context=8) for i in range(3)]
    store.write(tmp_path / "explore" / "trajectories.jsonl", episodes)
    export.run(trunk, tmp_path / "out", False, str(progress))
    found = [
        annotate.run(
            tmp_path / f"{folder.name}.jsonl", str(policy), tmp_path / "explore/trajectories.jsonl",
            folder, CreditConfig(), ROWS, 0,
        )
        for policy, folder in ((trunk, progress), (tmp_path / "out", tmp_path / "nothing"))
    ]  # fmt: skip
    ours, theirs = ([s.contribution for t in part for s in t.steps] for part in found)
    assert np.std(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    export.run(plain / "iteration_0" / "ppo", tmp_path / "trained", False, "")
    policy = common.load_policy(tmp_path / "trained")
    with pytest.raises(UserError, match=f"hidden states of {trunk}"):
        annotate.progress_head(policy, tmp_path / "nothing")


def test_the_program_and_what_it_refuses(plain, tmp_path):
    out = tmp_path / "out"
    flags = (f"--checkpoint={plain / 'sft'}", f"--out={out}")
    assert f"RESULT out={out} heads=none" in programs.succeed("export", *flags)
    done = programs.run("export", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: --out={out}: is there already")
    new = tmp_path / "new"
    with pytest.raises(UserError, match="--lora_rank; leave --adapter out"):
        export.run(plain / "iteration_0" / "ppo", new, True, "")
    with pytest.raises(UserError, match=f"--checkpoint={tmp_path}/nowhere: holds no policy"):
        export.run(tmp_path / "nowhere", new, False, "")
    with pytest.raises(UserError, match=f"--progress={plain / 'sft'}: holds no progress head"):
        export.run(plain / "sft", new, False, str(plain / "sft"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_adapters_that_are_not_ours_are_refused_by_name(run, tmp_path):
    root, _, _ = run
    export.run(root / "iteration_0" / "ppo", tmp_path / "out", True, "")
    settings = tmp_path / "out" / "adapter_config.json"
    good = json.loads(settings.read_text())
    for changed, said in (
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"r": 4}, "ask for"),
        ({"base_model_name_or_path": "nobody/nothing"}, "'nobody/nothing', and no such folder"),
    ):
        settings.write_text(json.dumps(good | changed))
        with pytest.raises(UserError, match=said):
            common.load_policy(tmp_path / "out")
    settings.write_text(json.dumps(good))
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: no such file"):
        common.load_policy(tmp_path / "out")
