"""Settings that contradict each other, or cannot be, are refused, and the message says why."""

import contextlib
import dataclasses
import itertools
import math
import typing

import pytest

from spa_jax import settings as settings_lib
from spa_jax import stage_config
from spa_jax.config import (
    ComputeConfig,
    DistributedConfig,
    EnvConfig,
    LoraConfig,
    RowsConfig,
    SamplingConfig,
)
from spa_jax.data_config import DataConfig
from spa_jax.errors import UserError
from spa_jax.rl import ragen
from spa_jax.rl.objectives import OBJECTIVES
from spa_jax.server_config import ServerConfig
from spa_jax.stage_config import (
    CreditConfig,
    ExploreConfig,
    MethodConfig,
    PpoConfig,
    Settings,
    SftConfig,
    check_together,
)

CREDITS = typing.get_args(CreditConfig.__annotations__["credit"])


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
        ({"objective": "gigpo", "step_baseline": True}, "--step_baseline.*rollouts"),
        ({"objective": "gagpo", "kl": "reward", "kl_coef": 0.1}, "--kl=reward.*spread"),
        ({"objective": "ragen", "kl_coef": 0.1}, "--ppo_kl_coef.*no KL"),
        ({"objective": "ragen", "clip": 0.3}, "--ppo_clip=0.3.*upper clip is 0.28"),
        ({"objective": "ragen", "truncate_ratio": 1.25}, "--ppo_truncate_ratio=1.25.*1.28"),
    ],
)
def test_what_an_objective_would_not_heed_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        PpoConfig(**settings)


@pytest.mark.parametrize(
    ("objective", "kl", "gae"), itertools.product(OBJECTIVES, ("loss", "reward"), ("step", "token"))
)
def test_the_rest_is_not(objective, kl, gae):
    critic, scaled = OBJECTIVES[objective].critic, OBJECTIVES[objective].scaled
    refused = (gae == "token" and not critic) or (kl == "reward" and scaled)
    refused |= objective == "ragen"  # it has no KL
    expected = pytest.raises(UserError) if refused else contextlib.nullcontext()
    with expected:
        PpoConfig(objective=objective, kl=kl, gae=gae, kl_coef=0.1, truncate_ratio=2.0)


def test_groups_need_rollouts_and_cloning_no_credit():
    once, twice = ExploreConfig(rollouts=1), ExploreConfig(rollouts=2)
    for objective, credit in itertools.product(OBJECTIVES, CREDITS):
        check_together(PpoConfig(objective=objective), CreditConfig(credit=credit), twice)
    for objective in stage_config.GROUP_OBJECTIVES:
        with pytest.raises(UserError, match=f"--objective={objective}.*--rollouts"):
            check_together(PpoConfig(objective=objective), CreditConfig(), once)
    for objective in ("ppo", "reinforce++", "rft"):
        check_together(PpoConfig(objective=objective), CreditConfig(), once)
    with pytest.raises(UserError, match="--credit=uniform with --objective=rft"):
        check_together(PpoConfig(objective="rft"), CreditConfig(credit="uniform"), once)


def test_the_settings_know_the_objectives():
    chosen = set(typing.get_args(PpoConfig.__annotations__["objective"]))
    assert chosen == {*OBJECTIVES, stage_config.RFT}
    assert set(stage_config.GROUP_OBJECTIVES) == {n for n, o in OBJECTIVES.items() if o.group}
    assert set(stage_config.CRITIC_OBJECTIVES) == {n for n, o in OBJECTIVES.items() if o.critic}
    assert stage_config.CLIP_HIGH == ragen.CLIP_HIGH
    PpoConfig(objective="ragen", gae="token", critic="head", step_baseline=False)


