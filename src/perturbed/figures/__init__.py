"""Figures: read tables, draw, write picture and source data; no computing."""

from perturbed.figures.draw import FIGURES, draw_figure
from perturbed.figures.inputs import FigureInputs
from perturbed.figures.study import STUDY_FIGURES, draw_study

__all__ = ["FIGURES", "STUDY_FIGURES", "FigureInputs", "draw_figure", "draw_study"]
