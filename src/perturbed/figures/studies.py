"""Figures of the studies that are made from scores: comparison, conditions, sweep and denoising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.evaluation.statistics import FLOORS
from perturbed.figures.overview import SHOWN_REFERENCES, order_methods
from perturbed.figures.style import (
    GREY,
    PALE,
    WIDTH,
    arrange_panels,
    arrow,
    hint,
    label_metric,
    look_of,
    new_figure,
    title_of,
    write_at_edges,
    write_in_row,
)
from perturbed.study_config import TOP_EXPRESSED, Comparison, Conditions, Denoising, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_COLUMNS = 4
_LABELS = {TOP_EXPRESSED: "Pearson Δ vs control, most expressed genes"}
_TERMS = {"kl_iota": "KL divergence of z_ι", "kl_nu": "KL divergence of z_ν"}
INTERVAL = "interval over genes and seeds"


# --- comparison ---------------------------------------------------------------------------------------------------


def draw_comparison(table: pd.DataFrame, study: Comparison, titles: Mapping[str, str]) -> Figure:
    """Points with intervals, one block per dataset and split, one panel per metric, methods from best to worst."""
    blocks = [block for _, block in table.groupby(["dataset", "split"], sort=True)]
    metrics = list(dict.fromkeys(table["metric"]))
    n_rows, n_columns = arrange_panels(len(metrics), N_COLUMNS)
    heights = [0.45 + n_rows * (0.8 + 0.19 * len(_rows(block, metrics[0]))) for block in blocks]
    width = max(6.5, 2.2 + (WIDTH - 2.2) * n_columns / N_COLUMNS)
    figure = new_figure(width, sum(heights) + 0.75)
    figure.suptitle(study.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    parts = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, block in zip(parts, blocks):
        part.suptitle(f"{block['dataset'].iloc[0]} · {block['split'].iloc[0]}", fontsize=10, x=0.01, ha="left")
        panels = part.subplots(n_rows, n_columns, sharey=True, squeeze=False).ravel()
        rows = _rows(block, metrics[0])
        for axes, metric in zip(panels, metrics):
            here = block[block["metric"] == metric].set_index("method")
            _draw_comparison_panel(axes, here, rows, study.methods)
            if "noise_free" not in set(block["method"]):  # beside simulated cells a paper's number means nothing
                _mark_published(axes, here["published"].rename({name: y for y, name in enumerate(rows)}))
            axes.set_title(fill(_LABELS.get(metric) or label_metric(metric), 24), loc="left")
        for axes in panels[len(metrics) :]:
            axes.set_visible(False)
        for axes in panels[::n_columns]:
            axes.set_yticks(range(len(rows)), [title_of(name, titles, 40) + _count(block, name) for name in rows])
            axes.set_ylim(len(rows) - 0.4, -0.6)
            for label, name in zip(axes.get_yticklabels(), rows):
                label.set_color(GREY if name in SHOWN_REFERENCES else "black")
    _add_comparison_legend(figure, table)
    return figure


def _rows(block: pd.DataFrame, metric: str) -> list[str]:
    there = set(block["method"])
    return [*order_methods(block, metric), *(name for name in SHOWN_REFERENCES if name in there)]


def _count(block: pd.DataFrame, name: str) -> str:
    """Of how many perturbations a method's means are, where it leaves some out that others have."""
    here = block[(block["method"] == name) & (block["n_perturbations"] > 0)]
    if here.empty or not here["n_undefined"].any():
        return ""
    fewest, left_out = min(zip(here["n_perturbations"], here["n_undefined"]))
    return f" ({fewest:.0f} of {fewest + left_out:.0f})"