def test_a_mesh_needs_its_partition():
    RowsConfig(partition="mesh", mesh="data:2")
    with pytest.raises(UserError, match="--mesh=data:2 needs --partition=mesh"):
        dataclasses.replace(RowsConfig(), mesh="data:2")


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
        ({"meet_timeout_s": 0}, "--meet_timeout_s=0 must be >= 1"),
    ],
)
def test_processes_that_could_not_find_each_other_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        DistributedConfig(**settings)
    DistributedConfig(coordinator_address="[::1]:1", num_processes=2, process_id=1)
    DistributedConfig(distributed=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RowsConfig(row_buckets=0), "--row_buckets=0 must be >= 1"),
        (lambda: RowsConfig(row_buckets=2000), "--row_buckets=2000 must be in 1 to --row_length"),
        (lambda: RowsConfig(policy_slots=2000), "--policy_slots=2000 exceeds --row_length=1024"),
        (lambda: ComputeConfig(logits_chunk=-1), "--logits_chunk=-1 must be >= 0"),
        (lambda: SftConfig(checkpoint_every=-1), "--sft_checkpoint_every=-1 must be >= 0"),
        (lambda: SftConfig(row_buckets=-1), "--sft_row_buckets=-1 must be >= 0"),
        (lambda: SftConfig(ema=1.0), "--sft_ema=1 must be at least 0 and below 1"),
        (lambda: PpoConfig(checkpoint_every=-1), "--ppo_checkpoint_every=-1 must be >= 0"),
        (lambda: PpoConfig(learning_rate=-1e-5), "--ppo_learning_rate=-1e-05 must be above 0"),
        (lambda: PpoConfig(clip=-0.2), "--ppo_clip=-0.2 must be above 0"),
        (lambda: PpoConfig(gamma=1.1), "--gamma=1.1 must be at least 0 and at most 1"),
        (lambda: SamplingConfig(top_p=0.0), "--top_p=0 must be above 0 and at most 1"),
        (lambda: SamplingConfig(temperature=0.0, top_k=5), "--temperature=0 is greedy.*--top_k"),
        (lambda: SamplingConfig(stop=("a", "")), "--stop: one of the texts is empty"),
        (lambda: SamplingConfig(max_new_tokens=1024), "--max_new_tokens=1024 leaves no room"),
        (lambda: LoraConfig(alpha=0.0), "--lora_alpha=0"),
        (lambda: LoraConfig(rank=-1), "--lora_rank=-1"),
        (lambda: CreditConfig(alpha=math.nan), "--alpha=nan must be a finite number"),
        (lambda: CreditConfig(beta=math.inf), "--beta=inf must be a finite number"),
        (lambda: DataConfig(min_receptacles=9), "--min_receptacles=9 exceeds --max_receptacles=8"),
        (lambda: EnvConfig(max_steps=0), "--max_steps=0 must be >= 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


SECTIONS = [type(config) for _, config in settings_lib.sections(Settings())]
CONFIGS = [*SECTIONS, DistributedConfig, ServerConfig]
FIELDS = [(config, field) for config in CONFIGS for field in settings_lib.fields(config)]


def _made(config: type, **values):
    return config(**({"data_dir": "x"} if config is ServerConfig else {}) | values)


@pytest.mark.parametrize(
    ("config", "field"), FIELDS, ids=[settings_lib.flag_of(field) for _, field in FIELDS]
)
def test_every_setting_refuses_what_it_cannot_be(config, field):
    """Of every number the value beyond each end of its range, and what is no number at all."""
    flag, limits = settings_lib.flag_of(field), field.metadata
    wrong: list = []
    if isinstance(field.default, float):
        wrong += [math.nan, math.inf, -math.inf]
    wrong += [limits[name] for name in ("above", "below") if limits[name] is not None]
    wrong += [limits["minimum"] - 1] if limits["minimum"] is not None else []
    wrong += [limits["maximum"] + 1] if limits["maximum"] is not None else []
    if settings_lib.choices(field):
        wrong.append(("nothing",) if isinstance(field.default, tuple) else "nothing")
    made = _made(config)
    for value in wrong:
        with pytest.raises(UserError, match=f"--{flag}="):
            _made(config, **{field.name: value})
        with pytest.raises(UserError, match=f"--{flag}="):
            dataclasses.replace(made, **{field.name: value})


def test_every_number_has_a_range():
    """But weights of a sum, seeds of names, and what the processes check together."""
    free = {"alpha", "beta", "num_processes", "process_id", "openenv_reward_scale"}
    free.add("openenv_tasks")
    for _, field in FIELDS:
        is_number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        if is_number and settings_lib.flag_of(field) not in free:
            assert settings_lib.limits(field), settings_lib.flag_of(field)


def test_a_literal_names_the_choices():
    (field,) = (f for f in settings_lib.fields(PpoConfig) if f.name == "kl")
    assert settings_lib.choices(field) == ("loss", "reward")
    with pytest.raises(UserError, match="--kl=both: .both. is none of loss, reward"):
        PpoConfig(kl="both")


def test_lists_name_what_there_is():
    for wrong in (("q", "w"), (), ("q", "q")):
        with pytest.raises(UserError, match="--lora_targets=.* of q,k,v,o,gate,up,down"):
            LoraConfig(targets=wrong)
    with pytest.raises(UserError, match="--lora_stages=explore: 'explore' is none of sft,prog"):
        MethodConfig(lora_stages=("explore",))


def test_a_run_trains_adapters_in_the_stages_named():
    lora = LoraConfig(rank=4)
    settings = Settings(method=MethodConfig(lora_stages=("ppo",)), lora=lora)
    assert settings.adapters("ppo") == lora and settings.adapters("sft").rank == 0


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"ppo": PpoConfig(objective="grpo"), "explore": ExploreConfig(rollouts=1)},
            "--objective=grpo.*--rollouts",
        ),
        (
            {"ppo": PpoConfig(objective="rft"), "credit": CreditConfig(credit="uniform")},
            "--credit=uniform with --objective=rft",
        ),
        (
            {"compute": ComputeConfig(attention="splash"), "rows": RowsConfig()},
            "--share_prefix with --attention=splash",
        ),
        (
            {"lora": LoraConfig(rank=4), "ppo": PpoConfig(train_layers=1)},
            "--lora_rank=4.*--ppo_train_layers=1",
        ),
        (
            {"lora": LoraConfig(rank=4), "sft": SftConfig(train_layers=1)},
            "--lora_rank=4.*--sft_train_layers=1",
        ),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(sections, words):
    with pytest.raises(UserError, match=words):
        Settings(**sections)
    with pytest.raises(UserError, match=words):
        dataclasses.replace(Settings(), **sections)


def test_flags_of_a_run_have_one_name_each():
    names = [settings_lib.flag_of(field) for c in SECTIONS for field in settings_lib.fields(c)]
    assert len(set(names)) == len(names) == len(settings_lib.by_flag(Settings()))
    assert stage_config.RFT in settings_lib.choices(dataclasses.fields(PpoConfig)[0])
