"""Result records as bar charts, and quantities against each other as curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import Record, ratio_of

OURS_COLOUR, PEERS_COLOUR, BASELINE_COLOUR = "#1b6ca8", "#b8b8b8", "#4d4d4d"
LINE_STYLES = ("-", "--", "-.", ":")
PANELS = {
    "steps": {"seconds": "step time", "peak_bytes": "peak memory", "step_bytes": "memory taken by a step"},
    "starts": {"cold_ready_seconds": "start, empty caches", "warm_ready_seconds": "start, filled caches"},
    "lives": {},
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a picture.

    Args:
        label: For the legend.
        points: ``(x, low, middle, high)``; the range is drawn where it is one.
        ours: In our colour.
    """

    label: str
    points: Sequence[tuple[float, float, float, float]]
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A picture of one quantity against another.

    Args:
        name: Of the file, unique within the benchmark.
        title: Above it.
        x: What the horizontal axis shows; its ticks are where there are points.
        y: What the vertical axis shows.
        lines: What is drawn.
        marks: Vertical lines, each with its text.
        doubling: Whether steps to the right double the value.
        from_zero: Whether the vertical axis begins at 0.
    """

    name: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    marks: Sequence[tuple[float, str]] = ()
    doubling: bool = True
    from_zero: bool = True


def draw(path: Path, record: Record) -> bool:
    """Draw the ratios to the baseline with their quartiles; False if there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        quantity: title
        for quantity, title in PANELS[record["measure"]].items()
        if any(ratio_of(rival, quantity) for rival in record["rivals"].values())
    }
    if not panels:
        return False
    rivals = {name: rival for name, rival in record["rivals"].items() if ratio_of(rival, next(iter(panels)))}
    size = (3.2 + 2.6 * len(panels), 1.1 + 0.32 * len(rivals))
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (quantity, title) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(axis, rivals, quantity, record["baseline"])
        axis.set_title(title, fontsize=9)
    axes[0][0].invert_yaxis()  # shared: the first rival stands on top in all panels
    figure.supxlabel(f"{record['rivals'][record['baseline']]['label']} = 1", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def draw_curves(path: Path, curves: Curves) -> bool:
    """Draw a picture; False if there are no points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in curves.lines if line.points]
    if not lines:
        return False
    figure, axis = pyplot.subplots(figsize=(7.0, 4.2), layout="constrained")
    number = {True: 0, False: 0}
    for line in lines:
        xs, lows, middles, highs = zip(*line.points, strict=True)
        colour = OURS_COLOUR if line.ours else BASELINE_COLOUR
        style = LINE_STYLES[number[line.ours] % len(LINE_STYLES)]
        number[line.ours] += 1
        axis.plot(xs, middles, style, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=line.label)
        axis.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    if curves.doubling:
        axis.set_xscale("log", base=2)
    ticks = sorted({point[0] for line in lines for point in line.points})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    if curves.from_zero:
        axis.set_ylim(bottom=0)
    for x, text in curves.marks:
        axis.axvline(x, color="black", linewidth=0.8, linestyle=":")
        axis.text(x, axis.get_ylim()[1], f" {text}", fontsize=7, va="top", ha="left", rotation=90)
    axis.set_xlabel(curves.x, fontsize=9)
    axis.set_ylabel(curves.y, fontsize=9)
    axis.set_title(curves.title, fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _draw_panel(axis: Any, rivals: dict[str, Record], quantity: str, baseline: str) -> None:
    for row, (name, rival) in enumerate(rivals.items()):
        ratio = ratio_of(rival, quantity)
        if ratio is None:
            continue
        median, low, high = ratio["median"], ratio["q1"], ratio["q3"]
        colour = OURS_COLOUR if rival["ours"] else BASELINE_COLOUR if name == baseline else PEERS_COLOUR
        style = {"elinewidth": 1, "ecolor": "black"}
        axis.barh(row, median, xerr=[[median - low], [high - median]], color=colour, height=0.65, error_kw=style)
        axis.text(high, row, f" {median:.2f}", va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rivals)), [rival["label"] for rival in rivals.values()], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.margins(x=0.18)
    axis.spines[["top", "right"]].set_visible(False)
