import pytest

from spa_jax.envs.alfworld import prompt
from spa_jax.errors import UserError


@pytest.mark.parametrize(
    ("action", "command"),
    [
        ("put mug 1 in/on desk 2", "put mug 1 in/on desk 2"),
        ("put mug 1 in desk 2", "put mug 1 in/on desk 2"),
        ("put mug 1 on desk 2", "put mug 1 in/on desk 2"),
        ("move mug 1 to desk 2", "put mug 1 in/on desk 2"),
        ("move  mug 1 to desk 2 ", "put mug 1 in/on desk 2"),
        ("toggle desklamp 1", "use desklamp 1"),
        ("toggle desklamp 1 sidetable 2", "use desklamp 1"),
        ("use desklamp 1", "use desklamp 1"),
        ("take mug 1 from desk 2", "take mug 1 from desk 2"),
        ("go to desk 1.", "go to desk 1"),
        ("put mug 1", "put mug 1"),
        ("", ""),
    ],
)
def test_to_command_accepts_both_wordings(action: str, command: str) -> None:
    assert prompt.to_command(action) == command


def test_arrival_is_not_shown() -> None:
    assert prompt.shown("You arrive at desk 1. On the desk 1, you see nothing.") == (
        "On the desk 1, you see nothing."
    )
    assert prompt.shown("You arrive at loc 12. The safe 1 is closed.") == "The safe 1 is closed."
    assert prompt.shown("You open the safe 1.") == "You open the safe 1."


def test_instructions() -> None:
    paper, short = prompt.instruction("paper"), prompt.instruction("short")
    assert paper.startswith("Interact with a household to solve a task.")
    for text in (paper, short):
        for verb in ("go to", "open", "take", "put", "in/on", "clean", "heat", "cool"):
            assert verb in text
    assert "Thought" in paper and "Thought" not in short
    # Tokens of a byte-pair tokenizer: about one a word, one a punctuation mark.
    assert len(short.replace(",", " ,").replace(".", " .").split()) <= 60
    with pytest.raises(UserError, match="paper, short"):
        prompt.instruction("long")
