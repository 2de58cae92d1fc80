"""A run knows itself: what it ran with, and which settings and inputs each stage was made from.

`record_run` writes W/run.json.  `check_stage` keeps a fingerprint in the folder of each stage and
refuses to go on in it with other settings; `redo` removes a stage and what follows from it.
"""

import contextlib
import datetime
import hashlib
import importlib.machinery
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from spa_jax import files, machine, schema
from spa_jax import run as run_lib
from spa_jax import settings as settings_lib
from spa_jax.config import EnvConfig, LoraConfig
from spa_jax.errors import UserError
from spa_jax.run import Run
from spa_jax.runtime import distributed

VERSION = 1  # of the fingerprints
SERVED = "served"  # the identity of an environment that runs elsewhere: not compared
ENVIRONMENT = "environment"  # the name of that input
STAGES = ("games", "demos", "sft", "explore", "progress", "annotate", "ppo", "evaluate", "truth")

# What a stage depends on: sections of `Settings`, or SECTION.FIELD; never operational settings.
_NUMBERS = ("compute.param_dtype", "compute.compute_dtype", "compute.matmul_dtype")
_PLAYING = ("env", "sampling", "chat", *_NUMBERS)
_DEPENDS: dict[str, tuple[str, ...]] = {
    "games": (
        "env.env",
        "data.generate_",
        "data.task_types",
        "data.min_",
        "data.max_",
        "data.closed_",
    ),
    "demos": ("env", "data.demo_slips"),
    "sft": ("sft", "lora", "chat", "compute"),
    "explore": (*_PLAYING, "explore"),
    "progress": ("progress", "lora", "compute"),
    "annotate": ("credit", *_NUMBERS),
    "ppo": ("ppo", "lora", "compute"),
    "evaluate": (*_PLAYING, "explore.split", "explore.games", "explore.first_game"),
    "truth": (*_PLAYING, "explore.split"),
}
_WHOLE = ("run_spa", "compare", "study")  # programs that make a whole run
_EARLIER = 50  # entries of run.json that are kept
_SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # a name and password in an address

_digests: dict[tuple[str, int, int], str] = {}
_warned = False


class Refused(UserError):
    """A stage's folder was made from other settings or inputs."""


# --- run.json ---------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(run: Run, program: str, argv: Sequence[str]) -> Iterator[None]:
    """`record_run`; a run that is refused within it was none, and W/run.json is as before."""
    before = run.json.read_text() if run.json.exists() else None
    record_run(run, program, argv)
    try:
        yield
    except Refused:
        if before is not None:
            files.write_text(run.json, before)
        raise


def record_run(run: Run, program: str, argv: Sequence[str]) -> None:
    """Writes W/run.json: settings, command, commit, versions, machine, environment, start.

    What stood there before is kept, shortened, in its list "earlier".  Of several processes the
    first writes.

    Args:
      run: the run.
      program: the program's name, such as "run_spa".
      argv: its arguments, the program's own name first.
    """
    if not distributed.is_first():
        return
    settings = settings_lib.by_flag(run.settings)
    now = {
        "program": program,
        "command": _redacted(shlex.join(["python", "-m", f"experiments.{program}", *argv[1:]])),
        "start": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "workdir": str(run.workdir),
        "policy": run.policy,
        "seed": run.seed,
        "processes": distributed.count(),
        **machine.commit(),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "environment": _environment(run),
        "settings": {
            flag: {
                "value": _redacted(value),
                "default": field.default,
                "changed": value != field.default,
            }
            for flag, (field, value) in settings.items()
        },
    }
    now["earlier"] = _earlier(run.json)
    files.write_json(run.json, now)


def record_environment(run: Run) -> None:
    """Says in W/run.json what is played, once the run's own games are there."""
    if distributed.is_first() and run.json.exists():
        remedy = "remove it, and the next stage writes it"
        noted = schema.read(dict[str, Any], run.json, remedy=remedy)
        files.write_json(run.json, noted | {"environment": _environment(run)})


def _environment(run: Run) -> dict[str, Any]:
    env = run.settings.env
    identity = environment_identity(env, run.games)
    return {"name": env.env, "data": env.data, "identity": identity}


def _earlier(path: pathlib.Path) -> list[dict[str, Any]]:
    """The list of earlier entries of a run.json, its newest one among them."""
    if not path.exists():
        return []
    try:
        last = json.loads(path.read_text())
        short = {name: last[name] for name in ("program", "command", "start", "commit", "seed")}
        short["settings"] = {k: s["value"] for k, s in last["settings"].items() if s["changed"]}
        return [*last.get("earlier", []), short][-_EARLIER:]
    except (ValueError, KeyError, TypeError):  # written by somebody else
        return []


def _redacted(value: Any) -> Any:
    """Without the password of an address."""
    return _SECRET.sub("***", value) if isinstance(value, str) else value


