"""Pages that stand elsewhere in the repository, or that the code tells: for MkDocs.

README.md and its neighbours are pages of the site too; their links, and those to them, are those of
the repository.  The reference is made of the settings and of docstrings.
"""

import os
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File, Files

from spa_jax import settings
from spa_jax.config import DistributedConfig
from spa_jax.stage_config import Settings

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_BESIDE = {  # in the repository -> in the site
    "README.md": "index.md",
    "WORKSPACE.md": "WORKSPACE.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE.txt",
}
_REFERENCE = {
    "python": ("From Python", ["spa_jax.api"]),
    "trajectory": ("Trajectories", ["spa_jax.trajectory"]),
    "environments": (
        "The contract of environments",
        ["spa_jax.envs.protocol", "spa_jax.envs.contract"],
    ),
}
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages."""
    for source, page in _BESIDE.items():
        files.append(File.generated(config, page, content=(_ROOT / source).read_text()))
    files.append(File.generated(config, "reference/flags.md", content=_flags()))
    for name, (title, modules) in _REFERENCE.items():
        text = f"# {title}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository become those of the site."""
    here = page.file.src_uri
    own = next((source for source, name in _BESIDE.items() if name == here), f"docs/{here}")

    def of_site(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if "://" in target or target.startswith(("mailto:", "data:")):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        if not (_ROOT / path).exists():
            return match[0]  # MkDocs says that it leads nowhere
        found = _BESIDE.get(path, path.removeprefix("docs/"))
        return before + os.path.relpath(found, posixpath.dirname(here) or ".") + after

    return _LINK.sub(of_site, markdown)


def _flags() -> str:
    """Every setting of a run, a table a section."""
    parts = [
        "# Flags",
        "Every setting of a run. `run_spa --help` groups them by what you must choose; each "
        "program reads those of its own stage, and knows the others.",
    ]
    every = [*settings.sections(Settings()), ("processes", DistributedConfig())]
    for section, config in every:
        about = (type(config).__doc__ or "").strip().splitlines()[0]
        parts += [f"## {section}", about, _table(config)]
    return "\n\n".join(parts) + "\n"


def _table(config: Any) -> str:
    lines = ["| flag | default | |", "|---|---|---|"]
    for field in settings.fields(type(config)):
        default = getattr(config, field.name)
        shown = ",".join(default) if isinstance(default, tuple) else str(default)
        text = field.metadata["help"].replace("|", "\\|")
        value = f"`{shown}`" if shown else ""
        lines.append(f"| `--{settings.flag_of(field)}` | {value} | {text} |")
    return "\n".join(lines)
