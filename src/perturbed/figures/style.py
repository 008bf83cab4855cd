"""One look for all figures: sizes, colours that colour-blind readers can tell apart, names of metrics and methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from perturbed.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0
"""Inches; the report shows figures at about this width."""
GREY = "#6e6e6e"
PALE = "#d9d9d9"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette; yellow is left out, because it vanishes on white."""
MUTED = ("#332288", "#AA4499", "#999933", "#661100", "#88CCEE", "#CC6677", "#44AA99")
"""Tol's muted palette, for methods after the first 21: lines have no markers to tell them by."""
MARKERS = ("o", "s", "^", "D", "v", "P")

RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "savefig.dpi": 160,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "perturbed",
}

# The same method has the same look in every figure of every run: named ones by this list, others after them.
_KNOWN = (
    "perturbedvae", "additive", "shrunk_saturating", "shrunk_interaction", "pca_ridge", "matching_mean", "no_change",
    "gears", "knn", "elastic_net", "random_forest", "pca_additive", "scvi_additive", "discrepancy_vae", "sena",
    "svae_plus", "sams_vae", "embedding", "external", "mean_effect",
)  # fmt: skip

REFERENCE_TITLES = {
    "technical_duplicate": "Technical duplicate",
    "interpolated_duplicate": "Interpolated duplicate",
    "truth": "Truth",
    "noise_free": "Noise-free truth",
    "noise_free_additive": "Noise-free additive",
}

METRIC_TITLES = {
    "pearson_delta_pert": "Pearson Δ vs perturbed mean",
    "pearson_delta_ctrl": "Pearson Δ vs control",
    "pearson_delta_ctrl_disjoint": "Pearson Δ, disjoint controls",
    "pearson_delta_ctrl_top_de": "Pearson Δ, top DE genes",
    "cosine": "Cosine of Δ",
    "l2_delta": "L2 of Δ",
    "rmse": "RMSE",
    "rmse_top_de": "RMSE, top DE genes",
    "rmse_relative": "Relative RMSE",
    "rmse_relative_sampled": "Relative RMSE, sampled cells",
    "mae": "MAE",
    "wmse": "Weighted MSE",
    "r2": "R²",
    "r2_top_de": "R², top DE genes",
    "r2_delta_weighted": "Weighted R² of Δ",
    "r2_cells": "R² of cells",
    "r2_published": "R² as published (clipped)",
    "pds_l1": "Perturbation discrimination, L1",
    "pds_cosine": "Perturbation discrimination, cosine",
    "centroid_accuracy": "Centroid accuracy",
    "de_overlap": "DE overlap",
    "de_direction": "DE direction match",
    "de_pr_auc": "DE PR-AUC",
    "e_distance": "E-distance",
    "mmd_rbf": "MMD, RBF kernel",
    "mmd_published": "MMD as published",
    "effect_size_ratio": "Effect-size ratio",
    "spread_ratio": "Spread ratio (mode collapse)",
}

KEY_METRICS = (
    "pearson_delta_pert", "l2_delta", "pearson_delta_ctrl_disjoint", "pearson_delta_ctrl", "pds_l1", "de_overlap",
    "e_distance", "r2", "rmse_relative", "cosine",
)  # fmt: skip
"""Metrics that the overview shows, in this order, as many as were scored."""


@dataclass(frozen=True)
class Look:
    """Colour and marker of a method."""

    colour: str
    marker: str


def look_of(method: str, methods: Iterable[str] = ()) -> Look:
    """Colour and marker of a method; names nobody has listed come after the known ones, in alphabetical order."""
    order = [*_KNOWN, *sorted({method, *methods} - set(_KNOWN))]
    cycle, place = divmod(order.index(method), len(OKABE_ITO))
    palette = (OKABE_ITO, MUTED)[cycle // 3 % 2]
    return Look(_shade(palette[place], cycle), MARKERS[cycle % len(MARKERS)])


def _shade(colour: str, cycle: int) -> str:
    """The palette darker the second time round and paler the third, so that lines without markers differ too."""
    if cycle % 3 == 0:
        return colour
    if colour == "#000000":
        return ("#8C510A", "#882255")[cycle % 3 - 1]  # no grey: that is what references have
    share, towards = ((0.45, 0), (0.5, 255))[cycle % 3 - 1]
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round((1 - share) * part + share * towards):02X}" for part in parts)


def title_of(name: str, titles: Mapping[str, str], width: int = 26) -> str:
    """A method's or reference's name for readers, wrapped."""
    return fill(titles.get(name, REFERENCE_TITLES.get(name, name.replace("_", " "))), width)