def made_with(path: pathlib.Path) -> dict[str, Any]:
    """Flag -> value of what is no default in a run, as its run.json says; {} without one.

    A program that looks at a finished run, and comes later, need not be told its settings again.
    What a whole run was made with goes before what a single stage was given afterwards.
    """
    if not path.exists():
        return {}
    try:
        last = json.loads(path.read_text())
        settings = {k: s["value"] for k, s in last["settings"].items() if s["changed"]}
        newest = last | {"settings": settings | {"policy": last["policy"]}}
        entries = [newest, *reversed(last.get("earlier", []))]
        chosen = next((e for e in entries if e["program"] in _WHOLE), newest)
        given = chosen["settings"] | {"seed": chosen["seed"]}
        return {name: value for name, value in given.items() if "***" not in str(value)}
    except (ValueError, KeyError, TypeError):  # written by somebody else
        return {}


# --- what files are ---------------------------------------------------------------------------


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hexadecimal; a file that has not changed is not read again.

    Raises:
      UserError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the stage that writes it first")
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def policy_digest(policy: str | os.PathLike[str]) -> str:
    """Names a policy by its weights, wherever they lie; heads beside them do not count.

    Args:
      policy: a Hugging Face folder, an adapter's (whose base counts too), a GGUF file or a model
        of the hub.
    """
    from spa_jax.models.io import pretrained, tensors

    found = pretrained.weight_files(pretrained.resolve(policy))
    return _digest_of(file for file in found if file.name != tensors.HEADS)


def estimator_digest(folder: str | os.PathLike[str]) -> str:
    """Names a progress estimator by its head, and its adapter if it has one.

    Args:
      folder: of the stage that trained it.
    """
    return _digest_of(sorted(pathlib.Path(folder).rglob("*.safetensors")))


