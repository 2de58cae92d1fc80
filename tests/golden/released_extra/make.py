"""Makes the cases of this folder: settings that the authors' recorded cases leave out.

    python tests/golden/released_extra/make.py --out=tests/golden/released_extra

These numbers are NOT recorded from the authors' code.  They come from TRL 0.10.1's own PPO trainer
(its losses, advantages, whitening, accumulation, clipping, Adam and controllers run as they are);
what the released trainer adds to it (masks from trained tokens, scores a step, statistics of the
last score) is stated here again from its description.  The same program reproduces the authors'
recorded cases (`--check=DIR` of them), which says that the statement is right.

Needs trl==0.10.1, transformers==4.43.1, peft, accelerate and PyTorch on a CPU; the tests do not.
"""

import argparse
import copy
import dataclasses
import json
import pathlib

import numpy as np
import peft
import tokenizers
import torch
import transformers
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import logprobs_from_logits, masked_mean, stack_dicts

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "model_type": "llama",
}
DEFAULTS = {
    "batch_size": 4,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "ppo_epochs": 2,
    "gamma": 0.99,
    "lam": 0.95,
    "init_kl_coef": 0.3,
    "target": 6,
    "horizon": 10000,
    "kl_penalty": "kl",
    "learning_rate": 1e-3,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "seed": 2024,
    "adap_kl_ctrl": True,
    "whiten_rewards": False,
    "max_grad_norm": None,
    "ratio_threshold": 10.0,
    "target_kl": 6,
    "early_stopping": False,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "accumulate": {"mini_batch_size": 1, "gradient_accumulation_steps": 2},
    "clip": {"max_grad_norm": 0.5, "ppo_epochs": 3},
    "accumulate_clip": {
        "mini_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.3,
        "ppo_epochs": 4,
    },
    "abs": {"kl_penalty": "abs", "adap_kl_ctrl": False},
    "mse": {"kl_penalty": "mse", "target": 0.5, "horizon": 100},
    "full": {"kl_penalty": "full", "gamma": 1.0, "lam": 0.9},
    "whiten_rewards": {"whiten_rewards": True, "vf_coef": 0.5, "cliprange": 0.05},
    "ratio_threshold": {"ratio_threshold": 1.02, "learning_rate": 5e-3, "ppo_epochs": 4},
    "early_stop": {
        "early_stopping": True,
        "target_kl": 1e-3,
        "learning_rate": 4e-3,
        "ppo_epochs": 4,
    },
    "edge": {"rows": "edge"},
    "edge_full_accumulate": {
        "rows": "edge",
        "kl_penalty": "full",
        "gradient_accumulation_steps": 2,
        "whiten_rewards": True,
    },
    "lora_all": {"lora": ALL_MODULES, "max_grad_norm": 0.2},
    "lora_edge": {
        "lora": ["q_proj", "v_proj"],
        "rows": "edge",
        "kl_penalty": "mse",
        "gradient_accumulation_steps": 2,
    },
    "left": {"padding_side": "left"},
}


@dataclasses.dataclass
class Row:
    """One conversation: its tokens, which of them are trained, its steps, and their scores."""

    tokens: list[int]
    trained: list[int]
    segments: list[tuple[int, int]]
    scores: list[float]
    response: int  # how many of the last tokens are the response


def row(rng, vocab, segments, length, scores=None):
    """A row of random tokens whose steps are `segments`."""
    trained = [0] * length
    for begin, end in segments:
        trained[begin:end] = [1] * (end - begin)
    count = len(segments) if scores is None else scores
    response = max(1, length - segments[-1][0]) if segments else 2
    return Row(
        rng.integers(3, vocab, length).tolist(),
        trained,
        list(segments),
        rng.normal(0.5, 1.0, count).astype(np.float32).tolist(),
        response,
    )


def plain_rows(rng, vocab):
    """Four rows of 2 to 4 steps."""
    rows = []
    for _ in range(4):
        segments, at = [], int(rng.integers(4, 9))
        for _ in range(int(rng.integers(2, 5))):
            size = int(rng.integers(1, 6))
            segments.append((at, at + size))
            at += size + int(rng.integers(2, 6))
        rows.append(row(rng, vocab, segments, segments[-1][1]))
    return rows


