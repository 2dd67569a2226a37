"""The report's figures: one style, colours that colour-blind people can tell apart, equal bytes from equal numbers.

A figure is as wide as a column of text, so that it can be read on a phone.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_lit.evaluation.estimates import Array, Estimate
from rlhf_lit.report.comparing import Arm, swept
from rlhf_lit.report.statistics import OverSeeds

# Okabe and Ito 2008, "Color universal design", without yellow and black.
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#222222", "#8a8a8a"
WIDTH, HEIGHT = 5.8, 4.0  # inches
STYLE = {
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 12,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.hashsalt": "rlhf_lit",  # or ids of elements are drawn at random
}


@dataclass(frozen=True)
class Figure:
    """A picture in both formats.

    Attributes:
        name: of its files.
        alt: what it shows, for those who cannot see it.
        svg, png: their contents.
        caption: what stands below it on the page.
    """

    name: str
    alt: str
    svg: bytes
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every figure."""

    colour: Any
    marker: str
    line: str


@dataclass(frozen=True)
class Dot:
    """An arm in a plane.

    Attributes:
        arm: which.
        x, y: by seed.
        x_prompts, y_prompts: intervals over prompts, where there are any.
    """

    arm: Arm
    x: OverSeeds
    y: OverSeeds
    x_prompts: Estimate | None = None
    y_prompts: Estimate | None = None


@dataclass(frozen=True)
class Curve:
    """A metric of an arm against optimizer steps.

    Attributes:
        arm: which.
        steps: at which every seed has a value.
        mean: over seeds.
        low, high: the band; None for one seed.
    """

    arm: Arm
    steps: Array
    mean: Array
    low: Array | None
    high: Array | None


def looks(arms: Sequence[Arm]) -> dict[str, Look]:
    """By an arm's label: arms that differ in one number run from dark to light, in viridis or, beside another
    algorithm, in a colour of their algorithm's; others have colours of their own."""
    algorithms = list(dict.fromkeys(arm.algorithm for arm in arms))
    ordered = {one.arms[0].algorithm for one in swept(arms) if len(one.arms) > 2}
    found = {}
    taken = 0
    for i, algorithm in enumerate(algorithms):
        own = [arm for arm in arms if arm.algorithm == algorithm]
        for j, arm in enumerate(own):
            if algorithm in ordered:
                colour = _shade(None if len(algorithms) == 1 else CATEGORIES[i % len(CATEGORIES)], j / (len(own) - 1))
                look = Look(colour, MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
            else:
                turn = taken // len(CATEGORIES)
                marker = MARKERS[(i + turn) % len(MARKERS)]
                look = Look(CATEGORIES[taken % len(CATEGORIES)], marker, LINES[(i + turn) % len(LINES)])
                taken += 1
            found[arm.label] = look
    return found


def _shade(base: str | None, share: float) -> Any:
    """From dark (0) to light (1): of a colour, or along viridis; never so light that it is lost on white."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if base is None:
        return colormaps["viridis"](0.8 * share)
    black, white = (0.55 * (1 - 2 * share), 0.0) if share < 0.5 else (0.0, 0.45 * (2 * share - 1))
    return tuple(part * (1 - black) * (1 - white) + white for part in to_rgb(base))


@contextmanager
def canvas(height: float = HEIGHT, width: float = WIDTH) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in our style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({**matplotlib.rcParamsDefault, "backend": "Agg", **STYLE}):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def finish(figure: Any, name: str, alt: str) -> Figure:
    """Both formats; no date in either, so that equal numbers give equal files."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out now, and not once more for each format
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=200)
    return Figure(name, alt, svg.getvalue(), png.getvalue())


