"""Predicted and observed expression: gene by gene, and as condition means in the plane of two components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.errors import DataError
from perturbed.figures.inputs import NothingToDraw, Page
from perturbed.figures.overview import order_methods
from perturbed.figures.style import GREY, OKABE_ITO, arrange_panels, label_metric, look_of, new_figure, title_of
from perturbed.names import genes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_LABELS = 8
N_PANELS = 6


def pick_method(page: Page, available: set[str], what: str) -> str:
    """The primary method if its file is there, else the best one that is."""
    order = order_methods(page.table("summary"), page.spec.primary_metric)
    found = [name for name in (page.spec.primary_method, *order, *sorted(available)) if name in available]
    if not found:
        raise DataError(f"figure {page.name}: {what} holds no method; rerun `perturbed evaluate` with --details")
    return found[0]


# --- hardest and easiest perturbation -----------------------------------------------------------------------------


def draw_hardest_easiest(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw predicted against observed Δ of the hardest and the easiest perturbation; reads deltas and tables."""
    present = page.deltas(["method", "perturbation"]).drop_duplicates()
    method = pick_method(page, set(present["method"]), "deltas.parquet")
    scored = _score_perturbations(page, method, set(present.loc[present["method"] == method, "perturbation"]))
    figure = new_figure(9.6, 4.6)
    panels = figure.subplots(1, 2)
    parts = []
    for axes, which, at in zip(panels, ("hardest", "easiest"), (0, -1)):
        perturbation, value = str(scored.index[at]), float(scored.iloc[at])
        columns = ["fold", "method", "seed", "perturbation", "context", "gene", "observed", "predicted"]
        rows = page.deltas(columns, method=method, perturbation=perturbation)
        rows = _first_of(rows).sort_values("gene", ignore_index=True)
        _draw_genes(axes, rows, perturbation, look_of(method).colour)
        text = f"{label_metric(page.spec.primary_metric)}: {value:.2f}"
        axes.set_title(f"{which}: {perturbation}\n{text}", loc="left")
        rows.insert(0, "which", which)
        parts.append(rows)
    panels[0].set_ylabel(f"predicted Δ, {title_of(method, page.titles, 40)}\n(log-normalised expression)")
    return figure, pd.concat(parts, ignore_index=True)


def _score_perturbations(page: Page, method: str, available: set[str]) -> pd.Series:
    """Primary scores of a method from worst to best."""
    summary, table = page.table("summary"), page.table("perturbations")
    direction = int(summary.loc[summary["metric"] == page.spec.primary_metric, "direction"].iloc[0])
    rows = table[(table["method"] == method) & table["value"].notna() & table["perturbation"].isin(available)]
    if rows.empty:
        metric = page.spec.primary_metric
        raise NothingToDraw(f"{method} has no defined {metric}")
    value = rows.set_index("perturbation")["value"]
    good = -(value - 1).abs() if direction == 0 else direction * value
    return value.loc[good.sort_values(kind="stable").index]


