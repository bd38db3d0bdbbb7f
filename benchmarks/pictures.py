"""Result records as bar charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import Record, ratio_of

OURS_COLOUR, PEERS_COLOUR, BASELINE_COLOUR = "#1b6ca8", "#b8b8b8", "#4d4d4d"
PANELS = {
    "steps": {"seconds": "step time", "peak_bytes": "peak memory", "step_bytes": "memory taken by a step"},
    "starts": {"cold_ready_seconds": "start, empty caches", "warm_ready_seconds": "start, filled caches"},
}


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
