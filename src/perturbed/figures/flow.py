"""Where a decoder's gradients lead: flow map, agreement with the observed shift, genes and paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.figures.style import GREY, OKABE_ITO, PALE, WIDTH, arrange_panels, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = {"unperturbed": OKABE_ITO[0], "perturbed": OKABE_ITO[1], "other": PALE}
FLOWS = {
    "gradient": (OKABE_ITO[1], "o", "decoder's gradient"),
    "gradient, against time": (OKABE_ITO[1], "o", "decoder's gradient, against local time"),
    "difference of means, other groups": (OKABE_ITO[0], "s", "difference of means of the other groups"),
    "untrained decoder": (GREY, "D", "untrained decoder"),
}
"""Look and name of each flow that is compared with the observed shift."""
N_ARROWS = 250
"""Cells that show their arrow where there is no grid."""
N_GENES = 12
"""Genes in the gene panel, targets among them."""


def draw_case(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """Draw a case from the gathered tables of `perturbed.gradients.gather`, by name."""
    names = ["map", "agreement"]
    names += ["genes"] if len(_shown_genes(tables["genes_seeds"])) else []
    names += ["paths"] if len(tables.get("paths", ())) else []
    rows, columns = arrange_panels(len(names), 2)
    figure = new_figure(WIDTH, 3.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    draws = {"map": draw_map, "agreement": _draw_agreement, "genes": _draw_genes, "paths": _draw_paths}
    for axes, name in zip(panels, names):
        draws[name](axes, tables)
    first = tables["agreement_seeds"].iloc[0]
    if first["judged"] != "all":
        panels[0].set_title(f"Flow of one fit, labels of {first['group']} masked", loc="left")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def draw_map(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Cells and the flow: streamlines on the grid in two dimensions, arrows of cells on principal components else."""
    cells = tables["cells"]
    _draw_cells(axes, cells)
    if "field" in tables and len(tables["field"]):
        _draw_streams(axes, tables["field"])
        axes.set(xlabel="latent 1", ylabel="latent 2")
    else:
        _draw_arrows(axes, cells)
        axes.set(xlabel="principal component 1 of the latents", ylabel="principal component 2")
    for arm, marker in (("unperturbed", "D"), ("perturbed", "X")):
        inside = cells["arm"] == arm
        if inside.any():
            centre = cells.loc[inside, ["x", "y"]].mean()
            axes.plot(
                *centre, marker, ms=9, mfc=ARMS[arm], mec="white", mew=1.3, ls="none", label=f"mean, {arm}", zorder=6
            )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, handletextpad=0.3, columnspacing=1.0)
    axes.set_title("Flow in latent space", loc="left")


def _draw_cells(axes: Axes, cells: pd.DataFrame) -> None:
    look: dict[str, Any] = {"s": 4, "lw": 0, "rasterized": True}
    if "time" in cells and cells["time"].notna().any():
        drawn = axes.scatter(cells["x"], cells["y"], c=cells["time"], cmap="viridis", alpha=0.6, **look)
        axes.figure.colorbar(drawn, ax=axes, label="time", shrink=0.8, pad=0.01)
        return
    for arm, colour in ARMS.items():
        inside = cells["arm"] == arm
        if inside.any():
            axes.scatter(cells.loc[inside, "x"], cells.loc[inside, "y"], color=colour, alpha=0.35, **look)


def _draw_streams(axes: Axes, field: pd.DataFrame) -> None:
    x, y = np.unique(field["x"]), np.unique(field["y"])
    u, v = (field[key].to_numpy().reshape(len(y), len(x)) for key in ("u", "v"))
    speed = np.hypot(u, v)
    # streamplot wants an evenly spaced grid to the last digit, which a csv does not keep
    x, y = np.linspace(x[0], x[-1], len(x)), np.linspace(y[0], y[-1], len(y))
    drawn = axes.streamplot(
        x, y, u, v, color=speed, cmap="magma_r", density=1.2, linewidth=1.1, arrowsize=0.9, minlength=0.03, zorder=4
    )
    axes.figure.colorbar(drawn.lines, ax=axes, label="speed |∇y|", shrink=0.8, pad=0.01)


def _draw_arrows(axes: Axes, cells: pd.DataFrame) -> None:
    """Arrows of some cells, evenly spread: their length is relative, for the eye."""
    start = cells[cells["arm"] == "unperturbed"]
    start = start if len(start) else cells
    chosen = start.iloc[np.linspace(0, len(start) - 1, min(N_ARROWS, len(start))).astype(int)]
    length = np.hypot(chosen["u"], chosen["v"]).max()
    width = float(np.ptp(cells["x"]))
    scale = float(length) / (0.08 * width) if length > 0 and width > 0 else 1.0
    axes.quiver(
        chosen["x"], chosen["y"], chosen["u"], chosen["v"], angles="xy", scale_units="xy", scale=scale, width=0.0028,
        color="#222222", zorder=4,
    )  # fmt: skip


