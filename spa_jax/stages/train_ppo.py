"""Stage 5: one pass of the policy's update over a round's annotated episodes.

--objective chooses PPO, an objective without a critic, or SFT on the won episodes (rft).  Reads
W/iteration_I/annotated.jsonl and the policy that played it (the base in round 0, the previous
round's after it); writes W/iteration_I/ppo/policy with its value head if there is one,
metrics.jsonl and checkpoints.  Run again, it continues.
"""

import time

from spa_jax import episodes, files, provenance
from spa_jax import policy as policy_lib
from spa_jax.config import fit_attention
from spa_jax.run import Run
from spa_jax.runtime import distributed
from spa_jax.stage_config import CRITIC_OBJECTIVES, RFT
from spa_jax.training import behaviour, policy_update, ppo_data, trainable
from spa_jax.training.policy_update import Learner


def run(run: Run, number: int, *, policy: str = "") -> None:
    """Trains the policy of a round.

    Args:
      run: the run.
      number: of the round.
      policy: that played the episodes; "": the round's.

    Raises:
      UserError: the episodes are not annotated, not of this policy's sampling, or do not fit.
    """
    here, settings = run.round(number), run.settings
    ppo, rows, reference = settings.ppo, settings.rows, run.base
    played = policy or str(run.newest_policy(number))
    inputs = {
        "policy": provenance.policy_digest(played),
        "annotated episodes": provenance.file_digest(here.annotated),
    }
    if settings.method.base or reference.exists():  # --policy needs none
        inputs["base policy"] = provenance.policy_digest(reference)
    provenance.check_stage(run, "ppo", here.ppo, inputs=inputs)
    if files.is_done(here.ppo, "ppo"):
        return
    started, seed = time.time(), run.seed + number
    trajectories = episodes.load(here.annotated)
    temperature = behaviour.temperature(here.annotated, trajectories, ppo)
    if ppo.objective == RFT:
        trajectories = ppo_data.won(trajectories, here.annotated)
    else:
        behaviour.check_reference(here.annotated, trajectories, reference, ppo)
    if ppo.objective == "ragen":
        trajectories = ppo_data.uncertain(trajectories)
    start = policy_lib.load(
        played,
        policy_lib.recorded_chat_format(here.explore),
        fit_attention(settings.compute, rows),
    )
    episodes.check_fit(start.config, trajectories, here.annotated, rows)
    critic = policy_update.critic_policy(start, reference, ppo)
    scores = policy_update.critic_scores(
        critic,
        trajectories,
        features=here.features,
        rows=rows,
        ppo=ppo,
        temperature=temperature,
    )
    own = critic is start
    del critic  # another policy's weights are gone before training starts
    mismatch = behaviour.sampler_mismatch(start, trajectories, scores if own else None, rows)
    head = {}
    if scores is not None and ppo.objective in CRITIC_OBJECTIVES and ppo.critic == "head":
        head["value"] = policy_update.value_head(start, scores, seed)
    learner = Learner(
        trainable=trainable.make(
            start,
            train_layers=ppo.train_layers,
            lora=run.lora("ppo"),
            seed=seed,
            reference=reference,
        ),
        trajectories=trajectories,
        scores=scores,
        head=head,
        ppo=ppo,
        rows=rows,
        temperature=temperature,
        lower_states_file=here.lower_states,
    )
    state = learner.run(here.ppo, seed=seed, constants={"sampler_mismatch": mismatch})
    heads = {name: state.params[name] for name in head}
    updates = int(state.update)
    learner.trainable.save(
        here.policy, trained=state.params, heads=heads, version=start.version + updates
    )
    files.mark_done(
        here.ppo,
        started,
        updates=updates,
        skipped=int(state.skipped),
        sampler_mismatch=mismatch,
    )
    if distributed.is_first():
        here.lower_states.unlink(missing_ok=True)
