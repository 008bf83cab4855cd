"""Genes along the axis between two arms: scores with intervals, rivals, permuted labels, stability, composition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.errors import ConfigError, DataError, suggest
from perturbed.figures.axis_maps import draw_flows, draw_map, draw_umap, records
from perturbed.figures.flow import ARMS
from perturbed.figures.style import GREY, OKABE_ITO, PALE, RC, WIDTH, new_figure, save
from perturbed.gradients.gather import read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_GENES = 24
"""Genes shown, half of them rising."""
N_LABELS = 6
"""Genes named on either side of the scatter."""
LISTS = {
    "gradient_unperturbed": "gradient, unperturbed", "gradient_perturbed": "gradient, perturbed",
    "gradient_logits_unperturbed": "before softmax, unperturbed",
    "gradient_logits_perturbed": "before softmax, perturbed",
    "slope_unperturbed": "slope, unperturbed", "slope_perturbed": "slope, perturbed",
    "median_decoded": "decoded medians", "pseudobulk": "donors' t", "axis_correlation": "correlation with axis",
    "random": "random",
    "gradient_unperturbed, labels permuted": "labels permuted, unperturbed",
    "gradient_perturbed, labels permuted": "labels permuted, perturbed",
}  # fmt: skip
"""Names of lists for readers."""
SHORT = {"auprc": "AUPRC, |score|", "auroc_direction": "AUROC, rising above falling"}
"""Measures of recovery that are drawn."""
STABILITY = {
    "cosine_halves": "axes of halves of the donors:\ncosine", "spearman_halves": "scores of halves: Spearman",
    "top_overlap_halves": "top lists of halves: overlap", "spearman_bootstrap": "scores, donors resampled:\nSpearman",
    "top_overlap_bootstrap": "top lists, donors resampled:\noverlap",
}  # fmt: skip
PERMUTED = {"length": "length of the axis", "max_abs_cosine": "largest |cosine|", "max_abs_reach": "largest |reach|"}
TABLES = {
    "scores": ("gene_scores", "permutation", "stability", "composition", "softmax", "axes"),
    "flow": ("flows", "flow_scores", "arms"),
    "map": ("cells", "arms", "flows", "flow_scores"),
    "umap": ("cells", "arms"),
}
"""Tables that each figure needs."""


def draw_axis_figure(
    kind: str, tables: Path, out_stem: Path, *, title: str = "", group: str = "all", flows: Sequence[str] = ()
) -> None:
    """Draw one figure of an axis case and write `out_stem.svg`, `.png` and `.csv` (the numbers drawn).

    Parameters
    ----------
    kind
        `scores`, `flow`, `map` or `umap`.
    tables
        Folder of `perturbed score-genes`.
    out_stem
        Path without suffix.
    title
        Title of the figure.
    group
        Group of cells whose scores are drawn.
    flows
        Names of the flows to draw; empty for all.

    Raises
    ------
    ConfigError
        If there is no such kind.
    DataError
        If the folder lacks the tables, the group or a flow.
    """
    import matplotlib as mpl

    if kind not in TABLES:
        raise ConfigError(f"axis draw: no kind {kind!r}; {suggest(kind, TABLES)}")
    optional = ("planted", "rankings") if kind == "scores" else ()
    found = {}
    for name in (*TABLES[kind], *optional):
        if (tables / f"{name}.csv").is_file():
            found[name] = read_csv(tables / f"{name}.csv")
        elif name not in optional:
            raise DataError(f"{tables}: no {name}.csv; make the folder with `perturbed score-genes`")
    if kind == "scores":
        found = _select_group(found, group, tables)
    if kind == "flow":
        found = _select_flows(found, flows, tables)
    if kind == "map":
        found = _select_on_map(found)
    draws: dict[str, Any] = {"scores": draw_scores, "flow": draw_flows, "map": draw_map, "umap": draw_umap}
    drawn = [table.assign(table=name) for name, table in found.items() if len(table)]
    source = pd.concat(drawn, ignore_index=True)
    first = ["table", *(column for column in source if column != "table")]
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever matplotlibrc the user has
        mpl.rcParams.update(RC)
        save(draws[kind](found, title), source[first], out_stem)


def _select_group(tables: dict[str, pd.DataFrame], group: str, folder: Path) -> dict[str, pd.DataFrame]:
    """The rows of one group, and of its genes those that are kept: the case's own tables hold the thousands others."""
    known = list(dict.fromkeys(tables["gene_scores"]["group"]))
    if group not in known:
        raise DataError(f"{folder}: gene_scores.csv has no group {group!r}; {suggest(group, known)}")
    found = {}
    for name, table in tables.items():
        own = table[table["group"] == group] if "group" in table else table
        found[name] = own[own["kept"]] if "kept" in own else own
    if group != "all":
        del found["composition"]  # that of all cells
    return {name: table for name, table in found.items() if len(table)}