def edge_rows(rng, vocab):
    """What the released code meets at its edges, one kind a row."""
    return [
        row(rng, vocab, [(9, 15)], 15),  # one step: its score earns nothing
        row(rng, vocab, [(0, 3), (6, 7), (10, 11)], 11, scores=5),  # cut from the left
        row(rng, vocab, [(4, 8), (8, 10), (13, 14), (17, 18)], 20, scores=4),  # touching steps
        row(rng, vocab, [], 13, scores=2),  # nothing that is trained
    ]


class Recorder(PPOTrainer):
    """TRL's trainer, with the released trainer's step around its own losses."""

    def record(self, rows, permutations):
        """One step; returns {array name: array} and the statistics."""
        config, out = self.config, {}
        tokens, attention, frag = pad(rows, self.tokenizer.padding_side)
        mask = frag[:, 1:].clone()
        with torch.no_grad():
            logits, values = self.look(self.model, tokens, attention)
            with self.optional_peft_ctx():
                reference = self.model if self.is_peft_model else self.ref_model
                ref_logits, _ = self.look(reference, tokens, attention)
            logp = logprobs_from_logits(logits, tokens[:, 1:])
            ref_logp = logprobs_from_logits(ref_logits, tokens[:, 1:])
            if config.kl_penalty == "full":
                kls = self._kl_penalty(logits.log_softmax(-1), ref_logits.log_softmax(-1))
            else:
                kls = self._kl_penalty(logp, ref_logp)
            non_score = -self.kl_ctl.value * kls
            rewards = non_score + score_rewards(rows, mask)
            masked, advantages, returns = self.compute_advantages(values, rewards, mask)
        out |= {
            "input_ids": tokens,
            "attention_mask": attention,
            "frag_mask": frag,
            "masks": mask,
            "logprobs": logp,
            "ref_logprobs": ref_logp,
            "values_raw": values,
            "kls": kls,
            "non_score_rewards": non_score,
            "rewards": rewards,
            "values_masked": masked,
            "advantages": advantages,
            "returns": returns,
        }
        trace = self.optimise(out, permutations)
        return out, self.describe(rows, out, trace)

    def look(self, model, tokens, attention):
        """Logits and values that predict the next token, in eval mode."""
        model.eval()
        logits, _, values = model(input_ids=tokens, attention_mask=attention)
        return logits[:, :-1], values[:, :-1]

    def optimise(self, out, permutations):
        """The epochs, of and added to the experience in `out`; TRL computes losses and updates."""
        tokens, attention = out["input_ids"], out["attention_mask"]
        config, trace, chosen, used = self.config, [], [], []
        seen = {"mb_logprobs": [], "mb_vpreds": []}
        for permutation in permutations[: config.ppo_epochs]:
            used.append(permutation)
            for begin in range(0, config.batch_size, config.mini_batch_size):
                rows = list(permutation[begin : begin + config.mini_batch_size])
                with self.accelerator.accumulate(self.model):
                    logits, vpreds = self.look(self.model, tokens[rows], attention[rows])
                    new = logprobs_from_logits(logits, tokens[rows][:, 1:])
                    old = {
                        theirs: out[ours][rows]
                        for theirs, ours in (
                            ("old_logprobs", "logprobs"),
                            ("values", "values_masked"),
                            ("mask", "masks"),
                            ("advantages", "advantages"),
                            ("returns", "returns"),
                        )
                    }
                    now = {"logprobs": new, "logits": logits, "vpreds": vpreds}
                    trace.append(self.train_minibatch(**old, **now))
                seen["mb_logprobs"].append(new.detach())
                seen["mb_vpreds"].append(vpreds.detach())
                chosen.append(rows)
            if config.early_stopping and self._early_stop(trace[-1]["policy/policykl"]):
                break
        out |= {name: torch.stack(arrays) for name, arrays in seen.items()}
        out |= {"perm": np.array(used), "mb_indices": np.array(chosen)}
        for name in trace[0]:
            out[f"mb_stats/{name}"] = torch.stack([one[name] for one in trace])
        return trace

    def describe(self, rows, out, trace):
        """The statistics of the step; moves the KL coefficient."""
        mask, kls, logp, non_score = (
            out[name] for name in ("masks", "kls", "logprobs", "non_score_rewards")
        )
        last = torch.tensor([r.scores[-1] for r in rows])
        responses = torch.tensor([float(r.response) for r in rows])
        queries = torch.tensor([float(len(r.tokens)) for r in rows]) - responses
        stats = {
            "objective/kl": (kls * mask).sum(-1).mean(),
            "objective/kl_coef": self.kl_ctl.value,
            "objective/entropy": (-logp * mask).sum(-1).mean(),
            "ppo/mean_non_score_reward": masked_mean(non_score, mask),
            "ppo/mean_scores": last.mean(),
            "ppo/std_scores": last.std(),
            "tokens/queries_len_mean": queries.mean(),
            "tokens/queries_len_std": queries.std(),
            "tokens/responses_len_mean": responses.mean(),
            "tokens/responses_len_std": responses.std(),
        }
        for name, stacked in stack_dicts(trace).items():
            if name not in ("policy/advantages", "policy/ratio"):
                stats[f"ppo/{name}"] = stacked.mean(0)
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
        stats["ppo/learning_rate"] = self.config.learning_rate
        self.kl_ctl.update(stats["objective/kl"].numpy(), self.config.batch_size)
        return {name: float(value) for name, value in stats.items()}

    def train_minibatch(self, **batch):
        """TRL's, with the first gradient kept before it is clipped."""
        if self.first is None:
            backward = self.accelerator.backward

            def keep(loss):
                backward(loss)
                self.first = {
                    name: p.grad.detach().clone()
                    for name, p in self.model.named_parameters()
                    if p.grad is not None
                }

            self.accelerator.backward = keep
            try:
                return super().train_minibatch(**batch)
            finally:
                self.accelerator.backward = backward
        return super().train_minibatch(**batch)

    first = None


