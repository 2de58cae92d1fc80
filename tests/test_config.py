"""Settings that contradict each other are refused, and the message says why."""

import dataclasses
import itertools

import pytest

from spa_jax.config import (ComputeConfig, DistributedConfig, RowsConfig, check)
from spa_jax.errors import UserError
from spa_jax.rl.objectives import OBJECTIVES
from spa_jax.stage_config import CreditConfig, ExploreConfig, PpoConfig, SftConfig, check_together

CREDITS = ("spa", "terminal", "uniform", "shuffled", "random")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gae": "token", "objective": "grpo"}, "--gae=token with --objective=grpo.*critic"),
        ({"gae": "token", "objective": "rft"}, "--gae=token"),
        ({"critic": "ridge", "objective": "grpo"}, "--critic=ridge with --objective=grpo"),
        ({"critic": "ridge", "gae": "token"}, "--critic=ridge.*values steps"),
        ({"gae": "token", "step_baseline": True}, "--gae=token.*--step_baseline"),
        ({"objective": "rloo", "step_baseline": True}, "--step_baseline.*rollouts"),
        ({"objective": "rft", "step_baseline": True}, "--step_baseline.*no advantage"),
        ({"kl": "reward"}, "--kl=reward.*--ppo_kl_coef"),
        ({"kl": "reward", "kl_coef": 0.1, "objective": "grpo"}, "--kl=reward.*spread"),
        ({"objective": "rft", "kl_coef": 0.1}, "--ppo_kl_coef.*log-likelihood"),
        ({"objective": "rft", "entropy_coef": 0.1}, "--ppo_entropy_coef"),
        ({"truncate_ratio": 1.1}, "--ppo_truncate_ratio=1.1.*--ppo_clip=1.2"),
        ({"objective": "rft", "truncate_ratio": 2.0}, "--ppo_truncate_ratio.*no ratio"),
    ],
)
def test_what_an_objective_would_not_heed_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check(PpoConfig(**settings))


@pytest.mark.parametrize(
    ("objective", "kl", "gae"), itertools.product(OBJECTIVES, ("loss", "reward"), ("step", "token"))
)
def test_the_rest_is_not(objective, kl, gae):
    ppo = PpoConfig(objective=objective, kl=kl, gae=gae, kl_coef=0.1, truncate_ratio=2.0)
    refused = (gae == "token" and objective != "ppo") or (kl == "reward" and objective == "grpo")
    if refused:
        with pytest.raises(UserError):
            check(ppo)
    else:
        check(ppo)


def test_groups_need_rollouts_and_cloning_no_credit():
    once, twice = ExploreConfig(rollouts=1), ExploreConfig(rollouts=2)
    for objective, credit in itertools.product(OBJECTIVES, CREDITS):
        check_together(PpoConfig(objective=objective), CreditConfig(credit=credit), twice)
    for objective in ("grpo", "rloo"):
        with pytest.raises(UserError, match=f"--objective={objective}.*--rollouts"):
            check_together(PpoConfig(objective=objective), CreditConfig(), once)
    for objective in ("ppo", "reinforce++", "rft"):
        check_together(PpoConfig(objective=objective), CreditConfig(), once)
    with pytest.raises(UserError, match="--credit=uniform with --objective=rft"):
        check_together(PpoConfig(objective="rft"), CreditConfig(credit="uniform"), once)


def test_a_mesh_needs_its_partition():
    check(RowsConfig(partition="mesh", mesh="data:2"))
    with pytest.raises(UserError, match="--mesh=data:2 needs --partition=mesh"):
        check(dataclasses.replace(RowsConfig(), mesh="data:2"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coordinator_address": "a:1"}, "belong together"),
        ({"process_id": 0, "distributed": True}, "belong together"),
        ({"num_processes": 2, "process_id": 0}, "belong together"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "=a: write HOST:PORT"),
        ({"coordinator_address": "a:99999", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "numbered from 0"),
        ({"coordinator_address": "a:1", "num_processes": -2, "process_id": -3}, "numbered from 0"),
        ({"meet_timeout_s": 0}, "--meet_timeout_s must be at least 1"),
    ],
)
def test_processes_that_could_not_find_each_other_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check(DistributedConfig(**settings))
    check(DistributedConfig(coordinator_address="[::1]:1", num_processes=2, process_id=1))
    check(DistributedConfig(distributed=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (RowsConfig(row_buckets=0), "--row_buckets=0 must be in 1"),
        (ComputeConfig(logits_chunk=-1), "--logits_chunk=-1 must be >= 0"),
        (SftConfig(checkpoint_every=-1), "--sft_checkpoint_every=-1 must be >= 0"),
        (SftConfig(row_buckets=-1), "--sft_row_buckets=-1 must be >= 0"),
        (SftConfig(ema=1.0), "--sft_ema=1 must be at least 0 and below 1"),
        (PpoConfig(checkpoint_every=-1), "--ppo_checkpoint_every=-1 must be >= 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check(settings)
