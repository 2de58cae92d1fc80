"""The processes of a study: which run is next, on which cores, and what is said when one ends.

    base          start/seed_0     spa/seed_0      terminal/seed_0   ...
                  start/seed_1     spa/seed_1      ...

Runs are started in the order of their seeds, all arms of a seed before those of the next, so that
a study that is stopped has what it has for all arms.  A run waits for those that it begins with.
"""

import contextlib
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.runtime import children, interrupt
from spa_jax.study import plan, workdir
from spa_jax.study.plan import Study
from spa_jax.study.workdir import Workdir

_LOOK_EVERY_S = 0.2
_STOP_WITHIN_S = 25.0  # an update and its checkpoint; a stage that is told to stop takes no longer
_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_SHARE = 0.9  # of an accelerator's memory, for all runs that are at work


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of a study.

    Attributes:
      name: its folder, below the study's.
      run: the run.
      seed: of the study.
      arm: the folder of the arm; `workdir.BASE` or `workdir.START` for what arms begin with.
      after: the names of the jobs that it waits for.
    """

    name: str
    run: Run
    seed: int
    arm: str
    after: tuple[str, ...] = ()


def jobs(study: Study) -> list[Job]:
    """All runs of a study, in the order in which they are started."""
    found: dict[str, Job] = {}
    own = not study.preset.settings.method.base
    for seed in study.seeds:
        before: tuple[str, ...] = ()
        if own:
            base = study.base_run(seed)
            name = str(base.workdir.relative_to(study.files.root))
            found.setdefault(name, Job(name, base, seed, workdir.BASE))
            before = (name,)
        start = _job(study, study.start(seed), seed, workdir.START, before)
        found[start.name] = start
        # Continued SFT gets as many tokens as another arm, so that one is first.
        arms = sorted(study.arms, key=lambda chosen: chosen.arm.kind == "sft")
        for chosen in arms:
            if chosen.arm.kind == "base" or study.twin(chosen) is not chosen:
                continue
            after = [start.name]
            partner = study.partner()
            if chosen.arm.kind == "sft":
                if partner is None:
                    raise UserError(
                        f"--arms: {chosen.name} gets as many tokens as an arm with rounds; add spa "
                        "or terminal"
                    )
                after.append(_job(study, study.run(partner, seed), seed, partner.folder).name)
            job = _job(study, study.run(chosen, seed), seed, chosen.folder, tuple(after))
            found[job.name] = job
    return list(found.values())


def _job(study: Study, run: Run, seed: int, arm: str, after: tuple[str, ...] = ()) -> Job:
    name = run.workdir.relative_to(study.files.root).as_posix()
    return Job(name, run, seed, arm, after)


Results = dict[str, dict[str, Any]]  # what finished runs left, by the job's name


class Runner:
    """Runs what has not finished.

    Attributes:
      results: of the jobs that have finished.
      failed: by job, why.
    """

    def __init__(
        self,
        study: Study,
        command: Sequence[str],
        workers: int,
        on_finished: Callable[["Runner"], object],
    ):
        """Reads what has finished.

        Args:
          study: the study.
          command: of this study, to which --only is added.
          workers: runs at a time.
          on_finished: called when a run has ended, well or not.

        Raises:
          UserError: a finished run was made from other settings, or the arms do not fit.
        """
        self._study, self._command, self._workers = study, command, workers
        self._on_finished = on_finished
        self._jobs = jobs(study)
        found = ((job.name, plan.read_result(study, job.run)) for job in self._jobs)
        self.results: Results = {name: result for name, result in found if result is not None}
        self.failed: dict[str, str] = {}
        self._running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by worker

    @property
    def left(self) -> list[Job]:
        """The jobs that have neither finished nor failed."""
        return [j for j in self._jobs if j.name not in self.results | self.failed]

    def arms(self) -> tuple[int, int]:
        """(finished, all) runs of arms."""
        every = [job for job in self._jobs if job.arm not in workdir.ARMS_OF_ALL]
        return sum(job.name in self.results for job in every), len(every)

    def run(self) -> None:
        """Runs all that is left; a run that fails is told, and the study goes on.

        Raises:
          KeyboardInterrupt, SystemExit: at Ctrl-C or SIGTERM, when the runs have saved what they
            had and ended.
        """
        try:
            while self.left or self._running:
                self._start_ready()
                self._collect()
                time.sleep(_LOOK_EVERY_S)
        except BaseException:
            self._stop()
            raise

    def _start_ready(self) -> None:
        busy = {job.name for job, _, _ in self._running.values()}
        for worker in range(self._workers):
            if worker in self._running:
                continue
            ready = next((j for j in self.left if j.name not in busy and self._ready(j)), None)
            if ready is None:
                return
            busy.add(ready.name)
            self._running[worker] = (ready, self._start(ready, worker), time.time())

    def _ready(self, job: Job) -> bool:
        """Whether a job can start; one that waits for a failed one fails with it."""
        broken = next((name for name in job.after if name in self.failed), None)
        if broken is not None:
            self._fail(job, f"{broken} failed")
            return False
        return all(name in self.results for name in job.after)

    def _start(self, job: Job, worker: int) -> subprocess.Popen:
        job.run.workdir.mkdir(parents=True, exist_ok=True)
        env = dict(os.environ)
        if self._workers > 1:
            env.setdefault(_MEMORY, f"{_SHARE / self._workers:.3f}")
        return children.start(
            [*self._command, f"--only={job.name}"],
            log=workdir.log(job.run.workdir),
            cores=cores_of(worker, self._workers),
            env=env,
        )

    def _collect(self) -> None:
        """Reads what runs that have ended left."""
        for worker, (job, child, began) in list(self._running.items()):
            status = child.poll()
            if status is None:
                continue
            if child.stdin:
                child.stdin.close()
            del self._running[worker]
            result = plan.read_result(self._study, job.run) if status == 0 else None
            if result is None:
                self._fail(job, f"{_last_words(job.run)} ({_how(status)})")
            else:
                self.results[job.name] = result
                self._say(job, result, time.time() - began)
                self._on_finished(self)

    def _fail(self, job: Job, why: str) -> None:
        self.failed[job.name] = why
        print(f"{job.name}: FAILED: {why}; see {workdir.log(job.run.workdir)}", flush=True)
        self._on_finished(self)

    def _say(self, job: Job, result: Mapping[str, Any], seconds: float) -> None:
        finished, every = self.arms()
        tail = f"{seconds:.0f} s | {finished} of {every}, {self._remaining()}"
        if job.arm == workdir.BASE:
            print(f"{job.name}: the base is made, {tail}", flush=True)
            return
        won = len(result["won"])
        games = won + len(result["lost"])
        arm = "the base" if job.arm == workdir.START else self._study.arm(job.arm).name
        rate = f"{100 * won / games:.1f}%" if games else "none"
        print(f"{arm} seed {job.seed}: {rate} of {games} games, {tail}", flush=True)

    def _remaining(self) -> str:
        """When all will have finished, if the others take as long as those before them."""
        took: dict[bool, list[float]] = {True: [], False: []}
        for job in self._jobs:
            if job.name in self.results:
                took[job.arm in workdir.ARMS_OF_ALL].append(self.results[job.name]["wall_s"])
        every = took[True] + took[False]
        if not self.left:
            return "done"
        expected = 0.0
        for job in self.left:
            own = took[job.arm in workdir.ARMS_OF_ALL] or every
            expected += sum(own) / len(own)
        for _, _, began in self._running.values():
            expected -= min(time.time() - began, sum(every) / len(every))
        return f"ETA {clock(expected / min(self._workers, len(self.left)))}"

    def _stop(self) -> None:
        """Ends the runs as a scheduler would: each saves the update that it is at."""
        for _, child, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_WITHIN_S
        for _, child, _ in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, deadline - time.monotonic()))
            children.kill(child)
        finished, every = self.arms()
        interrupt.say(
            f"{finished} of {every} runs have finished; run the same command again to go on"
        )


def cores_of(worker: int, workers: int) -> list[int]:
    """A worker's share of this process's cores; [] if there are fewer cores than workers.

    Two runs that both think they have all cores wait for each other's threads.
    """
    if workers < 2 or not hasattr(os, "sched_getaffinity"):
        return []
    every = sorted(os.sched_getaffinity(0))
    first, last = (len(every) * i // workers for i in (worker, worker + 1))
    return every[first:last] if len(every) >= workers else []


def clock(seconds: float) -> str:
    """A time as hours:minutes:seconds."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _last_words(run: Run) -> str:
    """What a run that failed said: its complaint, or else its last line."""
    text = workdir.log(run.workdir).read_text(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    return (said or lines or ["it said nothing"])[-1].removeprefix("error: ")[:400]


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


@contextlib.contextmanager
def alone(files: Workdir) -> Iterator[None]:
    """Within it, no other study runs in the folder.

    Raises:
      UserError: one does.
    """
    files.root.mkdir(parents=True, exist_ok=True)
    with files.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"--workdir={files.root}: a study runs there already; wait for it, or give another"
            ) from error
        yield


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit, so that the runs are ended before this process is."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def own_command(program: str, argv: Sequence[str]) -> list[str]:
    """The command that runs this program with the same arguments."""
    return [sys.executable, "-m", f"experiments.{program}", *argv[1:]]


def stop_with_parent() -> None:
    """A run of a study ends when the study does, however that ends."""
    children.at_end_of_parent(children.end_session)
