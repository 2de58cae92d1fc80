"""Before the first stage: games are generated; nothing that is held out is trained on."""

from spa_jax import games, play, provenance
from spa_jax.envs.protocol import Task
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.runtime import children, distributed


def run(run: Run) -> Run:
    """Makes the games that --generate_* asks for; returns the run on them.

    A run with data of its own, or with a server elsewhere, stays as it is.

    Raises:
      UserError: a generator fails, or a held-out game shares its layout or seed with another.
    """
    env = run.settings.env
    if not (env.data or env.env_address):
        provenance.check_stage(run, "games", run.games, inputs={})
        _generate(run)
        run = run.on_its_games()
        provenance.record_environment(run)
    _check_splits(run)
    return run


def _generate(run: Run) -> None:
    settings = run.settings
    commands = games.commands(settings.env.env, settings.data, settings.method, run.games)

    def generate() -> None:
        for command in commands:
            # A process of its own: the generator loads the environment, the trainer never does.
            if children.run(command):
                raise UserError(f"the generator of {run.games} failed, see its message above")

    distributed.first_alone("games", generate)


def _check_splits(run: Run) -> None:
    """Asserts at start that nothing held out is ever trained on."""
    method, data = run.settings.method, run.settings.data
    names = {run.settings.explore.split, data.heldout_split}
    if not method.base and not method.demonstrations:
        names |= {data.demo_split, data.demo_valid_split}
    with play.open_env(run.settings.env, 1, run.server_log) as client:
        splits = {name: client.tasks(name) for name in sorted(names)}
    assert_disjoint(splits, data.heldout_split)


def assert_disjoint(splits: dict[str, list[Task]], heldout: str) -> None:
    """No held-out game shares its layout or its generator's seed with a training stage.

    Raises:
      UserError: if one does.
    """
    for split, tasks in splits.items():
        if split == heldout:
            continue
        layouts = {t.layout for t in tasks} & {t.layout for t in splits[heldout]}
        seeds = {t.seed for t in tasks if t.seed is not None}
        seeds &= {t.seed for t in splits[heldout] if t.seed is not None}
        if layouts or seeds:
            raise UserError(
                f"split {split} shares {len(layouts)} layouts and seeds {sorted(seeds)} with the "
                f"held-out split {heldout}: generate them with other seeds"
            )
