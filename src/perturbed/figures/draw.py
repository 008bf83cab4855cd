"""The figures by name, and the one function that draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from perturbed.config import StatisticsSpec
from perturbed.errors import ConfigError, suggest
from perturbed.figures.comparisons import draw_calibration, draw_contrasts, draw_strata
from perturbed.figures.expression import draw_embedding, draw_hardest_easiest
from perturbed.figures.inputs import FigureInputs, NothingToDraw, Page
from perturbed.figures.overview import draw_overview
from perturbed.figures.scatter import draw_scatter
from perturbed.figures.style import RC, draw_note, save
from perturbed.figures.training import draw_training_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[Page], tuple[Figure, pd.DataFrame]]] = {
    "overview": draw_overview,
    "scatter": draw_scatter,
    "calibration": draw_calibration,
    "hardest_easiest": draw_hardest_easiest,
    "embedding": draw_embedding,
    "training_curves": draw_training_curves,
    "contrasts": draw_contrasts,
    "strata": draw_strata,
}
"""Every figure: a function from a page to the drawing and the numbers drawn."""


def draw_figure(
    name: str,
    inputs: FigureInputs,
    out_stem: Path,
    *,
    dataset: str = "",
    split: str = "",
    spec: StatisticsSpec | None = None,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Draw a figure and write `out_stem.svg`, `.png` and `.csv` (the numbers drawn).

    Parameters
    ----------
    name
        One of `FIGURES`.
    inputs
        The files to read.
    out_stem
        Path without suffix.
    dataset, split
        What to draw; empty draws all (`overview` and `calibration`).
    spec
        Statistics of the run: primary contrast, baselines, level.
    titles
        Method names for readers, by method.

    Raises
    ------
    ConfigError
        If no figure has this name.
    DataError
        If an input is missing or holds nothing to draw.
    """
    import matplotlib as mpl

    if name not in FIGURES:
        raise ConfigError(f"figure: unknown figure {name!r}; {suggest(name, FIGURES)}")
    page = Page(name, inputs, dataset, split, spec or StatisticsSpec(), dict(titles or {}))
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever matplotlibrc the user has
        mpl.rcParams.update(RC)
        try:
            figure, source = FIGURES[name](page)
        except NothingToDraw as reason:
            figure, source = draw_note(f"Figure {name} of this run is empty: {reason}.")
        save(figure, source, Path(out_stem))