def pad(rows, side):
    """Tokens, attention mask and trained tokens; the latter begin at column 0 on either side."""
    length = max(len(r.tokens) for r in rows)
    tokens, attention, frag = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for i, r in enumerate(rows):
        n = len(r.tokens)
        place = slice(length - n, length) if side == "left" else slice(0, n)
        tokens[i, place] = torch.tensor(r.tokens)
        attention[i, place] = 1
        frag[i, :n] = torch.tensor(r.trained)
    return tokens, attention, frag


def score_rewards(rows, mask):
    """A step's score times the number of later steps, at its last token; last step first."""
    rewards = torch.zeros(mask.shape)
    for i, r in enumerate(rows):
        inside = mask[i].tolist() + [0]
        ends = [t for t in range(mask.shape[1]) if inside[t] and not inside[t + 1]]
        for later, (end, score) in enumerate(zip(reversed(ends), reversed(r.scores), strict=False)):
            rewards[i, end] += torch.tensor(score) * later
    return rewards


def tokenizer(side):
    """One that only pads."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, "<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", padding_side=side
    )


def policy(config, tensors, prefix, lora=None):
    """A policy with its value head from named tensors, or a new one where there are none."""
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    settings = lora and peft.LoraConfig(**lora)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=settings)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in own.items():
            named = prefix + name.replace(".base_layer.", ".")
            if named in tensors:
                p.copy_(torch.tensor(tensors[named]))
            elif "lora_B" in name or "v_head" in name or "lora_A" in name:
                p.normal_(0.0, 0.2)
    model.is_peft_model = bool(lora)
    return model


def parameters(model):
    """{name: array} of all parameters, without PEFT's mark of the frozen ones."""
    named = model.named_parameters()
    return {n.replace(".base_layer.", "."): p.detach().numpy().copy() for n, p in named}