def _digest_of(paths: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for file in paths:
        digest.update(bytes.fromhex(file_digest(file)))
    return digest.hexdigest()[:16]


def environment_identity(
    env: EnvConfig, games: pathlib.Path, splits: Sequence[str] = ()
) -> str | None:
    """What an environment plays: a digest of its data, or of the source of its class.

    Args:
      env: the environment.
      games: the folder of generated games, which are its data if it has no other.
      splits: only the folders of these, if the data has a folder for each split.

    Returns:
      The digest; `SERVED` for an environment that runs elsewhere; None if nothing is there yet.
    """
    if env.env_address or env.env == "openenv":
        return SERVED
    if env.env == "custom":
        source = _source(env.custom_data.partition(":")[0])
        return file_digest(source)[:16] if source else None
    root = pathlib.Path(env.data or games)
    if root.is_file():
        return file_digest(root)[:16]
    parts = [root / split for split in sorted(set(splits))]
    if not parts or not all(part.is_dir() for part in parts):
        parts = [root]
    found = sorted(
        (file.relative_to(root).as_posix(), file.stat().st_size)
        for part in parts
        for file in part.rglob("*")
        if file.is_file() and not _is_by_the_way(file.relative_to(root))
    )
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else None


def _is_by_the_way(path: pathlib.Path) -> bool:
    """Whether a file is none of the data: a log, a lock or a cache that playing may leave."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return hidden or path.name.endswith((".log", ".lock", ".tmp", "-wal", "-shm", "-journal"))


def _source(module: str) -> pathlib.Path | None:
    """The file of a module, found as the server would import it, without importing it."""
    where: Sequence[str] | None = [os.getcwd(), *sys.path, str(pathlib.Path(__file__).parents[1])]
    name, spec = "", None
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, where)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        where = spec.submodule_search_locations
    origin = pathlib.Path(spec.origin) if spec and spec.origin else None
    return origin if origin and origin.is_file() else None


# --- fingerprints -----------------------------------------------------------------------------


def check_stage(
    run: Run,
    stage: str,
    folder: pathlib.Path,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
    flags: Mapping[str, str] | None = None,
) -> bool:
    """Refuses to go on in a folder that was made from other settings or inputs.

    Every process calls it at the start of a stage, before it looks whether the stage has ended.
    A folder without results gets the fingerprint; one with results and without a fingerprint is
    of a run that was started before there were any, and is told about once.

    Args:
      run: the run.
      stage: one of `STAGES`.
      folder: the stage's, or its one file.
      inputs: digests of what it reads, by name: one that ends in "policy" or "estimator" stands
        for weights, the others are in the plural ("episodes").  What the environment plays is
        added for the stages that play.
      settings: values by flag name, `seed` among them, where they are not the run's.
      flags: by a name in `settings`, the flag that gives it, where it is another.

    Returns:
      Whether the folder says that it was made from just these: what is in it can be used as it is.

    Raises:
      UserError: names every difference, and how to go on.
    """
    return distributed.broadcast(
        f"{stage} {folder}: the fingerprint",
        lambda: _check_stage(
            run, stage, folder, inputs=inputs, settings=settings or {}, flags=flags or {}
        ),
    )


def _check_stage(
    run: Run,
    stage: str,
    folder: pathlib.Path,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    flags: Mapping[str, str],
) -> bool:
    global _warned
    now = fingerprint(run, stage, inputs=inputs, settings=settings)
    path = run_lib.fingerprint(folder)
    if not path.exists():
        if not _has_results(folder):
            files.write_json(path, now)
        elif not _warned:
            _warned = True
            print(
                f"warning: {run.workdir} was started before runs recorded their settings; going "
                "on without the check",
                file=sys.stderr,
                flush=True,
            )
        return False
    remedy = f"the stage's settings are not known: give --redo, or remove {folder}"
    was = schema.read(_Fingerprint, path, remedy=remedy)
    found = _differences(was.model_dump(), now, _defaults(run), flags)
    if not found:
        return True
    if not _has_results(folder):  # it was refused before it had any
        files.write_json(path, now)
        return False
    raise Refused(
        f"{folder} was made with other settings: {'; '.join(found)}. Give another --workdir, or "
        f"{_remedy(run, stage, folder)}"
    )


def fingerprint(
    run: Run, stage: str, *, inputs: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a stage is made from, as JSON has it; arguments as `check_stage`."""
    values = stage_settings(run, stage) | {k: v for k, v in settings.items() if k != "seed"}
    given = dict(inputs)
    if stage in ("demos", "explore", "evaluate", "truth"):
        splits = [values["split"]] if "split" in values else []
        identity = environment_identity(run.settings.env, run.games, splits)
        given[ENVIRONMENT] = identity or "not there"
    made = {
        "version": VERSION,
        "stage": stage,
        "settings": values,
        "seed": settings.get("seed", run.seed),
        "inputs": given,
    }
    return json.loads(json.dumps(made))


def stage_settings(run: Run, stage: str) -> dict[str, Any]:
    """The settings that a stage depends on, by flag name; operational ones are left out."""
    configs = dict(settings_lib.sections(run.settings))
    adapters = run.settings.lora if stage in run.settings.method.lora_stages else LoraConfig()
    configs["lora"] = adapters if adapters.rank else LoraConfig()
    found = {}
    for entry in _DEPENDS[stage]:
        section, _, prefix = entry.partition(".")
        for field in settings_lib.fields(type(configs[section])):
            if field.name.startswith(prefix) and not field.metadata.get("operational"):
                found[settings_lib.flag_of(field)] = getattr(configs[section], field.name)
    return found


def _defaults(run: Run) -> dict[str, Any]:
    found = {flag: field.default for flag, (field, _) in settings_lib.by_flag(run.settings).items()}
    return json.loads(json.dumps(found))


class _Fingerprint(schema.Schema):
    """What a stage was made from."""

    settings: dict[str, Any]
    seed: Any
    inputs: dict[str, Any]


def _differences(
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    defaults: Mapping[str, Any],
    flags: Mapping[str, str],
) -> list[str]:
    """Every difference of two fingerprints in words.

    A setting that the older one does not name is newer than it, and had its default.
    """
    found = []
    for flag, value in now["settings"].items():
        before = was["settings"].get(flag, defaults.get(flag))
        if before != value:
            given = flags.get(flag, flag)
            found.append(f"--{given} was {_shown(before)}, is {_shown(value)}")
    if was["seed"] != now["seed"]:
        found.append(f"--seed was {was['seed']}, is {now['seed']}")
    for name in sorted(was["inputs"].keys() | now["inputs"].keys()):
        pair = was["inputs"].get(name), now["inputs"].get(name)
        if pair[0] != pair[1] and SERVED not in pair:
            found.append(f"{_words(name)} are others")
    return found


def _words(name: str) -> str:
    """An input in words: "base policy" is the base policy's weights."""
    if name == ENVIRONMENT:
        return "the environment's data"
    return f"the {name}'s weights" if name.endswith(("policy", "estimator")) else f"the {name}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value == "" else str(value)


def _has_results(folder: pathlib.Path) -> bool:
    """Whether a stage has left anything in its folder, or its file, that took it work."""
    if folder.suffix == ".jsonl":
        return folder.exists()
    own = {run_lib.fingerprint(folder).name, "chat.json"}
    return any(
        path.is_file()
        and path.stat().st_size > 0
        and path.name not in own
        and path.suffix != ".log"
        and "tensorboard" not in path.relative_to(folder).parts
        and not path.name.startswith(".")
        for path in folder.rglob("*")
    )


def _remedy(run: Run, stage: str, folder: pathlib.Path) -> str:
    """How to make a stage anew in the same folder."""
    here = {run.games: "games", run.demos: "demos", run.sft: "sft", run.truth: "truth"}
    here |= {run.demonstrations(part).parent: "demos" for part in ("train", "valid")}
    for r in run.rounds():
        here |= {r.explore: f"explore:{r.number}", r.progress: f"progress:{r.number}"}
        here |= {r.annotated: f"annotate:{r.number}", r.ppo: f"ppo:{r.number}"}
    if folder.parent == run.evaluations:
        here[folder] = f"evaluate:{folder.name}"
    if folder not in here:
        return f"remove {folder} to make it anew"
    return f"--redo={here[folder]}, which removes this stage and what follows from it"
