"""The page of a study: one self-contained HTML file, made from what `study.json` holds."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from spa_jax import files
from spa_jax.report import figures
from spa_jax.study.record import CREDIT

# Title, what it is and what a good value is, of each figure of an estimator.
_CREDIT = {
    "subgoal_auc": ("subgoal AUC", "steps that reach a subgoal above the others; chance 0.5"),
    "subgoal_auc_within": ("within an episode", "the same within an episode; chance 0.5"),
    "first_step_share": ("first step", "share of all credit that the first step gets; near 0"),
    "step_correlation": ("with time", "rank correlation with the step's number; near the truth's"),
    "advantage_correlation": (
        "true advantage",
        "rank correlation with replayed advantages; up to 1",
    ),
    "mse_over_var": ("MSE/Var", "error of the sum against a constant's; below 1"),
    "auc": ("AUC of the sum", "won games' sums above lost ones'; chance 0.5"),
}
_COSTS = {
    "episodes": "episodes explored",
    "tokens": "tokens in updates",
    "seconds": "seconds of exploration, estimator and update",
}


def write(found: Mapping[str, Any], out: pathlib.Path) -> None:
    """Writes the page of a study.

    The page needs nothing but itself.  It is written under a temporary name and renamed.

    Args:
      found: as `record.record` makes it, or as `study.json` has it.
      out: the HTML file.
    """
    page = render(found).encode("utf-8", errors="replace").decode()
    files.write_text(out, page)


def render(found: Mapping[str, Any]) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spa_jax.study", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "decimals": _decimals}
    return environment.get_template("template.html").render(
        found=found,
        headline=_headline(found),
        arms=_arms(found),
        rows=_scaled(found["arms"], "success", 0.0, 1.0),
        differences=_differences(found),
        curves=_curves(found),
        credit=_credit(found),
    )


def _arms(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """How each arm is drawn."""
    styles = {name: figures.style_of(i) for i, name in enumerate(found["arms"])}
    return {name: {"color": color, "line": line} for name, (color, line) in styles.items()}


def _headline(found: Mapping[str, Any]) -> str:
    """What the differences say, and no more."""
    reference, others = found["reference"], found["differences"]
    better = [name for name, d in others.items() if _known(d["low"]) and d["low"] > 0]
    worse = [name for name, d in others.items() if _known(d["high"]) and d["high"] < 0]
    if not others:
        return "No two arms have run yet."
    if not better and not worse:
        return f"No arm differs from {reference} by more than chance explains."
    said = []
    if better:
        said.append(f"{_list(better)} {'win' if len(better) > 1 else 'wins'} more than {reference}")
    if worse:
        said.append(f"{_list(worse)} {'win' if len(worse) > 1 else 'wins'} less")
    return f"{', '.join(said)}."


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _scaled(
    entries: Mapping[str, Mapping[str, Any]], value: str, low: float, high: float
) -> list[dict[str, Any]]:
    """Entries with the places of their interval on a scale from low to high, in percent."""

    def place(x: float | None) -> float:
        if not _known(x):
            return 0.0
        assert x is not None
        return round(100 * min(1.0, max(0.0, (x - low) / (high - low))), 2)

    return [
        {
            "name": name,
            **entry,
            "at": place(entry[value]) if _known(entry[value]) else None,
            "from": place(entry["low"]),
            "width": round(place(entry["high"]) - place(entry["low"]), 2),
        }
        for name, entry in entries.items()
    ]


def _differences(found: Mapping[str, Any]) -> dict[str, Any]:
    others = found["differences"]
    ends = [abs(d[end]) for d in others.values() for end in ("low", "high") if _known(d[end])]
    most = max([0.01, *ends])
    return {"most": most, "rows": _scaled(others, "difference", -most, most)}


def _curves(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A figure for each cost; an arm with one point is the base, which all curves begin with."""
    drawn = []
    for cost, label in _COSTS.items():
        lines = {
            number: [
                (p[cost], p["success"], p["low"], p["high"])
                for p in arm["curve"]
                if _known(p["success"]) and _known(p[cost])
            ]
            for number, arm in enumerate(found["arms"].values())
        }
        # Continued SFT explores nothing: against episodes it has no place.
        lines = {n: points for n, points in lines.items() if len({p[0] for p in points}) > 1}
        if lines:
            drawn.append({"title": label, "svg": figures.efficiency(lines, label)})
    return drawn


def _credit(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the estimators: those that any arm has."""
    arms = {name: arm for name, arm in found["arms"].items() if arm["credit"]}
    columns = [name for name in CREDIT if any(name in arm["credit"] for arm in arms.values())]
    return {"columns": {name: _CREDIT[name] for name in columns}, "arms": arms}


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _percent(value: float | None, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%" if _known(value) and value is not None else "–"


def _points(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _decimals(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