def make(name, settings, folder, config, tensors, *, rows=None, permutations=None):
    """Writes one case, or returns it if its rows are given."""
    settings = dict(settings)
    lora_modules, kind = settings.pop("lora", None), settings.pop("rows", "plain")
    side = settings.pop("padding_side", "right")
    full = DEFAULTS | settings
    ppo = PPOConfig(**full)
    lora = LORA | {"target_modules": lora_modules} if isinstance(lora_modules, list) else None
    lora = lora_modules if isinstance(lora_modules, dict) else lora
    torch.manual_seed(7)
    prefix = "" if lora else "policy/"
    model = policy(config, tensors, prefix, lora)
    reference = None if lora else policy(config, tensors, "ref/")
    before = parameters(model)
    trainer = Recorder(ppo, model, reference, tokenizer(side))
    rng = np.random.default_rng(sum(map(ord, name)))
    if permutations is None:
        count = full["ppo_epochs"]
        permutations = [np.random.permutation(full["batch_size"]) for _ in range(count)]
    rows = rows or {"plain": plain_rows, "edge": edge_rows}[kind](rng, config["vocab_size"])
    kl_before = trainer.kl_ctl.value
    arrays, stats = trainer.record(rows, permutations)
    arrays = {key: np.asarray(value) for key, value in arrays.items()}
    arrays |= described(rows)
    arrays |= gradients(trainer.first)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    after = parameters(model)
    arrays |= {f"after/{n}": after[n] for n in trained}
    text = {
        "case": name,
        "padding_side": side,
        "pad_token_id": 0,
        "ppo_config": full,
        "per_epoch_minibatches": full["batch_size"] // full["mini_batch_size"],
        "kl_coef_before": kl_before,
        "kl_coef_after": float(trainer.kl_ctl.value),
        "stats": stats,
    }
    if lora:
        text["peft"] = lora | {"scaling": lora["lora_alpha"] / lora["r"]}
        text["trainable"] = trained
        arrays_before = {f"weights/{n}": array for n, array in before.items()}
    else:
        arrays_before = {}
    if folder is None:
        return arrays, text
    if lora:
        text["weights"] = f"weights_{name}.npz"
        np.savez_compressed(
            folder / text["weights"],
            **{n.removeprefix("weights/"): a for n, a in arrays_before.items()},
        )
    np.savez_compressed(folder / f"ppo_{name}.npz", **arrays)
    (folder / f"ppo_{name}.json").write_text(json.dumps(text, indent=1) + "\n")
    return arrays, text


def described(rows):
    """What the recorded cases say of their rows."""
    count = max(len(r.scores) for r in rows)
    steps = max(len(r.segments) for r in rows)
    scores = np.zeros((len(rows), count), np.float32)
    segments = np.full((len(rows), steps, 2), -1)
    for i, r in enumerate(rows):
        scores[i, : len(r.scores)] = r.scores
        if r.segments:
            segments[i, : len(r.segments)] = r.segments
    return {
        "scores": scores,
        "segments": segments,
        "n_scores": np.array([len(r.scores) for r in rows]),
        "n_segments": np.array([len(r.segments) for r in rows]),
        "query_len": np.array([len(r.tokens) - r.response for r in rows]),
        "response_len": np.array([r.response for r in rows]),
        "frag_len": np.array([len(r.tokens) for r in rows]),
    }


def gradients(first):
    """The first minibatch's gradient, with its norms."""
    names = sorted(first)
    norms = np.array([float(first[n].double().norm()) for n in names])
    return {f"grad_first/{n}": first[n].numpy() for n in names} | {
        "grad_first_names": np.array(names),
        "grad_first_norms": norms,
        "grad_first_total_norm": np.sqrt(np.sum(norms**2)),
    }


def progress(folder, config, tensors):
    """The progress model over both sides of padding: a linear head on the logits at turn ends."""
    rng = np.random.default_rng(5)
    rows = plain_rows(rng, config["vocab_size"])
    weight = rng.normal(0, 0.05, (1, config["vocab_size"])).astype(np.float32)
    out = {"head_weight": weight, "head_bias": np.array([0.03], np.float32)}
    labels = torch.tensor([1.0, 0.0, 0.5, 0.25])
    for side in ("right", "left"):
        backbone = policy(config, tensors, "policy/").pretrained_model.eval()
        head = torch.nn.Linear(config["vocab_size"], 1)
        with torch.no_grad():
            head.weight.copy_(torch.tensor(weight))
            head.bias.copy_(torch.tensor(out["head_bias"]))
        tokens, attention, trained = pad(rows, side)
        if side == "left":  # here the turns do move with the padding
            for i, r in enumerate(rows):
                trained[i] = torch.roll(trained[i], trained.shape[1] - len(r.tokens))
        unmask = torch.where(trained == 1, tokens, -100)
        logits = backbone(input_ids=tokens, attention_mask=attention).logits
        ends = [
            [t for t in range(len(m)) if m[t] and not (m + [0])[t + 1]] for m in trained.tolist()
        ]
        values = [head(logits[i, e])[:, 0] for i, e in enumerate(ends)]
        predictions = torch.stack([v.sum() for v in values])
        loss = torch.nn.functional.mse_loss(predictions, labels)
        loss.backward()
        count = max(map(len, ends))
        table, places = np.full((4, count), np.nan, np.float32), np.full((4, count), -1)
        for i, v in enumerate(values):
            table[i, : len(v)], places[i, : len(v)] = v.detach().numpy(), ends[i]
        key = f"{side}/fp32"
        out |= {
            f"{side}/input_ids": tokens,
            f"{side}/attention_mask": attention,
            f"{side}/gpt_unmask": unmask,
            f"{side}/labels": labels,
            f"{side}/turn_end": places,
            f"{key}/turn_values": table,
            f"{key}/predictions": predictions.detach(),
            f"{key}/loss": loss.detach(),
            f"{key}/n_turns": np.array([len(e) for e in ends]),
            f"{key}/per_sample_prediction": predictions.detach(),
            f"{key}/per_sample_loss": (predictions - labels).detach() ** 2,
            f"{key}/grad/LN.weight": head.weight.grad,
            f"{key}/grad/LN.bias": head.bias.grad,
        }
        out |= {f"{key}/grad/backbone.lm.{n}": p.grad for n, p in backbone.named_parameters()}
    np.savez_compressed(
        folder / "progress_sides.npz", **{name: np.asarray(value) for name, value in out.items()}
    )