def _select_on_map(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    scores, flows = tables["flow_scores"], tables["flows"]
    scores = scores[scores["on_map"].astype(bool)]
    own = flows["flow"].isin(scores["flow"]) & (flows["projection"] == "pca") & (flows["kind"] == "arrow")
    return {**tables, "flow_scores": scores, "flows": flows[own]}


def _select_flows(tables: dict[str, pd.DataFrame], flows: Sequence[str], folder: Path) -> dict[str, pd.DataFrame]:
    known = list(dict.fromkeys(tables["flow_scores"]["flow"]))
    if not known:
        raise DataError(f"{folder}: the case has no flows; name genes under `flows`")
    for name in flows:
        if name not in known:
            raise DataError(f"{folder}: no flow {name!r}; {suggest(name, known)}")
    chosen = list(flows) or known
    return {name: table[table["flow"].isin(chosen)] if "flow" in table else table for name, table in tables.items()}


def draw_scores(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """Draw the scores of one group and what speaks for and against them."""
    draws = [_draw_genes, _draw_rival if "rankings" in tables else None]
    draws += [_draw_planted if "planted" in tables else None, _draw_permutation, _draw_stability]
    draws += [_draw_composition if "composition" in tables else None, _draw_softmax]
    panels = [draw for draw in draws if draw is not None]
    n_rows = (len(panels) + 2) // 2  # the genes take two places
    figure = new_figure(WIDTH * 1.1, 3.5 * n_rows)
    grid = figure.add_gridspec(n_rows, 2)
    places = [grid[:2, 0], grid[0, 1], grid[1, 1], *(grid[row, k] for row in range(2, n_rows) for k in (0, 1))]
    for place, draw in zip(places, panels):
        draw(figure.add_subplot(place), tables)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]  # long labels need a second solution
    return figure


def _draw_genes(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Genes of the largest |cosine| on unperturbed cells, half of them rising; both arms with their intervals."""
    table = tables["gene_scores"]
    first = table[table["cells"] == "unperturbed"].sort_values("cosine", ascending=False)
    shown = list(first["gene"].head(N_GENES // 2)) + list(first["gene"].tail(N_GENES // 2))
    shown = list(dict.fromkeys(shown))
    names = first.set_index("gene")["symbol"]
    axes.axvline(0, color=GREY, lw=0.8)
    for arm, shift in (("unperturbed", -0.16), ("perturbed", 0.16)):
        rows = table[table["cells"] == arm].set_index("gene").loc[shown]
        y = np.arange(len(shown)) + shift
        axes.hlines(y, rows["low"], rows["high"], color=ARMS[arm], lw=1.2)
        axes.plot(rows["cosine"], y, "o", ms=3.4, color=ARMS[arm], label=f"on {arm} cells")
    axes.set_yticks(range(len(shown)), [str(names[gene]) for gene in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel("mean cosine with the axis, interval over donors")
    axes.legend(loc="lower right", handletextpad=0.2, fontsize=7.5)
    axes.set_title("Genes along the axis", loc="left")


def _draw_rival(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Cosine of every gene beside the donors' t, or the paper's baseline where there are no counts."""
    table = tables["rankings"].pivot(index="gene", columns="list", values="score")
    rival = "pseudobulk" if "pseudobulk" in table else "median_decoded"
    x, y = table[rival], table["gradient_unperturbed"]
    axes.axhline(0, color=GREY, lw=0.7)
    axes.axvline(0, color=GREY, lw=0.7)
    axes.scatter(x, y, s=5, lw=0, color=OKABE_ITO[0], alpha=0.45, rasterized=True)
    symbols = tables["rankings"].drop_duplicates("gene").set_index("gene")["symbol"]
    order = (x.rank() + y.rank()).sort_values().index
    for side, genes in ((-1, order[:N_LABELS]), (1, order[-N_LABELS:])):
        _name_points(axes, side, [(str(symbols[gene]), x[gene], y[gene]) for gene in genes])
    like = {"pseudobulk": "donors' moderated t", "median_decoded": "relative difference of decoded medians"}
    axes.set(xlabel=like[rival], ylabel="cosine on unperturbed cells", ylim=(-1.05, 1.05))
    axes.set_title(f"Beside {LISTS[rival]}: Spearman {x.corr(y, method='spearman'):.2f}", loc="left")


def _name_points(axes: Axes, side: int, points: list[tuple[str, float, float]]) -> None:
    """Names of extreme points in a column beside them, highest first: lower right for the lowest, upper left else."""
    place = {1: (0.03, 0.95, "left"), -1: (0.97, 0.38, "right")}[side]
    for i, (name, x, y) in enumerate(sorted(points, key=lambda point: -point[2])):
        axes.annotate(
            name, (x, y), xytext=(place[0], place[1] - 0.065 * i), textcoords="axes fraction", ha=place[2], va="center",
            fontsize=7, arrowprops={"arrowstyle": "-", "lw": 0.4, "color": GREY, "shrinkB": 1, "shrinkA": 1},
        )  # fmt: skip


def _draw_planted(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["planted"]
    lists = [name for name in LISTS if name in set(table["list"])]
    for place, (measure, label) in enumerate(SHORT.items()):
        rows = table[table["measure"] == measure].set_index("list").loc[lists]
        y = np.arange(len(lists)) + 0.24 * (place - 0.5)
        axes.hlines(y, rows["low"], rows["high"], color=OKABE_ITO[place], lw=1.1)
        axes.plot(rows["value"], y, "os"[place], ms=4, color=OKABE_ITO[place], label=label)
        axes.axvline(rows["chance"].iloc[0], color=OKABE_ITO[place], lw=0.9, ls=(0, (3, 2)), zorder=0)
    axes.set_yticks(range(len(lists)), [LISTS[name] for name in lists], fontsize=7)
    axes.set_ylim(len(lists) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.05)
    axes.set_xlabel("recovery of planted genes; dashed: chance")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=2, handletextpad=0.2, fontsize=7.5)
    first = table.iloc[0]
    axes.set_title(f"{first['n_planted']} planted among {first['n_genes']} genes", loc="left")


def _draw_permutation(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Every statistic in units of its median under permuted labels."""
    table = tables["permutation"]
    freely = str(table["exchanged"].iloc[0]).startswith("one study")
    axes.set_title(f"Donors' labels permuted {'freely (one study)' if freely else 'within studies'}", loc="left")
    if table["observed"].isna().all():
        axes.set_axis_off()
        axes.text(0.02, 0.8, fill(f"Not possible: {table['note'].iloc[0]}.", 44), va="top", color=GREY, style="italic")
        return
    labels = []
    for y, row in enumerate(records(table)):
        axes.plot([1, row.null_high / row.null_median], [y, y], color=GREY, lw=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(row.observed / row.null_median, y, "o", ms=5, color=OKABE_ITO[1])
        look: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "ha": "right",
            "va": "center",
            "fontsize": 7.5,
            "color": GREY,
        }
        axes.annotate(f"p {row.p:.2g}", (0.99, y - 0.3), **look)
        where = "" if row.cells == "axis" else f",\n{row.cells}"
        labels.append(f"{PERMUTED.get(row.statistic, row.statistic)}{where}")
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    first = table.iloc[0]
    how = "all there are" if first["exact"] else "drawn"
    axes.set_xlabel(
        f"observed, in medians of permuted labels\n(bar: to their 95 %; {first['n_permutations']} permutations, {how})"
    )


def _draw_stability(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["stability"]
    shown = [name for name in STABILITY if name in set(table["measure"])]
    colours = {**ARMS, "axis": OKABE_ITO[2]}
    named = set()
    for y, measure in enumerate(shown):
        rows = table[table["measure"] == measure]
        for i, row in enumerate(records(rows)):
            height = y + 0.22 * (i - (len(rows) - 1) / 2)
            axes.hlines(height, row.low, row.high, color=colours[row.cells], lw=1.2)
            label = None if row.cells in named else ("axis" if row.cells == "axis" else f"scores, {row.cells}")
            axes.plot(row.mean, height, "o", ms=4, color=colours[row.cells], label=label)
            named.add(row.cells)
        if np.isfinite(rows["chance"]).any():
            axes.plot([rows["chance"].max()] * 2, [y - 0.35, y + 0.35], color=GREY, lw=1.2, ls=(0, (2, 1.5)))
    axes.axvline(0, color=PALE, lw=0.8, zorder=0)
    axes.set_yticks(range(len(shown)), [STABILITY[name] for name in shown], fontsize=7.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(min(-0.05, float(table["low"].min()) - 0.05), 1.05)
    axes.set_xlabel("agreement; dashed: chance")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.3, -0.13), ncols=3, handletextpad=0.1, columnspacing=0.8, fontsize=7
    )
    axes.set_title("Stability", loc="left")


def _draw_composition(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["composition"]
    shares = table[table["measure"] == "share"].pivot(index="type", columns="cells", values="value")
    shares = shares.sort_values("unperturbed", ascending=False).head(8)
    for arm, shift in (("unperturbed", -0.19), ("perturbed", 0.19)):
        axes.barh(np.arange(len(shares)) + shift, shares[arm], height=0.36, color=ARMS[arm], label=arm)
    axes.set_yticks(range(len(shares)), [fill(str(name), 18) for name in shares.index], fontsize=7.5)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlabel("share of cells")
    axes.legend(loc="lower right", fontsize=7.5)
    lines = ["Composition, and agreement with an axis that holds it equal"]
    for weighting in ("equal", "pooled"):
        rows = table[table["weighting"] == weighting].set_index(["measure", "cells"])["value"]
        if len(rows):
            ranks = " and ".join(f"{rows['spearman_of_scores', arm]:.2f}" for arm in ("unperturbed", "perturbed"))
            lines.append(
                f"types weighted {weighting}: cosine of axes {rows['cosine_of_axes', 'axis']:.2f}, scores {ranks}"
            )
    axes.set_title("\n".join(lines if len(lines) > 1 else ["Composition"]), loc="left", fontsize=8.5)


def _draw_softmax(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["softmax"]
    labels = []
    for y, row in enumerate(records(table)):
        axes.plot([row.median_logits, row.median_share], [y, y], color=PALE, lw=2.5, zorder=1)
        axes.plot(row.median_logits, y, "o", ms=5, color=OKABE_ITO[2], label="before softmax" if y == 0 else None)
        axes.plot(row.median_share, y, "D", ms=4.5, color=OKABE_ITO[3], label="expected share" if y == 0 else None)
        labels.append(fill(f"{row.genes}, {row.cells}", 24))
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("median cosine of genes")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=2, handletextpad=0.2, fontsize=7.5)
    axes.set_title("What softmax adds to every gene", loc="left")