def legend(figure: Any, axes: Any, entries: int) -> None:
    """Below the axes, where it covers nothing; none for a single thing, which the title names."""
    if entries > 1:
        handles, labels = axes.get_legend_handles_labels()
        longest = max(map(len, labels))
        columns = max(1, min(4, 52 // (longest + 6)))
        # More than two rows of it grow the figure, and leave the axes as they are.
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.22 * max(0, -(-len(labels) // columns) - 2))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


# --- planes ----------------------------------------------------------------------------------------------------------


def plane(
    name: str,
    dots: Sequence[Dot],
    styles: dict[str, Look],
    x_label: str,
    y_label: str,
    start: float | None = None,
    connect: bool = True,
) -> Figure:
    """Arms by two numbers: a large point each with its interval over seeds, its seeds as small ones, and a shade for
    the interval over prompts. Arms that differ in one number are joined and carry that number.

    Args:
        name: of the files.
        dots: the arms.
        styles: how they are drawn.
        x_label, y_label: of the axes.
        start: the reference's y, at x = 0.
        connect: join the arms of a swept number.
    """
    groups = {one.arms[0].algorithm: one for one in swept([dot.arm for dot in dots])}
    with canvas(4.4) as (figure, axes):
        _scale(axes, dots)
        if start is not None:
            axes.axhline(start, color=FAINT, linewidth=1.2, linestyle=(0, (2, 2)), label="the reference itself")
        for one in groups.values() if connect else ():
            own = [dot for dot in dots if dot.arm in one.arms]
            axes.plot(
                [dot.x.estimate.mean for dot in own],
                [dot.y.estimate.mean for dot in own],
                color=FAINT,
                linewidth=1.2,
                linestyle=styles[own[0].arm.label].line,
                zorder=1.5,
            )
        texts = []
        for dot in dots:
            look = styles[dot.arm.label]
            _cross(axes, dot, look.colour)
            group = groups.get(dot.arm.algorithm)
            text = dot.arm.label if group is None else None
            axes.plot(
                dot.x.estimate.mean,
                dot.y.estimate.mean,
                marker=look.marker,
                markersize=8.5,
                color=look.colour,
                markeredgecolor="white",
                markeredgewidth=1.0,
                linestyle="none",
                zorder=4,
                label=text,
            )
            if group is not None:
                value = group.values[group.arms.index(dot.arm)]
                texts.append((dot.x.estimate.mean, dot.y.estimate.mean, f"{value:g}"))
        for one in groups.values():
            look = styles[one.arms[len(one.arms) // 2].label]
            axes.plot(
                [],
                [],
                marker=look.marker,
                color=FAINT,
                markerfacecolor=look.colour,
                markeredgecolor="white",
                markersize=8.5,
                linestyle=look.line if connect else "none",
                label=f"{one.arms[0].algorithm}, by {one.short}",
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        legend(figure, axes, len(axes.get_legend_handles_labels()[1]))
        figure.draw_without_rendering()
        place_texts(axes, texts, [(dot.x.estimate.mean, dot.y.estimate.mean) for dot in dots])
        labels = ", ".join(f"{dot.arm.label} at ({dot.x.estimate.mean:.3g}, {dot.y.estimate.mean:.3g})" for dot in dots)
        return finish(figure, name, f"{y_label} against {x_label}: {labels}")


def _scale(axes: Any, dots: Sequence[Dot]) -> None:
    """Logarithmic where the largest x is more than ten times the smallest."""
    from matplotlib.ticker import LogLocator, NullFormatter

    x = [value for dot in dots for value in dot.x.values]
    if min(x) > 0 and max(x) / min(x) > 10:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _cross(axes: Any, dot: Dot, colour: Any) -> None:
    """The seeds, the intervals over them, and the shade over prompts."""
    x, y = dot.x.estimate.mean, dot.y.estimate.mean
    if len(dot.x.values) == len(dot.y.values) > 1:
        axes.plot(dot.x.values, dot.y.values, ".", color=colour, markersize=5, alpha=0.55, zorder=3, linestyle="none")
    if dot.y_prompts is not None and np.isfinite(dot.y_prompts.low):
        axes.plot([x, x], [dot.y_prompts.low, dot.y_prompts.high], color=colour, alpha=0.2, linewidth=6, zorder=2)
    if dot.x_prompts is not None and np.isfinite(dot.x_prompts.low):
        axes.plot([dot.x_prompts.low, dot.x_prompts.high], [y, y], color=colour, alpha=0.2, linewidth=6, zorder=2)
    for lines, interval in ((axes.vlines, dot.y), (axes.hlines, dot.x)):
        if interval.has_interval:
            at = x if interval is dot.y else y
            lines(at, interval.estimate.low, interval.estimate.high, color=colour, linewidth=1.6, zorder=2.5)


def place_texts(axes: Any, texts: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]]) -> None:
    """Write each text beside its point, at the first of eight places where it covers neither point nor text.

    Args:
        axes: drawn, so that its scale is known.
        texts: x, y and what to write.
        points: what must not be covered.
    """
    from matplotlib import patheffects

    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in (axes.transData.transform(point) for point in points)]
    frame = axes.get_window_extent()
    renderer = axes.figure.canvas.get_renderer()
    for x, y, text in texts:
        best: Any = None
        for across, up in ((0, 1), (1, 1), (-1, 1), (1, 0), (-1, 0), (0, -1), (1, -1), (-1, -1)):
            written = axes.annotate(
                text,
                (x, y),
                textcoords="offset points",
                xytext=(9 * across, 9 * up),
                ha=("right", "center", "left")[across + 1],
                va=("top", "center", "bottom")[up + 1],
                fontsize=10,
                color=INK,
                zorder=5,
                path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            )
            box = written.get_window_extent(renderer)
            edges = (box.x0, box.y0, box.x1, box.y1)
            clash = sum(_overlap(edges, other) for other in taken) + 1e3 * (
                box.x0 < frame.x0 or box.x1 > frame.x1 or box.y1 > frame.y1 or box.y0 < frame.y0
            )
            if best is None or clash < best[0]:
                if best is not None:
                    best[1].remove()
                best = (clash, written, edges)
            else:
                written.remove()
            if not best[0]:
                break
        taken.append(best[2])


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(name: str, metric: str, found: Sequence[Curve], styles: dict[str, Look]) -> Figure:
    """A metric against steps, an arm a line."""
    with canvas(3.6) as (figure, axes):
        for curve in found:
            look = styles[curve.arm.label]
            single = len(curve.steps) == 1
            axes.plot(
                curve.steps,
                curve.mean,
                color=look.colour,
                linestyle=look.line,
                marker=look.marker if len(curve.steps) <= 12 else None,
                markersize=6 if single else 4.5,
                label=curve.arm.label,
            )
            if curve.low is not None and not single:
                axes.fill_between(curve.steps, curve.low, curve.high, color=look.colour, alpha=0.16, linewidth=0)
        axes.set_title(metric, loc="left")
        axes.set_xlabel("optimizer steps")
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, axes, len(found))
        return finish(figure, name, f"{metric} against optimizer steps, of {', '.join(c.arm.label for c in found)}")


# --- matrices --------------------------------------------------------------------------------------------------------


def matrix(name: str, labels: Sequence[str], values: Array, x_label: str) -> Figure:
    """Win rates of rows against columns, ½ white; the diagonal is empty.

    Args:
        name: of the files.
        labels: of rows and columns.
        values: [rows, columns] 0 … 1.
        x_label: below it.
    """
    size = len(labels)
    with canvas(1.6 + 0.52 * size, max(WIDTH, 2.6 + 0.62 * size)) as (figure, axes):
        shown = np.ma.masked_where(np.eye(size, dtype=bool), values)
        axes.imshow(shown, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        for i in range(size):
            for j in range(size):
                if i != j:
                    strong = abs(values[i, j] - 0.5) > 0.3
                    axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color="white" if strong else INK)
        axes.set_xticks(range(size), labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), labels)
        axes.tick_params(length=0)
        axes.set_xlabel(x_label)
        return finish(figure, name, f"win rates of {', '.join(labels)} against each other")
