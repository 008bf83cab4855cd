"""Terms of the loss by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbed.figures.inputs import NothingToDraw, Page
from perturbed.figures.style import WIDTH, arrange_panels, look_of, new_figure, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_COLUMNS = 4
VALIDATION = "val_"
"""A term of this prefix is drawn dashed in the panel of the term without it."""


def draw_training_curves(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw one panel per loss term, one line per seed and fold; reads the training histories.

    A term that is 0 throughout, such as one of weight 0, gets no panel: the legend names it.
    """
    table = page.histories()
    if "method" not in table:
        table.insert(0, "method", "")
    keys = ["method", "fold", "seed"]
    table = table.sort_values([*keys, "term", "epoch"], ignore_index=True)
    bare = table["term"].str.removeprefix(VALIDATION)
    lives = table["value"].ne(0).groupby(bare).any()  # NaN is no 0
    terms = list(dict.fromkeys(term.removeprefix(VALIDATION) for term in sorted(set(table["term"]), key=_rank)))
    silent = [term for term in terms if not lives[term]]
    terms = [term for term in terms if lives[term]]
    if not terms:
        raise NothingToDraw("no method of this run trains by epochs")
    table = table[bare.isin(terms)].reset_index(drop=True)
    methods = sorted(set(table["method"]))
    rows, columns = arrange_panels(len(terms), N_COLUMNS)
    figure = new_figure(max(5.0, WIDTH * columns / N_COLUMNS), 2.3 * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, term in zip(panels, terms):
        for name, style in ((term, "-"), (VALIDATION + term, "--")):
            for (method, *_), line in table[table["term"] == name].groupby(keys, sort=True):
                colour = look_of(str(method), methods).colour
                axes.plot(line["epoch"], line["value"], style, color=colour, lw=1, alpha=0.75)
        _finish_panel(axes, term)
    for axes in panels[len(terms) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(terms) - columns) : len(terms)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("epoch")
    _add_legend(figure, page, methods, bool(table["term"].str.startswith(VALIDATION).any()), silent)
    return figure, table


def _rank(term: str) -> tuple[bool, str]:
    """The whole loss first, the other terms by name."""
    bare = term.removeprefix(VALIDATION)
    return bare not in ("loss", "total"), bare


def _finish_panel(axes: Axes, term: str) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines] or [np.zeros(0)])
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 50 * finite.min():
        axes.set_yscale("log")
    if len(finite) < len(values):
        undefined = f"{len(values) - len(finite)} values undefined"
        axes.text(0.98, 0.95, undefined, transform=axes.transAxes, ha="right", va="top", fontsize=7.5, style="italic")
    axes.set_title(term.replace("_", " "), loc="left")


def _add_legend(figure: Figure, page: Page, methods: list[str], validation: bool, silent: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look_of(name, methods).colour, label=title_of(name, page.titles, 40))
        for name in methods
        if name
    ]
    handles += [Line2D([], [], color="black", label="training cells (one line per seed and fold)")]
    handles += [Line2D([], [], color="black", ls="--", label="validation cells")] if validation else []
    names = ", ".join(term.replace("_", " ") for term in silent)
    handles += [Line2D([], [], ls="none", label=f"0 throughout, no panel: {names}")] if silent else []
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