def recorded_rows(arrays):
    """The rows of a recorded case."""
    rows = []
    for i, n in enumerate(arrays["attention_mask"].sum(1)):
        inside = arrays["attention_mask"][i] == 1
        count = int(arrays["n_segments"][i])
        rows.append(
            Row(
                arrays["input_ids"][i][inside].tolist(),
                arrays["frag_mask"][i][:n].tolist(),
                [tuple(s) for s in arrays["segments"][i][:count].tolist()],
                arrays["scores"][i][: arrays["n_scores"][i]].tolist(),
                int(arrays["response_len"][i]),
            )
        )
    return rows


def check(folder):
    """Runs the recorded cases of `folder` and prints the largest differences."""
    config = json.loads((folder / "weights_tiny_config.json").read_text())
    for path in sorted(folder.glob("ppo_*.npz")):
        theirs = dict(np.load(path))
        text = json.loads(path.with_suffix(".json").read_text())
        lora = text.get("peft")
        lora = lora and {k: lora[k] for k in ("r", "lora_alpha", "target_modules", "lora_dropout")}
        tensors = np.load(folder / ("weights_lora.npz" if lora else "weights_tiny.npz"))
        settings = text["ppo_config"] | {"padding_side": text["padding_side"], "lora": lora}
        case = {"rows": recorded_rows(theirs), "permutations": theirs["perm"]}
        ours, again = make(path.stem, settings, None, config, tensors, **case)
        worst = {
            name: float(np.abs(ours[name].astype(np.float64) - theirs[name]).max())
            for name in theirs
            if name in ours and theirs[name].dtype.kind != "U"
        }
        name = max(worst, key=lambda key: worst[key])
        stats = max(abs(again["stats"][k] - v) for k, v in text["stats"].items())
        missing = sorted(set(theirs) - set(ours))
        print(f"{path.stem}: {name} {worst[name]:.1e}, statistics {stats:.1e}, without {missing}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--only", help="make this case alone, of the weights that are there")
    parser.add_argument("--weights", type=pathlib.Path, help="a folder with weights_tiny.npz")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check:
        check(args.check)
    if not args.out:
        return
    if args.only:
        config = json.loads((args.out / "weights_tiny_config.json").read_text())
        tensors = dict(np.load(args.out / "weights_tiny.npz"))
        make(args.only, CASES[args.only], args.out, config, tensors)
        return
    if args.weights:
        config = json.loads((args.weights / "weights_tiny_config.json").read_text())
        tensors = dict(np.load(args.weights / "weights_tiny.npz"))
    else:
        config, tensors = copy.deepcopy(SMALL), {}
        torch.manual_seed(3)
        model = policy(config, {}, "")
        tensors = {f"policy/{n}": a for n, a in parameters(model).items()}
        tensors |= {
            f"ref/{n}": a + np.float32(0.02) * torch.randn(a.shape).numpy()
            for n, a in parameters(model).items()
        }
    np.savez_compressed(args.out / "weights_tiny.npz", **tensors)
    (args.out / "weights_tiny_config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name, settings in CASES.items():
        make(name, settings, args.out, config, {} if "lora" in settings else tensors)
        print(name, flush=True)
    progress(args.out, config, tensors)


if __name__ == "__main__":
    main()
