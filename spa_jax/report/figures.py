"""The report's figures: small SVG drawings that take their colours from the page.

Matplotlib draws them with stand-in colours that become CSS variables, so one
drawing serves the light and the dark page.  The drawings hold axes and data
only; their titles and legends are text of the page.
"""

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Stand-in colour -> CSS variable of template.html.
_CSS = {
    "#010203": "var(--text)",
    "#010204": "var(--muted)",
    "#010205": "var(--line)",
    "#010206": "var(--series-1)",
    "#010207": "var(--series-2)",
    "#010208": "var(--plus)",
    "#010209": "var(--minus)",
    **{f"#0102{16 + i:02x}": f"var(--arm-{i})" for i in range(8)},
}
_TEXT, _MUTED, _LINE, _SERIES_1, _SERIES_2, _PLUS, _MINUS, *_ARMS = _CSS
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # of the first eight, the next eight
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "spa_jax",  # the same drawing has the same bytes
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.xmargin": 0.02,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _TEXT,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
_SMALL = (3.3, 1.85)  # inches: three in a row on a desk, one on a phone
_WIDE = (4.6, 2.2)
_MANY_POINTS = 40

# x and y of one curve, one pair of lists a round.
Curve = Sequence[tuple[Sequence[float], Sequence[float]]]


def curves(
    lines: Sequence[Curve],
    borders: Sequence[float] = (),
    *,
    percent: bool = False,
    noisy: bool = True,
) -> Markup:
    """One or two metrics over updates.

    A noisy curve of many points is drawn thin, with its running mean over a tenth of
    the round thick on top; the mean does not reach across rounds.

    Args:
      lines: the curves; each is one (updates, values) a round.
      borders: updates at which a round ended, marked by a vertical line.
      percent: whether values are shares, drawn on [0, 1].
      noisy: whether a running mean says more than the points do.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(_SMALL)
        for border in borders:
            axes.axvline(border, color=_MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
        for color, line in zip((_SERIES_1, _SERIES_2), lines, strict=False):
            many = noisy and sum(len(x) for x, _ in line) > _MANY_POINTS
            for x, y in line:
                if many:
                    axes.plot(x, y, color=color, linewidth=0.6, alpha=0.35)
                marker = "o" if len(x) <= 12 else None
                mean = running_mean(y) if many else y
                axes.plot(x, mean, color=color, linewidth=1.7, marker=marker, markersize=2.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        if percent:
            axes.set_ylim(0, 1)
            _percent_axis(axes)
        return _svg(figure)


def outcome_histogram(wins: Sequence[float], failures: Sequence[float]) -> Markup:
    """Predicted returns sum c of won and of lost games, as shares of each."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        values = np.concatenate([np.asarray(wins, float), np.asarray(failures, float)])
        low, high = min(-0.05, values.min()), max(1.05, values.max())
        edges = np.linspace(low, high, 25)
        for color, part in ((_MINUS, failures), (_PLUS, wins)):
            if len(part):
                weights = np.full(len(part), 1 / len(part))
                shares, _ = np.histogram(part, edges, weights=weights)
                axes.stairs(shares, edges, fill=True, color=color, alpha=0.4, linewidth=0)
                axes.stairs(shares, edges, color=color)
        for outcome in (0, 1):
            axes.axvline(outcome, color=_MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        _percent_axis(axes)
        axes.set_xlabel("sum of contributions")
        return _svg(figure)


def running_sums(wins: Sequence[np.ndarray], failures: Sequence[np.ndarray]) -> Markup:
    """How contributions add up over the course of won and of lost games.

    Args:
      wins: the running sums of each won game, [steps + 1] from 0.
      failures: those of each lost game.

    The line is the median over games at the same share of the game, the band
    holds its middle half.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        share = np.linspace(0, 1, 41)
        for color, part in ((_MINUS, failures), (_PLUS, wins)):
            if not len(part):
                continue
            sums = np.stack([np.interp(share, np.linspace(0, 1, len(s)), s) for s in part])
            low, middle, high = np.quantile(sums, [0.25, 0.5, 0.75], axis=0)
            axes.fill_between(share, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(share, middle, color=color, linewidth=1.8)
        axes.set_xlim(0, 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}%"))
        axes.set_xlabel("share of the game's steps")
        return _svg(figure)


def style_of(number: int) -> tuple[str, str]:
    """(CSS colour, kind of line) of an arm of a study, by its place from 0."""
    kinds = ("solid", "dashed", "dotted")
    return _CSS[_ARMS[number % len(_ARMS)]], kinds[number // len(_ARMS) % len(kinds)]


def efficiency(
    lines: Mapping[int, Sequence[tuple[float, float, float, float]]], label: str
) -> Markup:
    """Success of the arms of a study against what they cost.

    Args:
      lines: by the arm's place from 0, its points (cost, success, low, high); a mark's line is its
        interval.
      label: of the cost.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        for number, points in lines.items():
            cost, value, low, high = (np.asarray(part, float) for part in zip(*points, strict=True))
            color = _ARMS[number % len(_ARMS)]
            dashes = _DASHES[number // len(_ARMS) % len(_DASHES)]
            axes.plot(cost, value, color=color, linewidth=1.6, linestyle=dashes, marker="o", ms=3)
            axes.vlines(cost, low, high, color=color, linewidth=0.8, alpha=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _percent_axis(axes)
        axes.set_xlabel(label)
        return _svg(figure)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """[n] -> [n]: the mean over a tenth of the values around each.

    Towards the first value, where losses fall fast, the window shrinks on both
    sides; at the end it is cut off, so that the last mean still is one.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    here = np.arange(len(values))
    half = np.minimum(here, max(1, len(values) // 20))
    first, last = here - half, np.minimum(here + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    # Figure and not pyplot, which keeps global state and may open a window system.
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.02))
    return figure, figure.add_subplot()


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))


def _short(value: float, _: int) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.4g}"


def _svg(figure: Figure) -> Markup:
    """The drawing as an element for an HTML page: no size, no ids but those it refers to."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    width, height = figure.get_size_inches() * 72
    text = re.sub(
        r"<svg[^>]*>", f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">', text, count=1
    )
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for color, variable in _CSS.items():
        text = text.replace(color, variable)
    # Markers and clips are named by a hash of their shape: the prefix keeps two figures apart.
    prefix = f"f{zlib.crc32(text.encode()):x}"
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    return Markup(re.sub(r"\s*\n\s*", " ", text))
