"""A whole study, from its games to its page."""

from collections.abc import Sequence
from typing import Any

from spa_jax import files, method
from spa_jax.errors import UserError
from spa_jax.runtime import interrupt
from spa_jax.stages import prepare
from spa_jax.study import page, record, runner
from spa_jax.study.plan import Study
from spa_jax.study.record import Ran
from spa_jax.study.runner import Runner


def run(study: Study, ran: Ran, command: Sequence[str], workers: int) -> dict[str, Any]:
    """Runs what has not finished; study.json and the page are written after every run.

    Args:
      study: the study.
      ran: how it was started.
      command: that starts it, to which --only is added.
      workers: runs at a time.

    Returns:
      What study.json holds.

    Raises:
      UserError: a policy has no chat format, a finished run was made from other settings, or
        another study runs in the folder.
    """
    if workers < 1:
        raise UserError(f"--jobs={workers} must be at least 1")
    method.check(study.preset)
    with runner.alone(study.files), runner.ended_by_sigterm():
        interrupt.watch()
        going = Runner(study, command, workers, lambda going: _write(study, going, ran))
        env = study.preset.settings.env
        if going.left and not (env.data or env.env_address):
            prepare.run(study.preset)
        finished, every = going.arms()
        print(
            f"{len(study.arms)} arms, {len(study.seeds)} seeds: {finished} of {every} runs have "
            f"finished; {workers} at a time",
            flush=True,
        )
        going.run()
        return _write(study, going, ran)


def _write(study: Study, going: Runner, ran: Ran) -> dict[str, Any]:
    found = record.record(study, going, ran)
    files.write_json(study.files.json, found)
    page.write(found, study.files.page)
    return found
