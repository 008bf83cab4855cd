"""Maps of a latent block of cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.figures.style import GREY, OKABE_ITO, new_figure, title_of
from perturbed.study_config import LatentMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 7
"""A column with more values than colours is drawn in a continuous map of colours, without names."""


def draw_latent_map(table: pd.DataFrame, study: LatentMap, titles: Mapping[str, str]) -> Figure:
    """One row of panels per method, one panel per colour column; the share of like neighbours beside chance above.

    A like neighbour has the same value in the column; neighbours are of the latents, not of the map.
    """
    methods = list(dict.fromkeys(table["method"]))
    colours = [name for name in study.colours if name in table]
    figure = new_figure(3.6 * len(colours) + 0.6, 3.3 * len(methods) + 0.6)
    figure.suptitle(f"{study.title}: {study.dataset}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = figure.subplots(len(methods), len(colours), squeeze=False)
    for line, method in zip(panels, methods):
        here = table[table["method"] == method]
        for axes, column in zip(line, colours):
            _draw_cells(axes, here, column)
            like, chance = (here[f"{kind}_{column}"].iloc[0] for kind in ("like", "chance"))
            axes.set_title(
                f"{column.replace('_', ' ')}\nlike neighbours {like:.2f}, by chance {chance:.2f}", loc="left"
            )
        line[0].set_ylabel(f"{title_of(method, titles)}\nt-SNE 2")
    for axes in panels[-1]:
        axes.set_xlabel("t-SNE 1")
    return figure


def _draw_cells(axes: Axes, here: pd.DataFrame, column: str) -> None:
    values = here[column].astype(str)
    names = sorted(set(values))
    style: dict[str, Any] = {"s": 6, "lw": 0, "alpha": 0.8}
    if len(names) <= MOST_NAMED:
        for colour, name in zip(OKABE_ITO, names):
            part = here[values == name]
            axes.scatter(part["x"], part["y"], color=colour, label=name, **style)
        look: dict[str, Any] = {"markerscale": 2, "fontsize": 7.5, "handletextpad": 0.1, "borderaxespad": 0.2}
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), **look)  # beside the cells, not over them
    else:
        codes = np.searchsorted(names, values)
        axes.scatter(here["x"], here["y"], c=codes, cmap="turbo", **style)
        axes.text(0.02, 0.02, f"{len(names)} values", transform=axes.transAxes, fontsize=7.5, color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
