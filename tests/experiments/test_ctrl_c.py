"""Ctrl-C on a real terminal: the first press saves and ends, the second ends at once."""

import dataclasses
import pathlib
import threading
import time

import psutil
import pytest

from spa_jax import store
from spa_jax.envs.client import EnvClient, Session
from spa_jax.envs.protocol import EnvError
from spa_jax.training import metrics
from tests import programs, tiny
from tests.experiments import small
from tests.terminal import Terminal

# More updates than a test waits for, and no checkpoint but the one that Ctrl-C asks for.
STAGES = {
    "sft": ("--sft_updates=10000", "--sft_batch_size=4", "--sft_checkpoint_every=0"),
    "train_progress": ("--progress_epochs=10000", "--progress_batch_size=4", "--progress_width=16"),
    "train_ppo": ("--ppo_epochs=10000", "--ppo_batch_size=4", "--ppo_checkpoint_every=0"),
}
ENDED = "stopped by Ctrl-C"
AGAIN = "run the same command again to continue"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """One for all stages, with a policy that all start from."""
    folder = tmp_path_factory.mktemp("ctrl_c")
    tiny.tiny_policy(folder / "tiny")
    return folder


def _program(name: str, workdir: pathlib.Path, *flags: str) -> Terminal:
    command = ("-m", f"experiments.{name}", f"--workdir={workdir}", *flags)
    return Terminal(*command, f"--policy={workdir / 'tiny'}")


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 15
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    "stage", ["sft", "train_progress", pytest.param("train_ppo", marks=pytest.mark.slow)]
)
def test_a_training_stage_saves_the_update_and_goes_on_from_it(stage, workdir):
    """Bit for bit: `test_resume`."""
    out = small.prepare(stage, workdir)
    file = out / "metrics.jsonl"
    saved = [0]
    for _ in range(2):
        before = programs.lines(file)
        terminal = _program(stage, workdir, *small.ROWS, *STAGES[stage])
        terminal.wait_until(lambda least=before + 2: programs.lines(file) >= least)
        terminal.press_ctrl_c()
        terminal.end_by_ctrl_c()
        # What another Ctrl-C would do is said at once, how to go on at the end.
        assert terminal.said.count("press again to end at once") == 1, terminal.said
        (line,) = [line for line in terminal.said.splitlines() if ENDED in line]
        assert line.endswith(AGAIN)
        steps = [p.name for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
        saved.append(int(steps[0]))
        assert len(steps) == 1 and f"after update {saved[-1]} of" in line
        assert saved[-1] > saved[-2], "the second run began anew"
    updates = [record["update"] for record in metrics.read_metrics(file)]
    per_line = updates[0]  # the estimator writes a line an epoch
    assert updates == [per_line * (i + 1) for i in range(saved[-1] // per_line)]
    assert not (out / "done.json").exists()


def test_a_second_press_does_not_wait_for_the_update(workdir, tmp_path):
    small.prepare("sft", tmp_path)
    file = tmp_path / "demos" / "train" / "trajectories.jsonl"
    demo = store.read(file)[0]
    store.write(file, [dataclasses.replace(demo, task=f"train_{i}") for i in range(500)])
    (tmp_path / "tiny").symlink_to(workdir / "tiny")
    flags = ("--sft_batch_size=500", "--sft_updates=9", "--row_length=128", "--policy_slots=64")
    terminal = _program("sft", tmp_path, *flags, "--step_slots=16", "--rows_per_device=1")
    terminal.wait_for("sft:   0%")
    time.sleep(0.5)
    terminal.press_ctrl_c()
    terminal.wait_for("press again to end at once")
    terminal.press_ctrl_c()
    terminal.end_by_ctrl_c(timeout=10)
    assert "ended at once: Ctrl-C was pressed again" in terminal.said and ENDED not in terminal.said


def test_it_ends_while_it_is_still_importing(workdir):
    terminal = _program("train_ppo", workdir)
    maps = pathlib.Path(f"/proc/{terminal.process.pid}/maps")
    terminal.wait_until(lambda: "jaxlib" in maps.read_text())
    terminal.press_ctrl_c()
    terminal.end_by_ctrl_c(timeout=10)
    assert terminal.said.splitlines()[-1].endswith(ENDED)


def test_exploration_ends_at_once_and_its_server_with_it(workdir, tmp_path):
    (tmp_path / "tiny").symlink_to(workdir / "tiny")
    file = tmp_path / "iteration_0" / "explore" / "trajectories.jsonl"
    terminal = _program(
        "explore",
        tmp_path,
        "--env=custom",
        "--custom_data=tests.envs.odd:Counting",
        "--rollouts=500",
        "--slots=3",
        "--max_new_tokens=12",
        "--context_length=512",
    )
    terminal.wait_until(lambda: programs.lines(file) >= 3)
    others = psutil.Process(terminal.process.pid).children(recursive=True)
    assert len(others) >= 3, "no server, fork server and worker"
    terminal.press_ctrl_c()
    pressed = time.monotonic()
    terminal.end_by_ctrl_c(timeout=15)
    assert time.monotonic() - pressed < 10
    lines = [line for line in terminal.said.splitlines() if ENDED in line]
    assert len(lines) == 1 and lines[0].endswith(AGAIN)
    assert all(_gone(other.pid) for other in others)
    assert store.read(file)
    for log in tmp_path.rglob("*.log"):
        assert "Traceback" not in log.read_text(), log


def _sleep(session: Session) -> None:
    with pytest.raises(EnvError):
        session.step("sleep 50")


@pytest.mark.parametrize("presses", [1, 2])
def test_a_server_finishes_its_calls_or_ends_at_the_second_press(presses):
    terminal = Terminal(
        "-m",
        "experiments.serve_env",
        "--env=custom",
        "--custom_data=tests.envs.odd:Odd",
        "--port=0",
        "--drain_s=60",
    )
    terminal.wait_for("listening on ")
    terminal.wait_for("\n")
    address = terminal.said.split("listening on ")[1].split()[0]
    session = EnvClient(address).session()
    session.reset("train_0", "train")
    worker = session.state()["worker"]
    if presses == 2:
        threading.Thread(target=_sleep, args=(session,)).start()
        time.sleep(0.5)
    terminal.press_ctrl_c()
    if presses == 2:
        terminal.wait_for("stopping")
        terminal.press_ctrl_c()
    terminal.end_by_ctrl_c(timeout=15)
    last = ENDED if presses == 1 else "ended at once: Ctrl-C was pressed again"
    assert terminal.said.splitlines()[-1].endswith(last)
    assert _gone(worker)
