"""Charts as inline SVG: no legend and no title, which the page sets in its own type.

Every colour is written as a CSS variable with a fallback, so one chart suits a light and a dark
page. Figures are built without pyplot: nothing of the caller's matplotlib is touched.
"""

import io
import math
import re
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GRID = "#6f7681", "#d9dce1"
SERIES = ("#2f6fd0", "#d07a1f", "#2b9468", "#8a5fd0", "#cc4b63", "#1d94a8", "#8c8a2b")
_VARIABLES = {INK: "--muted", GRID: "--line"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
_MARKERS = "osD^vPX"
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 12,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (step, value); ``colour`` indexes SERIES."""

    label: str
    points: list[tuple[int, float]]
    colour: int = 0

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes; a fraction's axis begins at 0 and ends at most at 1."""

    heading: str
    series: list[Series]
    fraction: bool = False


def line_chart(panels: list[Panel], width: float, height: float) -> str:
    """An SVG of ``panels`` above each other over a common step axis; size in CSS pixels.

    A line of more than 40 points is drawn faint, with its trailing mean over a twentieth of the
    points in front.
    """
    with _style(" ".join(panel.heading for panel in panels)):
        figure = _figure(width, height)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, ax in zip(panels, axes, strict=True):
            _decorate(ax, panel.heading)
            for series in panel.series:
                _draw(ax, series)
            if panel.fraction:
                top = max(value for series in panel.series for _, value in series.points)
                ax.set_ylim(0, 1.02 if top > 0.6 else max(1.15 * top, 0.01))
        steps = [step for panel in panels for series in panel.series for step, _ in series.points]
        if min(steps) == max(steps):
            axes[-1].set_xlim(steps[0] - 1, steps[0] + 1)
        axes[-1].set_xlabel("step", color=INK)
        return _svg(figure)


def stacked_chart(series: list[Series], width: float, height: float) -> tuple[str, str]:
    """An SVG of ``series`` stacked (a missing step counts 0), and a remark on what was cut off.

    The axis ends a little above the 95th percentile of the totals: a first step that compiles would
    flatten all others. The remark is empty when everything fits.
    """
    steps = sorted({step for line in series for step, _ in line.points})
    values = [[dict(line.points).get(step, 0.0) for step in steps] for line in series]
    totals = [sum(column) for column in zip(*values, strict=True)]
    # Half a step to either side, so that even a single step has a width.
    edges = [steps[0] - 0.5, *steps, steps[-1] + 0.5]
    with _style("stacked"):
        figure = _figure(width, height)
        ax = figure.subplots()
        _decorate(ax, "seconds")
        ax.stackplot(
            edges,
            [[row[0], *row, row[-1]] for row in values],
            colors=[SERIES[line.colour] for line in series],
            step="mid",
            linewidth=0,
        )
        ax.set_xlim(edges[0], edges[-1])
        usual = 1.25 * sorted(totals)[math.ceil(0.95 * len(totals)) - 1]
        highest = max(range(len(steps)), key=totals.__getitem__)
        cut = totals[highest] > 1.5 * usual
        ax.set_ylim(0, usual if cut else 1.05 * totals[highest] or 1)
        ax.set_xlabel("step", color=INK)
        remark = f"Step {steps[highest]} took {totals[highest]:.0f} s and is cut off."
        return _svg(figure), remark if cut else ""


def _style(salt: str):
    """The look of a chart, for the time of a `with`; ids in the SVG are derived from ``salt``."""
    # A fixed salt: the same run gives the same bytes. One a chart: ids are unique in the page.
    return matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt})


def _figure(width: float, height: float) -> Figure:
    # 72 units an inch in the SVG: figure units are CSS pixels.
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    return figure


def _decorate(ax: Axes, heading: str) -> None:
    ax.set_facecolor("none")
    ax.set_title(heading, loc="left", fontsize=12, color=INK, pad=6)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.tick_params(colors=INK, length=0, pad=5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.margins(x=0.01, y=0.1)


def _draw(ax: Axes, series: Series) -> None:
    steps, values = zip(*series.points, strict=True)
    colour, count = SERIES[series.colour], len(steps)
    if count > 40:
        faint = max(0.1, min(0.4, 100 / count))
        ax.plot(steps, values, color=colour, linewidth=1, alpha=faint)
        window = max(count // 20, 3)
        mean = [
            sum(part) / len(part)
            for part in (values[max(0, end - window) : end] for end in range(1, count + 1))
        ]
        ax.plot(steps, mean, color=colour, linewidth=2)
    else:
        marker = _MARKERS[series.colour]
        ax.plot(steps, values, color=colour, linewidth=2, marker=marker, markersize=4)


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element to set inside HTML: scalable, and with no ids of groups."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head).group()
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # ids repeat from chart to chart
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable}, {colour})")
    return f'<svg {view_box} aria-hidden="true">{body}'
