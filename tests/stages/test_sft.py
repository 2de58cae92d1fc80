"""SFT as a stage of a run."""

import pytest

from spa_jax import policy, store
from spa_jax.config import ChatConfig, RowsConfig
from spa_jax.errors import UserError
from spa_jax.models.io import huggingface
from spa_jax.stage_config import SftConfig
from spa_jax.stages import sft
from spa_jax.trajectory import Step
from tests import runs, test_chat, tiny


@pytest.fixture
def thinking(tmp_path):
    """A policy whose own template drops earlier thoughts."""
    words = tiny.tiny_tokenizer(tmp_path / "words", test_chat.DROPS_THOUGHTS)
    config = tiny.tiny_config()
    huggingface.save_pretrained(tmp_path / "thinking", config, tiny.tiny_params(config), words)
    return tmp_path / "thinking"


@pytest.mark.slow
def test_sft_trains_in_the_format_that_it_is_given(thinking, tmp_path):
    thought = Step("You see a mug.", "<think>\nMug.\n</think>\n\ntake mug", "take mug", True)
    settings = {"sft": SftConfig(updates=1, batch_size=1), "rows": RowsConfig(128, 64, 16, 1)}
    run = runs.make(tmp_path, thinking, **settings)
    store.write(run.demonstrations("train"), [runs.demonstration("game", thought, thought)])
    with pytest.raises(UserError, match="--chat_format=chatml"):
        sft.run(run)
    run = runs.make(tmp_path, thinking, **settings, chat=ChatConfig("chatml"))
    sft.run(run)
    assert policy.load(run.base).chat_format == "chatml"
