"""Figures: read tables, draw, write picture and source data; no computing."""

from perturbed.figures.draw import FIGURES, draw_figure
from perturbed.figures.inputs import FigureInputs

__all__ = ["FIGURES", "FigureInputs", "draw_figure"]