def label_metric(metric: str) -> str:
    """A metric's name for readers."""
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def arrange_panels(n: int, most: int) -> tuple[int, int]:
    """Rows and columns for `n` panels, at most `most` in a row and the rows as equal as can be."""
    rows = -(-n // most)
    return rows, -(-n // rows)


def arrow(direction: int) -> str:
    """The arrow beside a metric's name."""
    return {1: "↑\u00a0better", -1: "↓\u00a0better"}.get(direction, "best\u00a0at\u00a01")  # never broken over lines


def hint(direction: int) -> str:
    """Which way along a horizontal axis is better."""
    return {1: "higher is better →", -1: "← lower is better"}.get(direction, "best at 1")


def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    """An empty figure that needs no display; `compressed` suits panels of fixed shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.05)  # type: ignore[union-attr, call-arg]
    return figure


def write_in_row(axes: Axes, y: float, text: str) -> None:
    """Put a remark where a row has no point; lines behind it stay apart from it."""
    look: dict[str, Any] = {"va": "center", "fontsize": 7.5, "style": "italic", "color": GREY}
    white = {"facecolor": "white", "alpha": 0.85, "pad": 0.6, "lw": 0}
    axes.annotate(text, (0.02, y), xycoords=("axes fraction", "data"), bbox=white, **look)


def write_undefined(axes: Axes, y: float) -> None:
    """Say in a row of a horizontal plot that there is no score."""
    write_in_row(axes, y, "undefined")


def write_at_edges(
    axes: Axes, far: Iterable[tuple[float, float, str, str]], span: float, *, upright: bool = False
) -> None:
    """Write values that lie far outside of a panel at its edge, with an arrow, and make room for them.

    Parameters
    ----------
    axes
        The panel, with everything else drawn.
    far
        Place on the other axis, value, symbol before the value, and colour.
    span
        What the values of the panel span.
    upright
        Values go up instead of across.
    """
    low, high = axes.get_ylim() if upright else axes.get_xlim()
    sides: set[int] = set()
    for place, value, symbol, colour in far:
        side = int(value > high)
        sides.add(side)
        said = f"{symbol} {value:.3g}".strip()
        look: dict[str, Any] = {"fontsize": 7.5, "color": colour}
        if upright:
            look |= {"xycoords": ("data", "axes fraction"), "ha": "center", "va": ("bottom", "top")[side]}
            axes.annotate(f"{said} {'↓↑'[side]}", (place, 0.02 + 0.96 * side), **look)
        else:
            look |= {"xycoords": ("axes fraction", "data"), "ha": ("left", "right")[side], "va": "center"}
            axes.annotate((f"← {said}", f"{said} →")[side], (0.01 + 0.98 * side, place), **look)
    room = span * (0.12 if upright else 0.45)  # a value's own height, or its width in a narrow panel
    limits = (low - room * (0 in sides), high + room * (1 in sides))
    (axes.set_ylim if upright else axes.set_xlim)(limits)


def draw_note(text: str) -> tuple[Figure, pd.DataFrame]:
    """A figure that says why there is nothing to draw."""
    figure = new_figure(WIDTH * 0.7, 1.2)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, fill(text, 90), ha="center", va="center", style="italic", color=GREY)
    return figure, pd.DataFrame({"note": [text]})


def save(figure: Figure, source: pd.DataFrame, stem: Path) -> None:
    """Write `stem.svg`, `stem.png` and the drawn numbers as `stem.csv`; equal inputs give equal bytes."""
    _take_names_literally(figure)
    figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
    figure.set_layout_engine("none")  # both pictures get the same layout, solved once
    with atomic(stem.with_name(f"{stem.name}.svg")) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})
    with atomic(stem.with_name(f"{stem.name}.png")) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
    with atomic(stem.with_name(f"{stem.name}.csv")) as part:
        source.to_csv(part, index=False, lineterminator="\n", float_format="%.6g")


def _take_names_literally(figure: Figure) -> None:
    """Show text as it stands: between two dollar signs of a name matplotlib would read a formula, and may fail to.

    The powers of ten at logarithmic axes are formulas, and stay so.
    """
    from matplotlib.text import Text

    powers: set[int] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [*axis.get_majorticklabels(), *axis.get_minorticklabels(), axis.get_offset_text()]
        powers |= {id(label) for label in labels if axis.get_scale() != "linear"}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in powers:
            text.set_parse_math(False)
