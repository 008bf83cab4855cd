"""Recovery of planted latents: the paper's table 1 with floors and a ceiling, and one factor varied at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from perturbed.figures.style import GREY, OKABE_ITO, PALE, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


class Series(NamedTuple):
    """What is drawn of an arm and estimator."""

    arm: str
    estimator: str
    title: str
    colour: str
    marker: str
    line: str = "-"


SERIES = (
    Series("aligned", "perturbedvae_rotated", "LatentVAE, sparsest mechanisms", OKABE_ITO[0], "o"),
    Series(
        "aligned", "perturbedvae_targets", "LatentVAE, told which environments share a target", OKABE_ITO[5], "s", "--"
    ),
    Series("aligned", "perturbedvae", "LatentVAE, as trained", OKABE_ITO[2], "^"),
    Series("penalty_only", "perturbedvae_rotated", "LatentVAE, penalty only, sparsest mechanisms", "#8C510A", "X"),
    Series("start_only", "perturbedvae_rotated", "LatentVAE, start only, sparsest mechanisms", "#A6A6A6", "p"),
    Series("unaligned", "perturbedvae_rotated", "LatentVAE, no alignment, sparsest mechanisms", OKABE_ITO[1], "D"),
    Series("unaligned", "perturbedvae_targets", "LatentVAE, no alignment, told the targets", OKABE_ITO[4], "P", "--"),
    Series("unaligned", "perturbedvae", "LatentVAE, no alignment, as trained", OKABE_ITO[3], "v"),
    Series("matched", "perturbedvae_class", "class PerturbedVAE, matched partners", "#44AA99", "<"),
    Series("aligned", "perturbedvae_class", "class PerturbedVAE, random partners", "#882255", ">"),
    Series("unaligned", "perturbedvae_class", "class PerturbedVAE, no alignment", "#999933", "h"),
    Series("none", "plain_vae", "plain VAE", GREY, "o"),
    Series("none", "pca", "PCA", GREY, "s"),
    Series("none", "environment_mean", "mean of the environment, E[z | u]", GREY, "D"),
    Series("none", "untrained", "untrained encoder", GREY, "v"),
    Series("none", "empty_graph", "empty graph", GREY, "P"),
    Series("none", "supervised_linear", "ceiling: linear regression on true z", "black", "*"),
)
"""In this order from top to bottom; the first eleven are the method."""

FACTORS = {
    "environments": ("n_environments", "environments"),
    "cells": ("n_cells", "training cells"),
    "noise": ("noise", "s.d. of noise on x"),
}

METRICS = {
    "mcc_within": "MCC of z_ν, within",
    "mcc_pooled": "MCC of z_ν, pooled",
    "r2_nu": "R² of z_ν",
    "r2_iota": "R² of z_ι",
    "shd": "SHD of the graph",
}

PUBLISHED = {"mcc_pooled": (0.86, 0.81), "r2_nu": (0.95, 0.93), "r2_iota": (0.97, 0.66)}
"""Table 1 of the paper: with and without alignment."""

DRAWN_OVER_FACTORS = (0, 2, 5, 13)
"""Places in `SERIES`."""

LEVEL_TITLES = {
    "base": "all hold",
    "parents_kept": "(iv) parents\nnever removed",
    "partners_unrelated": "(iii) partners\nunrelated",
    "posterior_sees_condition": "posterior\nsees u",
}


def draw(table: pd.DataFrame) -> Figure:
    """Draw the study.

    Above, every estimator in the base setting: a point for each seed and a bar at their mean. Below, MCC within
    environments and R² of z_ι as environments, cells and noise vary one at a time and as single assumptions break.

    Parameters
    ----------
    table
        Rows of `run_setting` of the base setting and any others, any number of seeds.
    """
    figure = new_figure(WIDTH, 9.2)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.05, 1.25)).ravel()
    _draw_base(above, table[table["setting"] == "base"])
    _draw_factors(below, table)
    return figure


def _draw_base(figure: SubFigure, table: pd.DataFrame) -> None:
    found = set(zip(table["arm"], table["estimator"]))
    series = [one for one in SERIES if (one.arm, one.estimator) in found]
    panels = figure.subplots(1, len(METRICS), sharey=True, squeeze=False).ravel()
    for axes, (metric, title) in zip(panels, METRICS.items()):
        for y, one in enumerate(series):
            rows = (table["arm"] == one.arm) & (table["estimator"] == one.estimator) & (table["metric"] == metric)
            values = table.loc[rows, "value"].to_numpy(dtype=float)
            if not len(values):
                continue
            axes.axhline(y, color=PALE, lw=0.6, zorder=0)
            axes.plot(values, np.full(len(values), y), one.marker, color=one.colour, ms=4, alpha=0.6, mew=0)
            axes.plot([values.mean()] * 2, [y - 0.32, y + 0.32], color=one.colour, lw=2)
        for value, style in zip(PUBLISHED.get(metric, ()), ("--", ":")):
            axes.axvline(value, color=GREY, ls=style, lw=0.9, zorder=0)
        axes.set_title(title, loc="left", fontsize=8.5)
        axes.set_xlim((-0.3, None) if metric == "shd" else (-0.06, 1.03))
        axes.set_xlabel("← lower is better" if metric == "shd" else "higher is better →")
    panels[0].set_yticks(range(len(series)), [one.title for one in series])
    panels[0].set_ylim(len(series) - 0.5, -0.5)
    note = "dashed: the paper with alignment; dotted: without"
    figure.suptitle(f"Base setting: points are seeds, bars their means ({note})", x=0.01, ha="left", fontsize=9.5)


def _draw_factors(figure: SubFigure, table: pd.DataFrame) -> None:
    metrics = ("mcc_within", "r2_iota")
    panels = figure.subplots(len(metrics), len(FACTORS) + 1, sharey="row", squeeze=False)
    for row, metric in enumerate(metrics):
        part = table[table["metric"] == metric]
        for axes, (factor, (column, label)) in zip(panels[row], FACTORS.items()):
            rows = part[part["factor"].isin([factor, "base"])]
            levels = sorted(rows[column].unique())
            _draw_levels(axes, rows.assign(place=rows[column].map({level: i for i, level in enumerate(levels)})))
            axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
            axes.set_xlabel(label if row else "")
        _draw_breaks(panels[row, -1], part)
        panels[row, 0].set_ylabel(METRICS[metric].replace("within", "within\nenvironments"))
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(
        "One factor at a time: means over seeds, bars from lowest to highest", x=0.01, ha="left", fontsize=9.5
    )


def _draw_breaks(axes: Axes, part: pd.DataFrame) -> None:
    rows = part[~part["factor"].isin(FACTORS)]
    known = [name for name in LEVEL_TITLES if name in set(rows["setting"])]
    names = [*known, *sorted(set(rows["setting"]) - set(known))]
    _draw_levels(axes, rows.assign(place=rows["setting"].map({name: i for i, name in enumerate(names)})), joined=False)
    titles = [LEVEL_TITLES.get(name, name.replace("_", " ")) for name in names]
    axes.set_xticks(range(len(names)), titles, rotation=45, ha="right", rotation_mode="anchor", fontsize=7.5)


def _draw_levels(axes: Axes, rows: pd.DataFrame, *, joined: bool = True) -> None:
    for nth, which in enumerate(DRAWN_OVER_FACTORS):
        one = SERIES[which]
        mine = rows[(rows["arm"] == one.arm) & (rows["estimator"] == one.estimator)]
        if mine.empty:
            continue
        of_level = mine.groupby("place")["value"].agg(["mean", "min", "max"])
        x = of_level.index.to_numpy(dtype=float) + 0.09 * (nth - 1.5)  # side by side, or bars would hide one another
        reach = np.abs(of_level[["min", "max"]].to_numpy().T - of_level["mean"].to_numpy())
        line = one.line if joined else ""
        look: Any = {"color": one.colour, "marker": one.marker, "ms": 4.5, "lw": 1.2, "elinewidth": 0.9}
        axes.errorbar(x, of_level["mean"], yerr=reach, ls=line, label=one.title, **look)
    axes.set_ylim(-0.08, 1.05)
    axes.margins(x=0.08)
