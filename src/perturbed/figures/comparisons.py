"""Contrasts with the baselines, strata, and the calibration of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.figures.inputs import NothingToDraw, Page
from perturbed.figures.overview import order_methods, pick_metrics
from perturbed.figures.scatter import SUBGROUP_TITLES
from perturbed.figures.style import (
    GREY,
    OKABE_ITO,
    WIDTH,
    arrange_panels,
    arrow,
    label_metric,
    look_of,
    new_figure,
    title_of,
    write_in_row,
    write_undefined,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_METRICS = 3


# --- contrasts ----------------------------------------------------------------------------------------------------


def draw_contrasts(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw each method's difference to each baseline as a forest plot; reads `contrasts.csv`, `summary.csv`."""
    table = page.table("contrasts")
    metrics = pick_metrics(table, page.spec.primary_metric, N_METRICS)
    table = table[table["metric"].isin(metrics)]
    baselines = [name for name in page.spec.baselines if name in set(table["baseline"])]
    if not baselines:
        raise NothingToDraw(f"no method was compared with {', '.join(page.spec.baselines)}")
    order = order_methods(page.table("summary"), page.spec.primary_metric)
    methods = [name for name in order if name in set(table["method"])]
    figure = new_figure(WIDTH, len(metrics) * (0.75 + 0.21 * len(methods)) + 0.6)
    panels = figure.subplots(len(metrics), len(baselines), squeeze=False, sharey=True)
    for row, metric in zip(panels, metrics):
        for axes, baseline in zip(row, baselines):
            part = table[(table["metric"] == metric) & (table["baseline"] == baseline)].set_index("method")
            _draw_forest(axes, part, methods, baseline, 1 - page.spec.confidence)
            over = f"gain over {title_of(baseline, page.titles, 40)}"
            axes.set_title(f"{label_metric(metric)}:\n{over}", loc="left", fontsize=9)
        row[0].set_yticks(range(len(methods)), [title_of(name, page.titles, 40) for name in methods])
        row[0].set_ylim(len(methods) - 0.4, -0.6)
    for axes in panels[-1]:
        axes.set_xlabel("mean gain, better →", fontsize=8, color=GREY)
    _add_contrast_legend(figure, page)
    return figure, table


def _draw_forest(axes: Axes, table: pd.DataFrame, methods: list[str], baseline: str, alpha: float) -> None:
    axes.axvline(0, color=GREY, lw=1, zorder=0)
    axes.tick_params(axis="y", length=0)
    if not np.isfinite(table["difference"]).any():
        axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", style="italic", color=GREY)
        axes.set_xticks([])
        return
    at_right: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7}
    for y, name in enumerate(methods):
        if name == baseline:
            write_in_row(axes, y, "is the baseline")
            continue
        row: dict[Any, Any] = table.loc[name].to_dict() if name in table.index else {"difference": np.nan}
        if not np.isfinite(row["difference"]):
            write_undefined(axes, y)
            continue
        look = look_of(name, methods)
        face = look.colour if row["p_holm"] < alpha else "white"
        axes.plot([row["ci_low"], row["ci_high"]], [y, y], color=look.colour, lw=1.6, solid_capstyle="butt")
        axes.plot(row["difference"], y, look.marker, color=look.colour, mfc=face, ms=5.5, mew=1.4)
        if row["primary"]:
            axes.axhspan(y - 0.45, y + 0.45, color=OKABE_ITO[4], alpha=0.22, lw=0, zorder=-1)
        won = f"{100 * row['win_rate']:.0f} %"
        axes.annotate(won, (1.01, y), color=GREY, annotation_clip=False, **at_right)


