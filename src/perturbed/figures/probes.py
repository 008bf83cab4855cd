"""How well the condition can be read from frozen representations (PerturbedVAE paper, figure 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.figures.style import GREY, PALE, WIDTH, look_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy (top 1)"}
ROW = ["representation", "n_dimensions", "reduced"]
"""What makes a row of the figure."""
REFERENCES = ("pca", "genes")
"""Drawn in grey: they are no models."""


def draw(table: pd.DataFrame) -> Figure:
    """Draw the table of `perturbed.interpret.probes.probe_split`, of one or several seeds and folds.

    A filled point is a representation as it is, an open one reduced to the width beside it; the mean over seeds and
    folds, with the mean interval over conditions. The grey band reaches up to the 95 % quantile of chance.
    """
    keys = ["method", "representation", "n_dimensions", "reduced"]
    numbers = ["value", "chance", "chance_high", "low", "high", "n_conditions", "n_cells"]
    mean = table.groupby([*keys, "metric"], sort=True)[numbers].mean().reset_index()
    best = mean[mean["metric"] == "balanced_accuracy"].sort_values(["reduced", "value"], ascending=[True, False])
    order = {name: place for place, name in enumerate(dict.fromkeys(best["representation"]))}
    rows = best.assign(_place=best["representation"].map(order)).sort_values(["_place", "reduced", "n_dimensions"])
    figure = new_figure(WIDTH, 1.5 + 0.27 * len(rows))
    panels = figure.subplots(1, len(TITLES), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, TITLES):
        of_metric = mean[mean["metric"] == metric].set_index(["representation", "n_dimensions", "reduced"])
        _draw_panel(
            axes, of_metric.loc[list(rows[["representation", "n_dimensions", "reduced"]].itertuples(index=False))]
        )
        axes.set_title(TITLES[metric], loc="left")
    panels[0].set_yticks(range(len(rows)), [_label(row) for row in rows.to_dict("records")])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    n_conditions, n_cells = (round(mean[column].mean()) for column in ("n_conditions", "n_cells"))
    for axes in panels:
        axes.set_xlabel(f"{n_conditions} conditions, {n_cells} held-out cells", fontsize=8.5, color=GREY)
    _add_legend(figure, bool(rows["reduced"].any()))
    return figure


def _add_legend(figure: Figure, reduced: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color="black", marker="o", lw=1.6, label="mean over seeds, interval over conditions"),
        Line2D([], [], color=GREY, lw=1, ls=(0, (4, 2)), label="permuted labels"),
        Patch(color=PALE, label="permuted labels, up to 95 % of them"),
    ]
    if reduced:
        handles.append(Line2D([], [], color="black", marker="o", mfc="white", lw=0, label="reduced in width"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _draw_panel(axes: Axes, rows: pd.DataFrame) -> None:
    axes.axvspan(0, float(rows["chance_high"].max()), color=PALE, lw=0, zorder=0)
    axes.axvline(float(rows["chance"].mean()), color=GREY, lw=1, ls=(0, (4, 2)), zorder=1)
    methods = sorted(set(rows["method"]) - set(REFERENCES))
    for y, (key, row) in enumerate(rows.iterrows()):
        reduced = bool(np.asarray(key, dtype=object)[2])
        look = look_of(str(row["method"]), methods)
        colour = GREY if row["method"] in REFERENCES else look.colour
        axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        axes.plot(row["value"], y, look.marker, ms=5.5, mew=1.4, color=colour, mfc="white" if reduced else colour)
    axes.set_xlim(0, None)
    axes.tick_params(axis="y", length=0)


def _label(row: dict) -> str:
    name = {"genes": "Genes, no representation"}.get(row["representation"], row["representation"])
    width = f"{int(row['n_dimensions'])} dimensions"
    return f"{name}, reduced to {width}" if row["reduced"] else f"{name} ({width})"
