"""A model card: what an exported policy is, how it was made, how well it did, how to load it."""

import json
import pathlib
from typing import Any

from spa_jax import provenance
from spa_jax import run as run_lib
from spa_jax.run import Run

# Settings that say nothing of the model: where things lie, and who may come in.
_LOCAL = ("workdir", "base", "demonstrations", "env_address", "env_token_file")


def write(policy: pathlib.Path, name: str, *, adapter: bool) -> str:
    """The card, in Markdown with the header that model hubs read.

    It names no folder of the machine that made the policy.

    Args:
      policy: the folder of the policy, in its run's if it has one.
      name: of the exported folder.
      adapter: whether it is an adapter alone.
    """
    run = _run_of(policy)
    made = provenance.made_with(run.json) if run else {}
    start = pathlib.PurePath(str(made.get("policy", ""))).name or "its base model"
    library = "peft" if adapter else "transformers"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n"
        "tags: [reinforcement-learning, agents, spa-rl, spa_jax]\n---",
        f"# {name}",
        f"A language-model agent trained from {start} by Stepwise Progress Attribution (SPA-RL, "
        "[arXiv 2505.20732](https://arxiv.org/abs/2505.20732)) with spa_jax.",
        "## Licence\n\nThat of the model it was trained from, whose conditions hold for it too.",
        f"## Load it\n\n```python\n{_load(name, adapter=adapter)}```\n\n"
        "The value and progress heads, if there are any, lie in `heads/heads.safetensors`; "
        "`spa_jax.load(FOLDER)` plays with it and reads them.",
    ]
    if run and (results := _results(run)):
        parts.append(f"## Results\n\nHeld-out games of the run that made it:\n\n{results}")
    if shown := {k: v for k, v in sorted(made.items()) if not _is_local(k, v)}:
        lines = "\n".join(f"--{flag}={value}" for flag, value in shown.items())
        parts.append(f"## Settings\n\nThose that differ from the defaults:\n\n```\n{lines}\n```")
    if run:
        versions = json.loads(run.json.read_text()).get("versions", {})
        said = ", ".join(f"{part} {version}" for part, version in versions.items())
        parts.append(f"## Versions\n\n{said}")
    return "\n\n".join(parts) + "\n"


def _run_of(policy: pathlib.Path) -> Run | None:
    """The run whose folder a policy lies in."""
    found = (run_lib.at(folder) for folder in list(policy.resolve().parents)[:3])
    return next((run for run in found if run.json.is_file()), None)


def _is_local(flag: str, value: Any) -> bool:
    return flag in _LOCAL or (isinstance(value, str) and "/" in value)


def _load(name: str, *, adapter: bool) -> str:
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    library = "peft" if adapter else "transformers"
    return (
        f"from {library} import {kind}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {kind}.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
    )


def _results(run: Run) -> str:
    """A table of the run's evaluations; "" without one."""
    rows = []
    for name in (run_lib.BASE, run_lib.SPA):
        path = run.evaluation(name) / "summary.json"
        if path.is_file():
            found = json.loads(path.read_text())
            won = found["success"]
            rows.append(
                f"| {name} | {won['games']} | {won['successes']} | "
                f"{100 * won['low']:.1f} - {100 * won['high']:.1f}% | {found['grounding']:.3f} |"
            )
    head = "| policy | games | won | 95% interval | grounding |\n|---|---:|---:|---:|---:|\n"
    return head + "\n".join(rows) if rows else ""
