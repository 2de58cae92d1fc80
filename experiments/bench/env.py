"""Environment steps a second of one worker: stock TextWorld, memoised, and through the server.

The floor is the memoised engine's step in its own process; a session's step adds the
pipe, two threads and the WebSocket to it.  What these cost by themselves is measured with an
environment that does nothing.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from absl import flags

from spa_jax.envs.local import LocalServer
from spa_jax.envs.protocol import Observation
from spa_jax.envs.worker import resident_mb
from spa_jax.server_config import ServerConfig

_GAMES, _SEED, _SPLIT = 12, 1, "bench"
_ROUNDS = 3  # the median of them is reported
_EMPTY_STEPS = 2000


class Nothing:
    """An environment that does nothing: a step of it costs what the protocol costs."""

    instruction = "Do anything."
    splits = (_SPLIT,)

    def tasks(self, split: str) -> list[str]:
        """One task."""
        return ["nothing"]

    def reset(self, task: str, seed: int) -> str:
        """Starts it."""
        return "Nothing is here."

    def step(self, action: str) -> Observation:
        """An observation as long as ALFWorld's."""
        return Observation("Nothing happens. " * 6, 0.0, False, False, False)


def _make_games(root: str) -> float:
    """Seconds a game."""
    from spa_jax.envs.alfworld.generate import generate

    generate(Path(root) / "warm-up", games=1, seed=_SEED + 1)
    start = time.perf_counter()
    generate(Path(root) / _SPLIT, games=_GAMES, seed=_SEED)
    return (time.perf_counter() - start) / _GAMES


def _in_process(root: str, memoised: bool) -> tuple[float, float]:
    """Median (seconds a reset, seconds a step) of the expert's games in this process."""
    from spa_jax.envs.alfworld.engine import AlfworldEngine

    engine = AlfworldEngine(memoised)
    folders = sorted((Path(root) / _SPLIT).glob("*/*"))
    engine.reset(folders[0])  # parses the grammar
    return _time(engine, [(folder,) for folder in folders])


def _play(player: Any, game: tuple[Any, ...]) -> tuple[float, float, int]:
    """The expert's game: seconds of the reset, seconds of the steps, and how many there were.

    Args:
      player: an engine, or a session that plays as one.
      game: what its reset takes.
    """
    start = time.perf_counter()
    observation = player.reset(*game, expert=True)
    middle, count = time.perf_counter(), 0
    while not observation.done:
        observation = player.step(observation.expert_action)
        count += 1
    return middle - start, time.perf_counter() - middle, count


def _time(player: Any, games: Sequence[tuple[Any, ...]]) -> tuple[float, float]:
    """Median over the rounds of (seconds a reset, seconds a step) of the expert's games."""
    resets, steps = [], []
    for _ in range(_ROUNDS):
        resetting, stepping, counts = zip(*(_play(player, game) for game in games), strict=True)
        resets.append(sum(resetting) / len(games))
        steps.append(sum(stepping) / sum(counts))
    return statistics.median(resets), statistics.median(steps)


def _through_the_server(root: str) -> tuple[float, float, float]:
    """Seconds to the server's health, a reset, a step."""
    start = time.perf_counter()
    with LocalServer(ServerConfig(root, games_per_worker=1000)) as server:
        started = time.perf_counter() - start
        client = server.client()
        tasks = client.tasks(_SPLIT)
        with client.session() as session:
            session.reset(tasks[0].task, _SPLIT)
            return started, *_time(session, [(task.task, _SPLIT) for task in tasks])


def _benchmarks(root: str) -> dict[str, ServerConfig]:
    """A server of each benchmark, on data that is generated here; its processes are kept."""
    from spa_jax.envs.virtualhome import generate as homes
    from spa_jax.envs.webshop import generate as shop

    homes.generate(Path(root) / "homes" / _SPLIT, tasks=24, seed=_SEED)
    shop.generate(Path(root) / "shop", products=200, goals=200, seed=_SEED, splits=f"{_SPLIT}:1")
    data = {"alfworld": root, "webshop": f"{root}/shop", "virtualhome": f"{root}/homes"}
    return {
        name: ServerConfig(folder, env=name, games_per_worker=10**9, worker_memory_mb=8192)
        for name, folder in data.items()
    }


def _memory(config: ServerConfig, episodes: int) -> dict[int, float]:
    """MiB of one worker after 10, 100, ... `episodes` episodes of the expert, files left out."""
    marks = sorted({min(n, episodes) for n in (10, 100, episodes)})
    found = {}
    with LocalServer(config) as server:
        client = server.client()
        tasks = client.tasks(_SPLIT)
        with client.session() as session:
            for played in range(1, episodes + 1):
                task = tasks[played % len(tasks)]
                _play(session, (task.task, _SPLIT, played))
                if played in marks:
                    found[played] = resident_mb(psutil.Process(session.state()["worker"]))
    return found


def _protocol() -> tuple[float, float]:
    """Median and 99th percentile of the seconds of a step that does nothing, on loopback."""
    config = ServerConfig("experiments.bench.env:Nothing", env="custom", messages_per_s=0)
    seconds = []
    with LocalServer(config) as server, server.client().session() as session:
        session.reset("nothing", _SPLIT)
        for _ in range(_EMPTY_STEPS):
            start = time.perf_counter()
            session.step("look")
            seconds.append(time.perf_counter() - start)
    hundredths = statistics.quantiles(seconds, n=100)
    return hundredths[49], hundredths[98]


def run() -> None:
    """Prints the figures and a last RESULT line."""
    # The engine is for other processes than this one, and memoising it is for good.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        with context.Pool(1) as pool:
            generating = pool.apply(_make_games, (root,))
        with context.Pool(1) as pool:
            stock_reset, stock_step = pool.apply(_in_process, (root, False))
        with context.Pool(1) as pool:
            reset, step = pool.apply(_in_process, (root, True))
        started, served_reset, served_step = _through_the_server(root)
        memory = {
            name: _memory(config, flags.FLAGS.memory_episodes)
            for name, config in _benchmarks(root).items()
        }
    median, p99 = _protocol()
    print(f"generating              {generating * 1e3:8.1f} ms a game")
    print(f"{'':22}{'reset ms':>10}{'step ms':>10}{'steps/s':>10}")
    for name, reset_s, step_s in (
        ("stock, in process", stock_reset, stock_step),
        ("memoised, in process", reset, step),
        ("memoised, served", served_reset, served_step),
    ):
        print(f"{name:22}{reset_s * 1e3:10.1f}{step_s * 1e3:10.2f}{1 / step_s:10.0f}")
    print(f"server start {started:.2f} s")
    for name, sizes in memory.items():
        grown = ", ".join(f"{mb:.0f} MB after {episodes}" for episodes, mb in sizes.items())
        print(f"a worker of {name}: {grown} episodes")
    print(f"protocol alone: {median * 1e3:.2f} ms a step, {p99 * 1e3:.2f} ms the 99th percentile")
    print(
        f"floor: one in-process step, {step * 1e3:.2f} ms; a served step reaches "
        f"{step / served_step:.0%} of its rate"
    )
    print(
        f"RESULT steps_per_second={1 / served_step:.1f} in_process={1 / step:.1f} "
        f"stock={1 / stock_step:.1f} share_of_floor={step / served_step:.3f} "
        f"protocol_ms={median * 1e3:.3f} protocol_p99_ms={p99 * 1e3:.3f} "
        + " ".join(f"{name}_mb={[*sizes.values()][-1]:.0f}" for name, sizes in memory.items())
    )