def _draw_agreement(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """Thin: the intervals of all seeds together. Thick: the range of the seeds. Marker: their mean."""
    table = tables["agreement_seeds"]
    groups = list(dict.fromkeys(table["group"]))
    flows = [flow for flow in FLOWS if flow in set(table["flow"])]
    axes.axvline(0, color=GREY, lw=0.8)
    for place, flow in enumerate(flows):
        colour, marker, name = FLOWS[flow]
        rows = table[table["flow"] == flow]
        y = np.array([groups.index(group) for group in rows["group"]]) + 0.2 * (place - (len(flows) - 1) / 2)
        axes.hlines(y, rows["low"], rows["high"], color=colour, lw=0.9)
        axes.hlines(y, rows["cosine_min"], rows["cosine_max"], color=colour, lw=2.6)
        axes.plot(rows["cosine"], y, marker, color=colour, ms=4.5, ls="none", label=name)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(-1.05, 1.05)
    what = "the local gradient of time" if set(table["flow"]) == {"gradient, against time"} else "the observed shift"
    units = " and ".join(f"{unit}s" for unit in sorted(set(table["unit"])))
    axes.set_xlabel(f"cosine with {what}\n(thin: interval over {units}; thick: range of seeds)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), handletextpad=0.3)
    axes.set_title("Does the flow point where it should?", loc="left")


def _shown_genes(table: pd.DataFrame) -> list[str]:
    """Targets and genes of interest: those that were ranked among genes like them."""
    ranked = table[table["percentile_among_alike"].notna()]
    mean = ranked.groupby("gene").agg(is_target=("is_target", "max"), cosine=("cosine", "mean"))
    return list(mean.sort_values(["is_target", "cosine"], ascending=[False, False]).index[:N_GENES])


def _draw_genes(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    """All cells where one model answers for all groups; each masked group and their mean else."""
    table = tables["genes_seeds"]
    table = table if "all" not in set(table["group"]) else table[table["group"] == "all"]
    shown = _shown_genes(table)
    values = table["cosine"].dropna()
    low, high = np.quantile(values, [0.025, 0.975])
    axes.axvspan(low, high, color=PALE, lw=0, zorder=0)
    axes.axvline(values.median(), color=GREY, lw=1, ls=(0, (4, 2)))
    for y, gene in enumerate(shown):
        rows = table[table["gene"] == gene]
        colour = OKABE_ITO[1] if rows["is_target"].any() else OKABE_ITO[2]
        if len(rows) > 1:
            axes.plot(rows["cosine"], np.full(len(rows), y), "|", ms=8, color=colour, alpha=0.6)
        label = {"gradient": "gradient", "axis": "correlation with the axis"} if y == 0 else {}
        axes.plot(rows["cosine"].mean(), y, "o", ms=5.5, color=colour, label=label.get("gradient"))
        axes.plot(rows["correlation"].mean(), y, "x", ms=5, color=GREY, label=label.get("axis"))
        axes.annotate(
            f"{100 * rows['percentile_among_alike'].mean():.0f} %",
            (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=7.5, color=GREY,
        )  # fmt: skip
    axes.annotate("above of\ngenes alike", (1.02, -0.75), xycoords=("axes fraction", "data"), fontsize=7, color=GREY)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(-1.05, 1.05)
    axis = "shift" if len(tables["arrivals_seeds"]) else "flow"
    axes.set_xlabel(f"cosine of a gene's gradient with the {axis}; band: 95 % of all genes")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, handletextpad=0.3)
    axes.set_title(f"Genes along the {axis}", loc="left")


def _draw_paths(axes: Axes, tables: dict[str, pd.DataFrame]) -> None:
    paths = tables["paths"]
    for place, gene in enumerate(dict.fromkeys(paths["gene"])):
        rows = paths[paths["gene"] == gene].sort_values("step")
        start = float(rows["mean"].iloc[0])
        change = np.log2((rows["mean"].to_numpy() + 1e-9) / (start + 1e-9))
        colour, style = OKABE_ITO[place % len(OKABE_ITO)], ("-", "--", ":")[place // len(OKABE_ITO) % 3]
        axes.plot(rows["step"], change, color=colour, ls=style, lw=1.6, label=gene)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set(xlabel="step along the flow", ylabel="decoded expression, log₂ change")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.set_title("Genes along the way", loc="left")
