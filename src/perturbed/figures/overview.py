"""Every method on the key metrics, with floors and ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.figures.inputs import Page
from perturbed.figures.style import (
    GREY,
    KEY_METRICS,
    PALE,
    WIDTH,
    hint,
    label_metric,
    look_of,
    new_figure,
    title_of,
    write_undefined,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_PANELS = 8
N_COLUMNS = 4
MANY_BLOCKS = 3
SHOWN_REFERENCES = ("technical_duplicate", "interpolated_duplicate", "noise_free", "noise_free_additive")


def pick_metrics(table: pd.DataFrame, primary: str, n: int) -> list[str]:
    """At most `n` metrics that have a score: the primary one in any case, the key ones, then the others by name."""
    scored = table["difference" if "difference" in table else "mean"].notna() | (table["metric"] == primary)
    there = set(table.loc[scored, "metric"])
    order = dict.fromkeys([primary, *KEY_METRICS, *sorted(there)])
    return [metric for metric in order if metric in there][:n]


def order_methods(table: pd.DataFrame, metric: str) -> list[str]:
    """Methods from best to worst on a metric, undefined ones last; references are left out."""
    of_metric = table[~table["reference"] & (table["metric"] == metric)]
    direction = int(of_metric["direction"].iloc[0]) if len(of_metric) else 1
    goodness = -(of_metric["mean"] - 1).abs() if direction == 0 else direction * of_metric["mean"]
    ranked = of_metric.assign(_good=goodness).sort_values(["_good", "method"], ascending=[False, True])
    others = sorted(set(table.loc[~table["reference"], "method"]) - set(ranked["method"]))
    return [*ranked["method"], *others]


def draw_overview(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw method × metric as points with intervals; reads `summary.csv`."""
    table = page.table("summary")
    table = table[table["method"] != "truth"]
    pages = [key for key, _ in table.groupby(["dataset", "split"], sort=True)]
    blocks = [table[(table["dataset"] == dataset) & (table["split"] == split)] for dataset, split in pages]
    # Many test sets would make a figure of metres: each then has one row of panels, not two.
    n_panels = N_PANELS if len(blocks) <= MANY_BLOCKS else N_COLUMNS
    chosen = [pick_metrics(block, page.spec.primary_metric, n_panels) for block in blocks]
    heights = [_height(block, metrics) for block, metrics in zip(blocks, chosen)]
    figure = new_figure(WIDTH, sum(heights) + 0.5)
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (dataset, split), block, metrics in zip(parts, pages, blocks, chosen):
        part.suptitle(f"{dataset} · {split}", fontsize=11, fontweight="bold", x=0.01, ha="left")
        _draw_block(page, part, block, metrics)
    _add_legend(figure, page)
    source = pd.concat([block[block["metric"].isin(metrics)] for block, metrics in zip(blocks, chosen)])
    return figure, source.drop(columns="note")


def _height(block: pd.DataFrame, metrics: Sequence[str]) -> float:
    return 0.4 + -(-len(metrics) // N_COLUMNS) * (0.95 + 0.2 * block["method"].nunique())


def _draw_block(page: Page, part: Figure, block: pd.DataFrame, metrics: Sequence[str]) -> None:
    methods = order_methods(block, page.spec.primary_metric)
    references = [name for name in SHOWN_REFERENCES if name in set(block["method"])]
    rows = [*methods, *references]
    n_rows = -(-len(metrics) // N_COLUMNS)
    panels = part.subplots(n_rows, N_COLUMNS, sharey=True, squeeze=False).ravel()
    for axes, metric in zip(panels, metrics):
        _draw_panel(axes, block[block["metric"] == metric].set_index("method"), rows, len(methods), methods)
        bold = "bold" if metric == page.spec.primary_metric else "normal"
        axes.set_title(fill(label_metric(metric), 22), fontweight=bold, loc="left")
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    for axes in panels[::N_COLUMNS]:
        axes.set_yticks(range(len(rows)), [title_of(name, page.titles, 40) for name in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        for label, name in zip(axes.get_yticklabels(), rows):
            label.set_color(GREY if name in references else "black")


def _draw_panel(axes: Axes, table: pd.DataFrame, rows: Sequence[str], n_methods: int, methods: Sequence[str]) -> None:
    direction = int(table["direction"].iloc[0])
    _draw_levels(axes, table)
    if n_methods < len(rows):
        axes.axhline(n_methods - 0.5, color=GREY, lw=0.6)
    for y, name in enumerate(rows):
        row: dict[Any, Any] = table.loc[name].to_dict() if name in table.index else {"mean": np.nan}
        if not np.isfinite(row["mean"]):
            write_undefined(axes, y)
            continue
        look = look_of(name, methods)
        colour = GREY if row["reference"] else look.colour
        axes.plot([row["ci_low"], row["ci_high"]], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        face = "white" if row["n_undefined"] else colour
        marker = "|" if row["reference"] else look.marker
        axes.plot(row["mean"], y, marker, ms=9 if marker == "|" else 5.5, mew=1.4, color=colour, mfc=face)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(hint(direction), fontsize=8, color=GREY)
    axes.locator_params(axis="x", nbins=5)
    if table["mean"].isna().all():
        axes.set_xticks([])


def _draw_levels(axes: Axes, table: pd.DataFrame) -> None:
    floor = float(table["floor"].iloc[0])
    if np.isfinite(floor):
        axes.axvline(floor, color="#555555", lw=1, ls=(0, (4, 2)), zorder=0)
    if "technical_duplicate" in table.index:
        mean, low, high = (float(table[column]["technical_duplicate"]) for column in ("mean", "ci_low", "ci_high"))
        if np.isfinite([low, high]).all():
            axes.axvspan(low, high, color=PALE, alpha=0.8, lw=0, zorder=0)
        if np.isfinite(mean):
            axes.axvline(mean, color=GREY, lw=1, zorder=0)


def _add_legend(figure: Figure, page: Page) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    level = f"{100 * page.spec.confidence:g} % interval"
    handles = [
        Line2D([], [], color="black", marker="o", lw=1.6, label=f"mean over perturbations, {level}"),
        Line2D([], [], color="black", marker="o", mfc="white", lw=0, label="undefined for some perturbations"),
        Line2D([], [], color="#555555", ls=(0, (4, 2)), label="floor: mean effect (no change, if undefined)"),
        Patch(color=PALE, label=f"technical duplicate, {level}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