def _add_contrast_legend(figure: Figure, page: Page) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    alpha = 1 - page.spec.confidence
    handles = [
        Line2D([], [], color="black", marker="o", lw=1.6, label=f"adjusted p < {alpha:.2g}"),
        Line2D([], [], color="black", marker="o", mfc="white", lw=1.6, label=f"adjusted p ≥ {alpha:.2g}"),
        Patch(color=OKABE_ITO[4], alpha=0.22, label="primary contrast of the config"),
        Line2D([], [], lw=0, label="right margin: perturbations on which the method is better"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)


# --- strata -------------------------------------------------------------------------------------------------------


def draw_strata(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw the primary metric by effect-size stratum and by subgroup; reads `strata.csv`, `summary.csv`."""
    metric = page.spec.primary_metric
    table = page.table("strata")
    table = table[(table["metric"] == metric) & (~table["reference"] | (table["method"] == "technical_duplicate"))]
    if table.empty:
        raise NothingToDraw(f"no stratum has a score for {metric}")
    order = order_methods(page.table("summary"), metric)
    methods = [name for name in (*order, "technical_duplicate") if name in set(table["method"])]
    kinds = [kind for kind in ("effect_size", "subgroup") if kind in set(table["kind"])]
    counts = [table.loc[table["kind"] == kind, "stratum"].nunique() for kind in kinds]
    figure = new_figure(WIDTH, 3.9)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True, width_ratios=counts)[0]
    for axes, kind in zip(panels, kinds):
        _draw_strata_panel(axes, table[table["kind"] == kind], kind, methods, page)
    panels[0].set_ylabel(f"{label_metric(metric)}\n({arrow(int(table['direction'].iloc[0]))})")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure, table


def _draw_strata_panel(axes: Axes, table: pd.DataFrame, kind: str, methods: list[str], page: Page) -> None:
    strata = sorted(set(table["stratum"]), key=lambda name: (len(name), name) if kind == "effect_size" else (0, name))
    step = 0.8 / max(len(methods), 1)
    for i, method in enumerate(methods):
        rows = table[table["method"] == method].set_index("stratum").reindex(strata)
        x = np.arange(len(strata)) + (i - (len(methods) - 1) / 2) * step
        reference = method == "technical_duplicate"
        look = look_of(method, methods)
        colour, marker = (GREY, "_") if reference else (look.colour, look.marker)
        label = title_of(method, page.titles) + (" (ceiling)" if reference else "")
        axes.vlines(x, rows["ci_low"], rows["ci_high"], color=colour, lw=1.4)
        axes.plot(x, rows["mean"], marker, ms=8 if reference else 5, mew=1.4, color=colour, label=label)
        for at in x[rows["mean"].isna().to_numpy()]:
            style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 6.5, "style": "italic"}
            axes.annotate("undefined", (at, 0.02), xycoords=("data", "axes fraction"), color=colour, **style)
    for edge in np.arange(1, len(strata)) - 0.5:
        axes.axvline(edge, color="#e6e6e6", lw=0.8, zorder=0)
    axes.set_xlim(-0.5, len(strata) - 0.5)
    axes.set_xticks(range(len(strata)), [_name_stratum(table, kind, stratum, len(strata)) for stratum in strata])
    axes.tick_params(axis="x", length=0)
    axes.set_title("by effect size, ‖observed Δ‖₂" if kind == "effect_size" else "by subgroup", loc="left")


def _name_stratum(table: pd.DataFrame, kind: str, stratum: str, n_strata: int) -> str:
    row = table[table["stratum"] == stratum].iloc[0]
    n = int(table.loc[table["stratum"] == stratum, ["n_perturbations", "n_undefined"]].sum(axis=1).max())
    if kind == "subgroup":
        return f"{SUBGROUP_TITLES.get(stratum, stratum).replace(', ', ',' + chr(10))}\nn = {n}"
    ends = {"1": "weakest\n", str(n_strata): "strongest\n"}
    return f"{ends.get(stratum, chr(10))}{row['effect_size_low']:.2g}–{row['effect_size_high']:.2g}\nn = {n}"


# --- calibration --------------------------------------------------------------------------------------------------


def draw_calibration(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw the dynamic range fraction of every metric; reads `calibration.csv`.

    Splits in which it is undefined throughout, because no floor was scored there, are counted below instead.
    """
    from matplotlib.lines import Line2D

    table = page.table("calibration")
    defined = table["drf"].notna().groupby([table["dataset"], table["split"]]).any().sort_index()
    pages = list(defined.index[defined]) or list(defined.index)
    inter = (
        table[table["positive"] == "interpolated_duplicate"]
        if "interpolated_duplicate" in set(table["positive"])
        else table
    )
    metrics = list(inter.groupby("metric")["drf"].mean().sort_values(ascending=False, na_position="last").index)
    rows, columns = arrange_panels(len(pages), 3)
    figure = new_figure(max(6.0, 3.4 * columns + 1.6), rows * (0.21 * len(metrics) + 0.8) + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).ravel()
    for axes, (dataset, split) in zip(panels, pages):
        part = table[(table["dataset"] == dataset) & (table["split"] == split)]
        _draw_drf(axes, part, metrics)
        axes.set_title(f"{dataset} · {split}", loc="left", fontweight="bold")
        axes.set_xlabel("dynamic range fraction: 0 = floor, 1 = truth", fontsize=8)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(pages) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_yticks(range(len(metrics)), [label_metric(metric) for metric in metrics])
        axes.set_ylim(len(metrics) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    if len(pages) < len(defined):
        handles.append(Line2D([], [], ls="none"))
        labels.append(f"not drawn, because no floor was scored: {len(defined) - len(pages)} more")
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure, table


def _draw_drf(axes: Axes, table: pd.DataFrame, metrics: list[str]) -> None:
    for y0 in range(len(metrics)):
        axes.axhline(y0, color="#efefef", lw=0.8, zorder=-1)
    for x in (0, 1):
        axes.axvline(x, color=GREY, lw=1, ls="-" if x else (0, (4, 2)), zorder=0)
    styles = {"interpolated_duplicate": (OKABE_ITO[0], "o", -0.13), "technical_duplicate": (OKABE_ITO[1], "s", 0.13)}
    for positive, (colour, marker, shift) in styles.items():
        rows = table[table["positive"] == positive].set_index("metric").reindex(metrics)
        y = np.arange(len(metrics)) + shift
        axes.hlines(y, rows["drf_low"], rows["drf_high"], color=colour, lw=1.5)
        label = f"{positive.replace('_', ' ')} as good prediction"
        axes.plot(rows["drf"], y, marker, color=colour, ms=5, ls="", label=label)
    for row, metric in enumerate(metrics):
        part = table[table["metric"] == metric]
        if part["drf"].isna().all():
            write_undefined(axes, row)
    axes.tick_params(axis="y", length=0)
