"""The arms of a study: names, variants, and what no arm may change."""

import dataclasses

import pytest

from spa_jax import settings as settings_lib
from spa_jax.errors import UserError
from spa_jax.stage_config import ExploreConfig, PpoConfig, Settings
from spa_jax.study import arms

PRESET = Settings(
    explore=ExploreConfig(rollouts=2), ppo=PpoConfig(critic="ridge", kl="reward", kl_coef=0.1)
)


def test_every_arm_goes_with_presets_of_all_kinds():
    """Whatever a preset sets: a ridge critic, a KL among the rewards, GAE over tokens."""
    many = ExploreConfig(rollouts=2)
    for ppo in (
        PpoConfig(),
        PpoConfig(critic="ridge", step_baseline=True),
        PpoConfig(kl="reward", kl_coef=0.1, entropy_coef=0.01, truncate_ratio=3.0),
        PpoConfig(gae="token"),
    ):
        for chosen in arms.choose(list(arms.ARMS), Settings(explore=many, ppo=ppo)):
            for word in chosen.arm.flags.split():
                flag, value = word.split("=")
                now = settings_lib.by_flag(chosen.settings)[flag][1]
                assert str(now).lower() == value or now == float(value)


def test_what_an_arm_changes_is_told():
    spa, terminal, ppo = arms.choose(["spa", "terminal", "ppo_step"], PRESET)
    assert spa.settings == PRESET and spa.changed == {}
    assert terminal.changed == {"credit": "terminal"}
    assert ppo.changed == {"credit": "terminal", "critic": "head"}


def test_a_variant_is_an_arm_with_other_values():
    name = "spa:ppo_kl_coef=0.02:gae_lambda=1:credit_residual=true:lora_stages=sft,progress"
    (found,) = arms.choose([name], PRESET)
    assert found.changed == {
        "ppo_kl_coef": 0.02,
        "gae_lambda": 1.0,
        "credit_residual": True,
        "lora_stages": ("sft", "progress"),
    }
    assert found.name == name and found.folder.startswith("spa_ppo_kl_coef=0.02_gae_lambda=1_")
    (over,) = arms.choose(["terminal:credit=uniform"], PRESET)
    assert over.settings.credit.credit == "uniform"  # what is said last


def test_arms_that_compute_the_same_are_known():
    terminal, ridge, ppo, none = arms.choose(
        ["terminal", "ridge", "ppo_step", "spa_no_progress"], PRESET
    )
    assert terminal.same_as(ridge) and terminal.same_as(none) and not terminal.same_as(ppo)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["spa", "magic"], "'magic' is none of sft, continued_sft"),
        ([], "--arms is empty"),
        (["spa", "spa"], "names spa twice"),
        (["spa:beta"], "'beta' is no FLAG=VALUE"),
        (["spa:betta=1"], "'betta=1' is no FLAG=VALUE"),
        (["spa:beta=much"], "--beta=much: 'much' is not a number"),
        (["spa:ppo_epochs=1.5"], "'1.5' is not a whole number"),
        (["spa:credit_residual=maybe"], "give true or false"),
        (["spa:credit=all"], "--credit=all: 'all' is none of"),
        (["spa:heldout_games=3"], "cannot set --heldout_games"),
        (["spa:max_steps=3"], "cannot set --max_steps"),
        (["spa:base=mine"], "cannot set --base"),
        (["spa:sft_epochs=3"], "--sft_epochs makes the base"),
        (["sft:beta=1"], "nothing of it can be set"),
        (["ppo_token:critic=ridge"], "--arms: ppo_token:critic=ridge: --critic=ridge with"),
    ],
)
def test_a_mistake_names_the_arm(names, said):
    with pytest.raises(UserError) as error:
        arms.choose(names, PRESET)
    assert said in str(error.value)


def test_rollouts_that_a_group_needs():
    one = dataclasses.replace(PRESET, explore=ExploreConfig(rollouts=1))
    with pytest.raises(UserError, match="--arms: grpo: --objective=grpo compares.*--rollouts"):
        arms.choose(["spa", "grpo"], one)


def test_continued_sft_may_have_its_own_rate():
    (found,) = arms.choose(["continued_sft:sft_learning_rate=1e-5"], PRESET)
    assert found.settings.sft.learning_rate == 1e-5


def test_seeds():
    assert arms.seeds("0-3") == [0, 1, 2, 3]
    assert arms.seeds("7,0-1") == [7, 0, 1]
    for text, said in (("a", "'a' is no seed"), ("3-1", "'3-1'"), ("", "''"), ("1,0-2", "twice")):
        with pytest.raises(UserError, match=said):
            arms.seeds(text)
