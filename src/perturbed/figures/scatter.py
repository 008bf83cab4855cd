"""Two methods against each other, perturbation by perturbation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.figures.inputs import NothingToDraw, Page
from perturbed.figures.overview import order_methods
from perturbed.figures.style import GREY, MARKERS, arrow, label_metric, new_figure, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUBGROUP_TITLES: Mapping[str, str] = {
    "single_unseen": "unseen single",
    "single_seen_heldout_cells": "seen single, held-out cells",
    "combo_seen0": "combination, 0 genes seen",
    "combo_seen1": "combination, 1 gene seen",
    "combo_seen2": "combination, both genes seen",
    "context": "new context",
}


def draw_scatter(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw the two best methods on the primary metric against each other; reads `summary.csv`, `perturbations.csv`."""
    metric = page.spec.primary_metric
    summary, table = page.table("summary"), page.table("perturbations")
    of_metric = summary[(summary["metric"] == metric) & ~summary["reference"] & summary["mean"].notna()]
    best = order_methods(of_metric, metric)[:2]
    if len(best) < 2:
        raise NothingToDraw(f"fewer than two methods have a defined {metric}")
    direction = int(of_metric["direction"].iloc[0])
    described = table.groupby("perturbation")[["subgroup", "effect_size"]].first()
    wide = described.join(table.pivot(index="perturbation", columns="method", values="value")[best]).reset_index()
    figure = new_figure(6.0, 5.6)
    axes = figure.subplots()
    _draw_points(figure, axes, wide, best)
    names = [title_of(name, page.titles, 60) for name in best]
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    counts = _count_wins(wide[best[0]].to_numpy(), wide[best[1]].to_numpy(), direction, names)
    axes.set_title(f"{label_metric(metric)} ({arrow(direction)})\n{counts}", loc="left")
    long = wide.melt(["perturbation", "subgroup", "effect_size"], best, "method", "value")
    long.insert(0, "metric", metric)
    return figure, long


def _draw_points(figure: Figure, axes: Axes, wide: pd.DataFrame, best: list[str]) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    defined = wide[best].notna().all(axis=1)
    low, high = np.nanmin(wide[best].to_numpy()), np.nanmax(wide[best].to_numpy())
    pad = 0.06 * (high - low or 1.0)
    low, high = low - pad, high + pad
    axes.axline((low, low), slope=1, color=GREY, lw=1, zorder=0)
    norm = Normalize(wide["effect_size"].min(), wide["effect_size"].max())
    subgroups = sorted(set(wide["subgroup"]))
    counts: dict[str, int] = {}
    for marker, subgroup in zip(MARKERS, subgroups):
        part = wide[defined & (wide["subgroup"] == subgroup)]
        counts[subgroup] = len(part)
        style: dict[str, Any] = {
            "cmap": "viridis",
            "norm": norm,
            "s": 38,
            "lw": 0.5,
            "edgecolor": "white",
            "marker": marker,
        }
        points = axes.scatter(part[best[1]], part[best[0]], c=part["effect_size"], **style)
    # A perturbation with one score stands as a tick on the axis of the score it has.
    edge = low + 0.01 * (high - low)
    one: dict[str, Any] = {"ls": "", "ms": 8, "mew": 1.2, "color": GREY, "clip_on": False}
    only_y, only_x = (wide[~defined & wide[name].notna()][name] for name in best)
    if len(only_y):  # an empty line would still take part in the layout, at the origin
        axes.plot(np.full(len(only_y), edge), only_y, marker="_", **one)
    uneven = bool(len(only_y) or len(only_x))
    if len(only_x):
        axes.plot(only_x, np.full(len(only_x), edge), marker="|", **one)
    axes.set(xlim=(low, high), ylim=(low, high))
    figure.colorbar(points, ax=axes, label="effect size: ‖observed Δ‖₂", shrink=0.8)
    handles = [
        Line2D([], [], ls="", marker=marker, color=GREY, label=f"{SUBGROUP_TITLES.get(name, name or 'all')} ({count})")
        for marker, (name, count) in zip(MARKERS, counts.items())
    ]
    handles += [Line2D([], [], ls="", marker="_", ms=8, color=GREY, label="undefined for the other method")] * uneven
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(handles)), handletextpad=0.2)


def _count_wins(first: np.ndarray, second: np.ndarray, direction: int, names: list[str]) -> str:
    good = (lambda x: -np.abs(x - 1)) if direction == 0 else (lambda x: direction * x)
    gain = good(first) - good(second)
    n = int(np.isfinite(gain).sum())
    text = f"{names[0]} better: {int((gain > 0).sum())} of {n}, {names[1]}: {int((gain < 0).sum())}"
    left_out = len(gain) - n
    return text + (f"\nnot compared, because undefined for one or both: {left_out}" if left_out else "")
