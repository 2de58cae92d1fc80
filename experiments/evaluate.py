"""Stage 6: plays held-out games and says how well.

    python -m experiments.evaluate --workdir=W --alfworld_data=DIR --split=heldout
    python -m experiments.evaluate --env=alfworld --alfworld_data=DIR --split=valid_seen \\
        --policy=expert --max_steps=50 --workdir=W

Writes W/eval/NAME/{trajectories.jsonl,summary.json}.  Run again, it plays what is missing.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence

from absl import flags

from experiments import common, explore
from experiments import flags as flags_lib
from spa_jax import evaluation
from spa_jax.chat import TEMPLATE
from spa_jax.config import (
    DEFAULT_COMPUTE,
    ChatConfig,
    ComputeConfig,
    DistributedConfig,
    EnvConfig,
    ExploreConfig,
    SamplingConfig,
)


def run(
    out: pathlib.Path,
    policy_folder: str,
    env: EnvConfig,
    sampling: SamplingConfig,
    games: ExploreConfig,
    seed: int,
    chat_format: str = TEMPLATE,
    compute: ComputeConfig = DEFAULT_COMPUTE,
) -> evaluation.Summary:
    """Plays one episode of each chosen game and writes the summary."""
    once = dataclasses.replace(games, rollouts=1)
    title = f"evaluate {out.name}"
    played = explore.run(out, policy_folder, env, sampling, once, seed, title, chat_format, compute)
    summary = evaluation.summarize(played)
    common.write_json(out / "summary.json", summary.to_dict())
    return summary


def main(argv: Sequence[str]) -> None:
    del argv
    started = time.time()
    workdir = pathlib.Path(flags_lib.WORKDIR.value)
    policy = _POLICY.value or str(workdir / "sft" / "policy")
    summary = run(
        workdir / "eval" / _NAME.value,
        policy,
        flags_lib.read(EnvConfig),
        flags_lib.read(SamplingConfig),
        flags_lib.read(ExploreConfig),
        flags_lib.SEED.value,
        flags_lib.read(ChatConfig).chat_format,
        flags_lib.read(ComputeConfig),
    )
    print(evaluation.table({_NAME.value: summary}))
    for task_type, won in sorted(summary.by_task_type.items()):
        print(f"  {task_type or 'no type'}: {won.successes} of {won.games}")
    print(
        f"RESULT success={summary.success_rate:.4f} grounding={summary.grounding:.4f} "
        f"games={summary.games} seconds={time.time() - started:.1f}"
    )


if __name__ == "__main__":
    _POLICY = flags.DEFINE_string(
        "policy", "", "Folder of the policy, or 'expert'; W/sft/policy by default."
    )
    _NAME = flags.DEFINE_string("name", "policy", "Folder below W/eval to write.")
    flags_lib.define(
        EnvConfig, SamplingConfig, ExploreConfig, ChatConfig, ComputeConfig, DistributedConfig
    )
    flags_lib.run(common.stage(main), flags_lib.WORKDIR, flags_lib.SEED)
