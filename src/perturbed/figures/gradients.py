"""The figures of the gradient cases by kind: flow, UMAP, screen, and the decoders' quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.errors import ConfigError, DataError, suggest
from perturbed.figures.flow import ARMS, draw_case
from perturbed.figures.style import GREY, OKABE_ITO, RC, WIDTH, draw_note, new_figure, save
from perturbed.gradients.gather import read_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCREENED = {
    "gradient": (OKABE_ITO[1], "o", "target's gradient"),
    "covariance": (OKABE_ITO[0], "s", "covariance of target and latents"),
    "gradient, untrained decoder": (GREY, "D", "target's gradient, untrained decoder"),
    "planted effect": (OKABE_ITO[2], "^", "gradient of the planted effect"),
    "planted effect, untrained decoder": (OKABE_ITO[3], "v", "the same, untrained decoder"),
}
"""Look and name of each flow of a screen."""
MEASURES = {
    "cosine": ("cosine with the observed shift", 0.0),
    "percentile_among_alike": ("share of random genes that agree less", 0.5),
    "percentile_among_targets": ("share of other targets that agree less", 0.5),
}
"""Panels of a screen, each with its value without knowledge."""
QUALITY = {
    "mse": "MSE", "mae_expression": "MAE", "ari_best_kmeans": "ARI, best\nk-means", "accuracy": "accuracy", "f1": "F1",
    "auc": "AUC", "spearman": "Spearman", "mae": "MAE of\nthe head",
}  # fmt: skip
"""Columns of the quality table."""
ERRORS = {
    "mse_log1p_scaled": "mse", "mse_log_normalised": "mse",
    "mae_log1p_scaled": "mae_expression", "mae_log_normalised": "mae_expression",
}  # fmt: skip
"""Errors of expression share a column; those of log-normalised expression are marked."""
N_ARROWS = 60
"""Arrows of a UMAP; they are long, because islands of a UMAP lie anywhere."""
PARTS = {"train": "training cells", "test": "test cells", "all": "all cells"}


def draw_case_figure(kind: str, tables: Path, out_stem: Path, title: str = "") -> None:
    """Draw one figure of a case and write `out_stem.svg`, `.png` and `.csv` (the numbers drawn).

    Parameters
    ----------
    kind
        `flow`, `umap` or `screen`.
    tables
        Folder of `perturbed.gradients.gather.gather_flows`.
    out_stem
        Path without suffix.
    title
        Title of the figure.

    Raises
    ------
    ConfigError
        If there is no such kind.
    DataError
        If the folder lacks the tables.
    """
    draws: dict[str, tuple[Any, tuple[str, ...]]] = {
        "flow": (draw_case, ("agreement_seeds", "arrivals_seeds", "genes_seeds", "paths", "field", "cells")),
        "umap": (draw_umap, ("umap", "umap_arrows")),
        "screen": (draw_screen, ("agreement_seeds", "screen_seeds")),
    }
    if kind not in draws:
        raise ConfigError(f"flow draw: no kind {kind!r}; {suggest(kind, draws)}")
    draw, names = draws[kind]
    found = {name: read_csv(tables / f"{name}.csv") for name in names if (tables / f"{name}.csv").is_file()}
    missing = [name for name in names if name not in found and name != "field"]
    if missing:
        raise DataError(f"{tables}: no {missing[0]}.csv; make the folder with `perturbed flow gather`")
    source = pd.concat([table.assign(table=name) for name, table in found.items()], ignore_index=True)
    first = ["table", *(column for column in source if column != "table")]
    if "genes_seeds" in found:  # thousands of genes stand in the case's own tables; here those that are shown
        unranked = (source["table"] == "genes_seeds") & source["percentile_among_alike"].isna()
        source = source[~unranked]
    _save(lambda: draw(found, title), source[first], out_stem)


def draw_quality_figure(folders: Sequence[Path], out_stem: Path, titles: Mapping[str, str]) -> None:
    """Draw how good the decoders of all cases are and write `out_stem.svg`, `.png` and `.csv`.

    Parameters
    ----------
    folders
        Gathered tables, each called `CASE/tables`.
    out_stem
        Path without suffix.
    titles
        Titles of the cases, by name.
    """
    rows = []
    for folder in folders:
        for name in ("quality", "heads"):
            path = folder / f"{name}.csv"
            table = read_csv(path) if path.is_file() else pd.DataFrame()
            if len(table):
                rows.append(table.assign(case=folder.parent.name))
    if not rows:
        _save(lambda: draw_note("No case of this run has a decoder of its own to judge."), pd.DataFrame(), out_stem)
        return
    long = pd.concat(rows, ignore_index=True)
    grouped = long.groupby(["case", "part", "metric"], sort=False)
    source = grouped["value"].agg(mean="mean", min="min", max="max", n="size").reset_index()
    _save(lambda: draw_quality(source, titles), source, out_stem)


def _save(draw: Any, source: pd.DataFrame, out_stem: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever matplotlibrc the user has
        mpl.rcParams.update(RC)
        drawn = draw()
        save(drawn[0] if isinstance(drawn, tuple) else drawn, source, out_stem)


def draw_umap(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """UMAP of the latents by arm and by group, with arrows from unperturbed cells to where the steps take them."""
    cells, arrows = tables["umap"], tables["umap_arrows"]
    figure = new_figure(WIDTH, 4.9)
    left, right = figure.subplots(1, 2)
    look: dict[str, Any] = {"s": 5, "lw": 0, "alpha": 0.5, "rasterized": True}
    for arm, colour in ARMS.items():
        inside = cells["arm"] == arm
        if inside.any():
            left.scatter(cells.loc[inside, "x"], cells.loc[inside, "y"], color=colour, label=arm, **look)
    shown = arrows.iloc[np.linspace(0, len(arrows) - 1, min(N_ARROWS, len(arrows))).astype(int)]
    left.quiver(
        shown["x"], shown["y"], shown["u"], shown["v"], angles="xy", scale_units="xy", scale=1, width=0.002,
        headwidth=7, headlength=8, color="#222222", alpha=0.55, zorder=4,
    )  # fmt: skip
    groups = list(cells["group"].value_counts().index)
    for place, group in enumerate(groups):
        inside = cells["group"] == group
        marker = ("o", "^", "s")[place // len(OKABE_ITO) % 3]
        colour = OKABE_ITO[place % len(OKABE_ITO)]
        right.scatter(cells.loc[inside, "x"], cells.loc[inside, "y"], color=colour, label=group, marker=marker, **look)
    for axes, name in ((left, "Where the steps take unperturbed cells"), (right, "Groups of cells")):
        axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        axes.set_title(name, loc="left")
        legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4, markerscale=2.5)
        for handle in legend.legend_handles:
            handle.set_alpha(1)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def draw_screen(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """Mean agreement over the perturbations of a screen beside rival and null, and the perturbations themselves."""
    means, each = tables["agreement_seeds"], tables["screen_seeds"]
    rows_of = list(dict.fromkeys(zip(means["group"], means["shift"])))
    flows = [flow for flow in SCREENED if flow in set(means["flow"])]
    height = 0.5 * len(rows_of) + 1.4
    figure = new_figure(WIDTH, height + 4.2)
    grid = figure.add_gridspec(2, 3, height_ratios=[height, 3.6])
    for column, (measure, (label, chance)) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(grid[0, column])
        axes.axvline(chance, color=GREY, lw=0.8, ls=(0, (4, 2)))
        for place, flow in enumerate(flows):
            colour, marker, name = SCREENED[flow]
            rows = means[(means["flow"] == flow) & (means["measure"] == measure)]
            y = np.array([rows_of.index(key) for key in zip(rows["group"], rows["shift"])])
            y = y + 0.16 * (place - (len(flows) - 1) / 2)
            axes.hlines(y, rows["low"], rows["high"], color=colour, lw=0.9)
            axes.hlines(y, rows["mean_min"], rows["mean_max"], color=colour, lw=2.6)
            axes.plot(rows["mean"], y, marker, color=colour, ms=5, ls="none", label=name)
        axes.set_yticks(range(len(rows_of)), [f"{group},\n{shift}" for group, shift in rows_of])
        axes.tick_params(labelleft=column == 0)
        axes.set_ylim(len(rows_of) - 0.5, -0.5)
        axes.set_xlabel(label)
        if column == 0:
            handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, handletextpad=0.3)
    _draw_perturbations(figure.add_subplot(grid[1, :]), each, rows_of[-1][1])
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def _draw_perturbations(axes: Any, each: pd.DataFrame, shift: str) -> None:
    axes.axhline(0, color=GREY, lw=0.8)
    for flow in ("planted effect", "covariance", "gradient"):
        colour, marker, name = SCREENED[flow]
        rows = each[(each["flow"] == flow) & (each["shift"] == shift)]
        axes.plot(rows["effect_size"], rows["cosine"], marker, color=colour, ms=4.5, ls="none", alpha=0.75, label=name)
    axes.set_ylim(-1.05, 1.05)
    axes.set(xlabel=f"length of the observed shift in latent space, {shift}", ylabel="cosine with it")
    axes.set_title("Each perturbation", loc="left")


def draw_quality(source: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """The quality of every case's decoder as a table: mean over seeds and their range."""
    marked = set(source.loc[source["metric"].str.endswith("log_normalised"), "case"])
    source = source.assign(metric=source["metric"].replace(ERRORS))
    metrics = [metric for metric in QUALITY if metric in set(source["metric"])]
    cases = list(dict.fromkeys(source["case"]))
    rows = [row for row in dict.fromkeys(zip(source["case"], source["part"])) if row[1] != "val"]
    rows.sort(key=lambda row: (cases.index(row[0]), _part_order(row[1])))
    found = {(row.case, row.part, row.metric): row for row in source.itertuples()}
    figure = new_figure(WIDTH, 1.1 + 0.3 * len(rows))
    axes = figure.subplots()
    axes.set_axis_off()
    left, width = 5.4, 5.4 + len(metrics)
    axes.set(xlim=(0, width - 0.4), ylim=(len(rows) + 0.3, -1.6))
    for column, metric in enumerate(metrics):
        axes.text(left + column, -0.8, QUALITY[metric], ha="center", va="bottom", fontsize=7.5, weight="bold")
    axes.plot([0, width - 0.4], [-0.65, -0.65], color=GREY, lw=0.8)
    previous = ""
    for y, (case, part) in enumerate(rows):
        if case != previous:
            axes.plot([0, width - 0.4], [y - 0.5, y - 0.5], color="#d9d9d9", lw=0.6 if y else 0)
            title = fill(titles.get(case, case) + (" *" if case in marked else ""), 38)
            axes.text(0, y - 0.3, title, va="top", fontsize=7.5, linespacing=1.1)
        previous = case
        axes.text(left - 0.65, y, PARTS.get(part, part), va="center", ha="right", fontsize=7.5, color=GREY)
        for column, metric in enumerate(metrics):
            row: Any = found.get((case, part, metric))
            if row is not None:
                text = f"{row.mean:.3g}" + (f"\n{row.min:.3g}–{row.max:.3g}" if row.n > 1 else "")
                axes.text(left + column, y, text, ha="center", va="center", fontsize=6.5, linespacing=1.0)
    note = "Errors of log(1 + counts / the cell's mean count)" + (
        "; * of log-normalised expression." if marked else "."
    )
    axes.text(0, len(rows) - 0.1, note, va="center", fontsize=7, color=GREY, style="italic")
    return figure


def _part_order(part: str) -> int:
    order = ("train", "test", "masked group", "all")
    return order.index(part) if part in order else len(order)