def _first_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the first fold, context and seed, so that each gene stands once."""
    first = rows[["fold", "context", "seed"]].drop_duplicates().sort_values(["fold", "context", "seed"]).iloc[0]
    return rows[(rows[["fold", "context", "seed"]] == first).all(axis=1)]


def _draw_genes(axes: Axes, rows: pd.DataFrame, perturbation: str, colour: str) -> None:
    observed, predicted = rows["observed"].to_numpy(float), rows["predicted"].to_numpy(float)
    axes.axhline(0, color="#e0e0e0", lw=0.8, zorder=0)
    axes.axvline(0, color="#e0e0e0", lw=0.8, zorder=0)
    axes.axline((0, 0), slope=1, color=GREY, lw=1, zorder=0)
    axes.scatter(observed, predicted, s=9, color=colour, alpha=0.45, lw=0, rasterized=len(rows) > 2000)
    targets = rows["gene"].isin(genes_of(perturbation)).to_numpy()
    axes.scatter(
        observed[targets],
        predicted[targets],
        s=60,
        facecolor="none",
        edgecolor=OKABE_ITO[1],
        lw=1.4,
        label="perturbed gene",
    )
    if targets.any():
        axes.legend(loc="upper left", handletextpad=0.1)
    top = np.argsort(-np.abs(observed), kind="stable")[:N_LABELS]
    _label_at_right(axes, observed[top], predicted[top], rows["gene"].to_numpy()[top])
    axes.set_xlabel("observed Δ (log-normalised expression)")


def _label_at_right(axes: Axes, x: np.ndarray, y: np.ndarray, names: np.ndarray) -> None:
    """Names in a column right of the axes, in the order of the points' heights, so that none covers another."""
    order = np.argsort(y, kind="stable")
    low, high = axes.get_ylim()
    heights = (y[order] - low) / (high - low)
    gap = 0.055
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights -= max(0.0, heights[-1] - 0.98) if len(heights) else 0.0
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    arrow = {"arrowstyle": "-", "color": "#9a9a9a", "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
    for at, height in zip(order, heights):
        axes.annotate(
            str(names[at]), (x[at], y[at]), (1.03, height), textcoords="axes fraction", va="center", fontsize=8,
            arrowprops=arrow, annotation_clip=False,
        )  # fmt: skip


# --- embedding ----------------------------------------------------------------------------------------------------


def draw_embedding(page: Page) -> tuple[Figure, pd.DataFrame]:
    """Draw condition means in two principal components, arrows from observed to predicted; reads the embeddings."""
    table = page.embeddings()
    if "method" not in table:
        table.insert(0, "method", page.spec.primary_method)
    order = order_methods(page.table("summary"), page.spec.primary_metric) if page.inputs.tables else []
    available = dict.fromkeys([page.spec.primary_method, *order, *sorted(set(table["method"]))])
    methods = [name for name in available if name in set(table["method"])][:N_PANELS]
    parts = [_first_run(table[table["method"] == name]) for name in methods]
    rows, columns = arrange_panels(len(methods), 3)
    spans = table[["pc1", "pc2"]].max() - table[["pc1", "pc2"]].min()
    shape = float(np.clip(spans["pc2"] / spans["pc1"], 0.5, 1.4)) if spans["pc1"] > 0 else 1.0
    figure = new_figure(3.3 * columns + 0.4, (3.0 * shape + 0.4) * rows + 0.6, "compressed")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, name, part in zip(panels, methods, parts):
        _draw_means(axes, part, look_of(name, methods).colour)
        axes.set_title(title_of(name, page.titles, 40), loc="left")
        axes.set_aspect("equal")
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(methods) - columns) : len(methods)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("PC 1 of training cells")
    for axes in panels[::columns]:
        axes.set_ylabel("PC 2 of training cells")
    _add_embedding_legend(figure, columns)
    return figure, pd.concat(parts, ignore_index=True)


def _first_run(part: pd.DataFrame) -> pd.DataFrame:
    """Rows of the first fold and seed, where the table has them."""
    for column in ("fold", "seed"):
        if column in part:
            part = part[part[column] == part[column].min()]
    return part.sort_values(["kind", "perturbation", "context"], ignore_index=True)


def _draw_means(axes: Axes, part: pd.DataFrame, colour: str) -> None:
    keys = ["perturbation", "context"]
    sides = {kind: part[part["kind"] == kind].set_index(keys)[["pc1", "pc2"]] for kind in ("observed", "predicted")}
    both = sides["observed"].join(sides["predicted"], lsuffix="_observed", rsuffix="_predicted", how="inner")
    arrow = {"arrowstyle": "-|>", "color": "#b5b5b5", "lw": 0.8, "shrinkA": 2, "shrinkB": 2, "mutation_scale": 7}
    for _, row in both.iterrows():
        axes.annotate(
            "", (row["pc1_predicted"], row["pc2_predicted"]), (row["pc1_observed"], row["pc2_observed"]),
            arrowprops=arrow,
        )  # fmt: skip
    axes.scatter(sides["observed"]["pc1"], sides["observed"]["pc2"], s=16, color="black", zorder=2)
    axes.scatter(sides["predicted"]["pc1"], sides["predicted"]["pc2"], s=16, color=colour, marker="D", zorder=3)
    control = part[part["kind"] == "control"]
    axes.scatter(
        control["pc1"], control["pc2"], s=130, marker="*", color=OKABE_ITO[4], edgecolor="black", lw=0.7, zorder=4
    )


def _add_embedding_legend(figure: Figure, columns: int) -> None:
    from matplotlib.lines import Line2D

    star: dict[str, Any] = {"mfc": OKABE_ITO[4], "mec": "black", "mew": 0.7, "ms": 11}
    handles = [
        Line2D([], [], marker="o", color="black", lw=0, ms=4.5, label="observed mean"),
        Line2D([], [], marker="D", color=GREY, lw=0, ms=4.5, label="predicted mean (coloured by method)"),
        Line2D([], [], color="#b5b5b5", label="from observed to predicted"),
        Line2D([], [], marker="*", lw=0, label="control", **star),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4 if columns > 2 else 2, columnspacing=1.0, handletextpad=0.4
    )
