import pytest

from spa_jax.envs.virtualhome import prompt
from spa_jax.envs.virtualhome.actions import TEMPLATES, command, parse
from spa_jax.envs.virtualhome.simulator import library
from spa_jax.errors import UserError


def test_there_are_42_and_the_simulator_knows_them() -> None:
    assert len(TEMPLATES) == 42
    actions = library().scripts.Action.__members__
    for name, template in TEMPLATES.items():
        assert name == "RELEASE" or template.count("{}") == actions[name].value[1]


@pytest.mark.parametrize("action", [name for name in TEMPLATES if name != "RELEASE"])
def test_a_program_step_is_read_back(action: str) -> None:
    names = ("kitchen_table", "mug")[: TEMPLATES[action].count("{}")]
    assert parse(command(action, names)) == (action, names)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("walk to home office", ("WALK", ("home_office",))),
        ("  Put Mug on Coffee Table ", ("PUTBACK", ("mug", "coffee_table"))),
        ("put mug in sink", ("PUTIN", ("mug", "sink"))),
        ("put back mug", ("PUTOBJBACK", ("mug",))),
        ("put on shirt", ("PUTON", ("shirt",))),
        ("stand up", ("STANDUP", ())),
        ("Step 3: open fridge", ("OPEN", ("fridge",))),
        # What fits no template is tried word by word, as published.
        ("walk chair", ("WALK", ("chair",))),
        ("release mug", ("RELEASE", ("mug",))),
        ("pour milk glass", ("POUR", ("milk", "glass"))),
        ("grab the red mug", ("GRAB", ("the_red_mug",))),
        # The published template of "release" has no object, but the action needs one.
        ("release", None),
        # Fits two templates, and then no action's name.
        ("put back mug on table", None),
        ("put mug table", None),
        ("", None),
        ("dance", None),
        ("sleep now", None),
        ("walk to", ("WALK", ("to",))),
    ],
)
def test_parse(text: str, parsed: object) -> None:
    assert parse(text) == parsed


def test_the_prompt_lists_27_of_them() -> None:
    listed = prompt.instruction("paper").partition("actions are:\n")[2].partition("\n\n")[0]
    templates = set(TEMPLATES.values())
    lines = [line.replace("{obj}", "{}").replace("{recep}", "{}") for line in listed.split("\n")]
    assert len(lines) == 27 and set(lines) <= templates
    with pytest.raises(UserError, match="paper, short"):
        prompt.instruction("long")