def _draw_comparison_panel(axes: Axes, table: pd.DataFrame, rows: Sequence[str], methods: Sequence[str]) -> None:
    if table.empty:
        axes.set_visible(False)
        return
    floor = float(table["floor"].iloc[0])
    if np.isfinite(floor):
        axes.axvline(floor, color="#555555", lw=1, ls=(0, (4, 2)), zorder=0)
    if "technical_duplicate" in table.index:
        low, high = (float(table[column]["technical_duplicate"]) for column in ("ci_low", "ci_high"))
        if np.isfinite([low, high]).all():
            axes.axvspan(low, high, color=PALE, alpha=0.8, lw=0, zorder=0)
    far, outlying = [], _outlying(table)
    for y, name in enumerate(rows):
        row: dict[Any, Any] = table.loc[name].to_dict() if name in table.index else {"mean": np.nan}
        if not np.isfinite(row["mean"]):
            write_in_row(axes, y, "undefined" if name in table.index else "not scored")
            continue
        look = look_of(name, methods)
        colour = GREY if row["reference"] else look.colour
        if name in outlying:
            far.append((y, row["mean"], "", colour))
            continue
        axes.plot([row["ci_low"], row["ci_high"]], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        marker = "|" if row["reference"] else look.marker
        face = "white" if row["n_undefined"] else colour
        axes.plot(row["mean"], y, marker, ms=9 if marker == "|" else 5, mew=1.3, color=colour, mfc=face)
    low, high = axes.get_xlim()
    write_at_edges(axes, far, high - low)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(hint(int(table["direction"].iloc[0])), fontsize=8, color=GREY)
    axes.locator_params(axis="x", nbins=5)


def _mark_published(axes: Axes, values: pd.Series, *, upright: bool = False) -> None:
    """Mark a paper's numbers at their places (the index) with diamonds, far ones in writing at the edge."""
    low, high = axes.get_ylim() if upright else axes.get_xlim()
    reach = (high - low) / 4
    near = values[values.between(low - reach, high + reach)]
    x, y = (near.index, near) if upright else (near, near.index)
    axes.plot(x, y, "D", ms=5, mfc="none", mec="black", mew=0.9, zorder=3)
    rest = values[values.notna() & ~values.index.isin(near.index)]
    far = [(float(place), float(value), "◇", "black") for place, value in zip(rest.index, rest)]
    write_at_edges(axes, far, high - low, upright=upright)


def _outlying(table: pd.DataFrame) -> list[str]:
    """Methods so far from all others that a common axis would show nothing but that."""
    found = []
    for name in table.index[table["mean"].notna() & ~table["reference"] & ~table.index.isin(FLOORS)]:
        rest = table.drop(name).dropna(subset=["mean"])
        low, high = rest["ci_low"].min(), rest["ci_high"].max()
        if len(rest) < 4 or not high > low:
            continue
        if table["ci_low"][name] > high + 2 * (high - low) or table["ci_high"][name] < low - 2 * (high - low):
            found.append(str(name))
    return found


def _add_comparison_legend(figure: Figure, table: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color="black", marker="o", lw=1.6, label=f"mean over perturbations, {INTERVAL}"),
        Line2D([], [], color="#555555", ls=(0, (4, 2)), label="floor"),
        Patch(color=PALE, label="technical duplicate"),
    ]
    if (table["n_undefined"].gt(0) & table["n_perturbations"].gt(0)).any():
        style: dict[str, Any] = {"color": "black", "marker": "o", "mfc": "white", "lw": 0}
        handles.append(Line2D([], [], label="of fewer perturbations than the rest", **style))
    if table["published"].notna().any():
        style = {"marker": "D", "mfc": "none", "mec": "black", "lw": 0, "ms": 5}
        handles.append(Line2D([], [], label="number in the paper, on the paper's data", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=_fitting_columns(figure, handles))


def _fitting_columns(figure: Figure, handles: Sequence[Any]) -> int:
    """Columns of a legend that fit a figure's width."""
    return min(len(handles), max(1, int(figure.get_figwidth() // 3.2)))


# --- conditions ---------------------------------------------------------------------------------------------------


def draw_conditions(table: pd.DataFrame, study: Conditions, titles: Mapping[str, str]) -> Figure:
    """Metric `y` against metric `x`, a point per test condition: one row per dataset and split, a column per method."""
    keys = [key for key, _ in table.groupby(["dataset", "split"], sort=True)]
    there = set(table["method"])
    methods = [name for name in study.methods if name in there]
    figure = new_figure(1.2 + 2.3 * len(methods), 0.7 + 2.4 * len(keys))
    figure.suptitle(study.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = figure.subplots(len(keys), len(methods), squeeze=False, sharex="row", sharey="row")
    for line, (dataset, split) in zip(panels, keys):
        here = table[(table["dataset"] == dataset) & (table["split"] == split)]
        for axes, method in zip(line, methods):
            points = here[here["method"] == method].dropna(subset=["x", "y"])
            look = look_of(method, methods)
            axes.plot(points["x"], points["y"], look.marker, ms=4, color=look.colour, alpha=0.75, mec="white", mew=0.3)
            _mark_medians(axes, points, title_of(method, titles))
        line[0].set_ylabel(f"{dataset} · {split}\n{label_metric(study.y)}")
    for axes in panels[-1]:
        axes.set_xlabel(label_metric(study.x))
    return figure


def _mark_medians(axes: Axes, points: pd.DataFrame, title: str) -> None:
    if points.empty:
        axes.set_title(title, loc="left")
        axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", style="italic", color=GREY)
        return
    x, y = points["x"].median(), points["y"].median()
    axes.axvline(x, color=GREY, lw=0.7, ls=":", zorder=0)
    axes.axhline(y, color=GREY, lw=0.7, ls=":", zorder=0)
    axes.set_title(f"{title}\nn = {len(points)}, medians {x:.3g}, {y:.3g}", loc="left", fontsize=8.5)


# --- sweep --------------------------------------------------------------------------------------------------------


def draw_sweep(table: pd.DataFrame, study: Sweep, titles: Mapping[str, str]) -> Figure:
    """One panel per metric, last term of the training or probe; levels across in their order, a line per data set."""
    shown = table[table["order"].notna() & (table["quantity"] == "score")]
    scores = [metric for metric in study.metrics if metric in set(shown["metric"])]
    others = table[table["quantity"] != "score"]
    panels_of = [("score", metric) for metric in scores]
    panels_of += list(dict.fromkeys(zip(others["quantity"], others["metric"])))
    pages = list(dict.fromkeys(zip(shown["dataset"], shown["split"])))
    rows, columns = arrange_panels(len(panels_of), 3)
    figure = new_figure(max(4.5, 3.2 * columns), 2.6 * rows + 0.9)
    figure.suptitle(study.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (quantity, metric) in zip(panels, panels_of):
        part = table[(table["quantity"] == quantity) & (table["metric"] == metric)]
        for number, page in enumerate(pages):
            here = part[(part["dataset"] == page[0]) & (part["split"] == page[1])]
            _draw_levels(axes, here, number, len(pages))
        if quantity == "probe":
            _draw_floor(axes, float(part["floor"].mean()))
            pages_of_probe = dict.fromkeys(zip(part["dataset"], part["split"]))
            for page in pages_of_probe:
                if page not in pages:
                    here = part[(part["dataset"] == page[0]) & (part["split"] == page[1])]
                    _draw_levels(axes, here, len(pages), len(pages))
        levels = part[part["order"].notna()].drop_duplicates(["order", "published"])  # once, not for each dataset
        _mark_published(axes, levels.set_index("order")["published"], upright=True)
        names = [str(value) for value in study.levels.values()]
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(study.factor)
        direction = part["direction"].dropna()
        note = f" ({arrow(int(direction.iloc[0]))})" if len(direction) else ""
        axes.set_title(fill(_title_of_panel(quantity, metric) + note, 32), loc="left")
    for axes in panels[len(panels_of) :]:
        axes.set_visible(False)
    _add_sweep_legend(figure, pages, table, titles)
    return figure


def _title_of_panel(quantity: str, metric: str) -> str:
    if quantity == "score":
        return label_metric(metric)
    return (
        f"{_TERMS.get(metric, metric.replace('_', ' '))}, last epoch"
        if quantity == "history"
        else "z_ι: balanced accuracy of a probe for the condition"
    )


def _draw_floor(axes: Axes, floor: float) -> None:
    """A line of its own look with its name on it: the dashed ones of the legend are baselines."""
    axes.axhline(floor, color=GREY, lw=1, ls=":", zorder=0)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (0, 2), "textcoords": "offset points"}
    axes.annotate("permuted labels", (0.99, floor), ha="right", va="bottom", fontsize=7.5, color=GREY, **place)


def _draw_levels(axes: Axes, here: pd.DataFrame, number: int, n_pages: int) -> None:
    levels = here[here["order"].notna()].sort_values("order")
    colour, marker = _PAGES[number % len(_PAGES)]
    x = levels["order"].to_numpy(float) + 0.12 * (number - (n_pages - 1) / 2)
    axes.vlines(x, levels["ci_low"], levels["ci_high"], color=colour, lw=1.4)
    axes.plot(x, levels["mean"], marker=marker, color=colour, lw=1, ms=5)
    baselines = here[here["order"].isna() & ~here["reference"]]
    for dash, (_, row) in zip(_DASHES, baselines.iterrows()):
        axes.axhline(row["mean"], color=colour, lw=0.9, ls=dash, zorder=0)


_PAGES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
_DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def _add_sweep_legend(
    figure: Figure, pages: Sequence[tuple[str, str]], table: pd.DataFrame, titles: Mapping[str, str]
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, lw=1, label=f"{dataset} · {split}")
        for (colour, marker), (dataset, split) in zip(_PAGES, pages)
    ]
    baselines = dict.fromkeys(table.loc[table["order"].isna() & ~table["reference"], "method"])
    handles += [
        Line2D([], [], color=GREY, lw=0.9, ls=dash, label=title_of(name, titles, 40))
        for dash, name in zip(_DASHES, baselines)
    ]
    if table["published"].notna().any():
        style: dict[str, Any] = {"marker": "D", "mfc": "none", "mec": "black", "lw": 0, "ms": 5}
        handles.append(Line2D([], [], label="number in the paper, on the paper's data", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=_fitting_columns(figure, handles))


# --- denoising ----------------------------------------------------------------------------------------------------


def draw_denoising(table: pd.DataFrame, study: Denoising, titles: Mapping[str, str]) -> Figure:
    """Gain against training cells per condition: a column per metric, a row per dataset and what the gain is over.

    The second row of a dataset, where it has one, is over the reference (the baseline without sampling noise).
    """
    lines = list(dict.fromkeys(zip(table["dataset"], table["baseline"])))
    lines.sort(key=lambda line: (line[0], line[1] != study.baseline))
    metrics = [metric for metric in study.metrics if metric in set(table["metric"])]
    methods = list(dict.fromkeys([*study.methods, study.reference, study.baseline]))
    methods = [name for name in methods if name in set(table["method"])]
    figure = new_figure(max(5.0, 3.4 * len(metrics)), 2.5 * len(lines) + 0.9)
    figure.suptitle(study.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    panels = figure.subplots(len(lines), len(metrics), squeeze=False)
    for line, (dataset, baseline) in zip(panels, lines):
        for axes, metric in zip(line, metrics):
            rows = (table["dataset"] == dataset) & (table["baseline"] == baseline) & (table["metric"] == metric)
            _draw_gains(axes, table[rows], methods)
            axes.set_title(f"{dataset}\n{label_metric(metric)}", loc="left")
            axes.set_xlabel("training cells per condition")
        line[0].set_ylabel(f"gain over {title_of(baseline, titles)}\n→ better")
    _add_gain_legend(figure, methods, study, titles)
    return figure


def _draw_gains(axes: Axes, here: pd.DataFrame, methods: Sequence[str]) -> None:
    from matplotlib.ticker import NullLocator

    axes.axhline(0, color=GREY, lw=0.9)
    n = len(methods)
    for number, method in enumerate(methods):
        part = here[here["method"] == method].sort_values("cells")
        look = look_of(method, methods)
        is_reference = bool(part["reference"].any())
        colour = GREY if is_reference else look.colour
        x = part["cells"].to_numpy(float) * 1.05 ** (number - (n - 1) / 2)
        axes.vlines(x, part["ci_low"], part["ci_high"], color=colour, lw=1.3)
        axes.plot(x, part["gain"], ":" if is_reference else "-", marker=look.marker, ms=4.5, lw=1, color=colour)
    cells = sorted(set(here["cells"]))
    axes.set_xscale("log")
    axes.set_xticks(cells, [f"{value:,}" for value in cells])
    axes.xaxis.set_minor_locator(NullLocator())
    first, last = (here[here["cells"] == number] for number in (cells[0], cells[-1]))
    _write_last(axes, last, methods, falls=first["gain"].mean() > last["gain"].mean())


def _write_last(axes: Axes, here: pd.DataFrame, methods: Sequence[str], *, falls: bool) -> None:
    """Write the gains at most cells, which decide and are small beside the others, where the lines leave room."""
    rows = here.set_index("method")
    lines = [(f"at {here['cells'].iloc[0]:,} cells", "black")]
    for name in (method for method in methods if method in rows.index):
        gain, low, high = (float(rows[column][name]) for column in ("gain", "ci_low", "ci_high"))
        colour = GREY if rows["reference"][name] else look_of(name, methods).colour
        digits = 2 if max(abs(low), abs(high)) >= 0.5 else 3
        text = f"{gain:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        lines.append((text.replace("-", "−"), colour))
    for number, (text, colour) in enumerate(lines):
        place = (0.99, 0.98 - 0.085 * number if falls else 0.03 + 0.085 * (len(lines) - 1 - number))
        look: dict[str, Any] = {"ha": "right", "va": "top" if falls else "bottom", "fontsize": 7.5, "color": colour}
        axes.annotate(text, place, xycoords="axes fraction", **look)


def _add_gain_legend(figure: Figure, methods: Sequence[str], study: Denoising, titles: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in methods:
        look, reference = look_of(name, methods), name == study.reference
        style: dict[str, Any] = {"color": GREY if reference else look.colour, "ls": ":" if reference else "-"}
        handles.append(Line2D([], [], marker=look.marker, lw=1, label=title_of(name, titles, 40), **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=_fitting_columns(figure, handles))
