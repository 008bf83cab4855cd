"""Maps of the cells of an axis case, and the flows of genes on them."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.figures.flow import ARMS
from perturbed.figures.style import GREY, MUTED, OKABE_ITO, PALE, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANES = {
    "pca": ("principal components of all cells", "principal component 1", "principal component 2"),
    "axis": ("along the axis", "place along the axis", "component at right angles"),
    "umap": ("UMAP of all cells", "UMAP 1", "UMAP 2"),
}
"""Projections of a flow: title and names of both directions."""
DIRECTIONS = {1: "raised", -1: "lowered"}
MARGIN = 0.12
"""Room around the cells of a flow, in their own extents."""
TYPES = (*OKABE_ITO[2:], *MUTED)
"""Colours of cell types, the most frequent first; the two before them are the arms'."""
LOOK: dict[str, Any] = {"s": 5, "lw": 0, "rasterized": True}


def records(table: pd.DataFrame) -> list[Any]:
    """Rows of a table, their columns as attributes."""
    return list(table.itertuples())


def name_arms(arms: pd.DataFrame) -> dict[str, str]:
    """Arms by the values that make them."""
    return {arm: fill(f"{values} ({arm})", 34) for arm, values in zip(arms["arm"], arms["values"])}


def draw_map(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """All cells on their principal components, by type and by arm; with the arrows of the flow that is on the map."""
    scores, flows = tables["flow_scores"], tables["flows"]
    figure = new_figure(WIDTH, 5.9)
    panels = figure.subplots(1, 2)
    _draw_by_type(panels[0], tables["cells"], "pc1", "pc2")
    _draw_by_arm(panels[1], tables["cells"], "pc1", "pc2", name_arms(tables["arms"]))
    width = float(np.ptp(tables["cells"]["pc1"]))
    for axes, name, sign in zip(panels, ("Cell types", "Arms"), _directions(scores)):
        axes.set(xlabel="principal component 1", ylabel="principal component 2", xticks=[], yticks=[])
        if len(scores):
            first = scores.iloc[0]
            _draw_arrows(axes, flows[flows["sign"] == sign], width)
            name += f"; arrows: {first['symbol']} {DIRECTIONS[sign]}"
        axes.set_title(name, loc="left")
    _add_legends(panels)
    words = [title, *([_say(scores, tables["arms"])] if len(scores) else [])]
    figure.suptitle("\n".join(word for word in words if word), x=0.01, ha="left", fontsize=10)
    return figure


def draw_umap(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """UMAP of the latents by type and by arm."""
    figure = new_figure(WIDTH, 4.9)
    panels = figure.subplots(1, 2)
    _draw_by_type(panels[0], tables["cells"], "umap1", "umap2")
    _draw_by_arm(panels[1], tables["cells"], "umap1", "umap2", name_arms(tables["arms"]))
    for axes, name in zip(panels, ("Cell types", "Arms")):
        axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        axes.set_title(name, loc="left")
    _add_legends(panels)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def _draw_by_type(axes: Axes, cells: pd.DataFrame, x: str, y: str) -> None:
    names = list(cells["type"].value_counts().index)
    for place, name in enumerate(names[: len(TYPES)]):
        inside = cells["type"] == name
        axes.scatter(cells.loc[inside, x], cells.loc[inside, y], color=TYPES[place], alpha=0.6, label=name, **LOOK)
    if len(names) > len(TYPES):
        inside = cells["type"].isin(names[len(TYPES) :])
        label = f"{len(names) - len(TYPES)} others"
        axes.scatter(cells.loc[inside, x], cells.loc[inside, y], color=PALE, label=label, zorder=0, **LOOK)


def _draw_by_arm(axes: Axes, cells: pd.DataFrame, x: str, y: str, names: dict[str, str]) -> None:
    # all cells at once, in a fixed random order, so that neither arm covers the other
    order = np.random.default_rng(0).permutation(len(cells))
    mixed = cells.iloc[order]
    axes.scatter(mixed[x], mixed[y], color=[ARMS[arm] for arm in mixed["arm"]], alpha=0.5, **LOOK)
    for arm, name in names.items():
        axes.scatter([], [], color=ARMS[arm], label=name, **LOOK)


def _add_legends(panels: Any) -> None:
    for axes, columns in zip(panels, (2, 1)):
        legend = axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.06),
            ncols=columns,
            markerscale=2.5,
            handletextpad=0.2,
            fontsize=8,
        )
        for handle in legend.legend_handles:
            handle.set_alpha(1)


# --- flows --------------------------------------------------------------------------------------------------------


def draw_flows(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """Two rows per flow, the gene raised and lowered: on principal components, along the axis and in a UMAP."""
    flows, scores = tables["flows"], tables["flow_scores"]
    names = list(dict.fromkeys(scores["flow"]))
    figure = new_figure(WIDTH * 1.2, 7.6 * len(names) + 0.5)
    parts = figure.subfigures(len(names), 1, squeeze=False)[:, 0]
    arms = name_arms(tables["arms"])
    for part, name in zip(parts, names):
        own, judged = flows[flows["flow"] == name], scores[scores["flow"] == name]
        words = ([title] if title and name == names[0] else []) + [_say(judged, tables["arms"])]
        part.suptitle("\n".join(words), x=0.01, ha="left", fontsize=10)
        grid = part.subplots(2, len(PLANES))
        for row, sign in zip(grid, _directions(judged)):
            for axes, (plane, (heading, x, y)) in zip(row, PLANES.items()):
                table = own[(own["projection"] == plane) & ((own["kind"] == "cell") | (own["sign"] == sign))]
                _draw_plane(axes, table, arms, flat=plane != "umap")
                axes.set(xlabel=x, ylabel=y, xticks=[], yticks=[])
                axes.set_title(f"{judged.iloc[0]['symbol']} {DIRECTIONS[sign]}: {heading}", loc="left")
        if name == names[-1]:
            handles, labels = grid[0][0].get_legend_handles_labels()
            part.legend(handles, labels, loc="outside lower center", ncols=3, markerscale=2.5, handletextpad=0.2)
    return figure


def _directions(scores: pd.DataFrame) -> tuple[int, int]:
    """Both directions, first the one whose cosine is told."""
    sign = int(scores["sign"].iloc[0]) if len(scores) else 1
    return sign, -sign


def _say(judged: pd.DataFrame, arms: pd.DataFrame) -> str:
    """The flow in a sentence, with its cosines."""
    first = judged.iloc[0]
    sign = int(first["sign"])
    cells = "all cells" if first["cells"] == "all" else first["cells"].replace(" + ", "s + ") + "s"
    named = dict(zip(arms["arm"], arms["values"]))
    numbers = "; ".join(
        f"{_signed(row.cosine)} [{_signed(row.low)}, {_signed(row.high)}] on {row.arm} cells" for row in records(judged)
    )
    both = judged["low"].to_numpy() > 0, judged["high"].to_numpy() < 0
    arm = "perturbed" if both[0].all() else "unperturbed" if both[1].all() else None
    towards = f" → {named[arm]}" if arm else ": no clear direction"
    return f"{first['symbol']} {DIRECTIONS[sign]} in {cells}{towards}; cosine with the axis\n{numbers}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _draw_plane(axes: Axes, table: pd.DataFrame, arms: dict[str, str], *, flat: bool) -> None:
    """Cells and arrows; a `flat` plane shows the flow's own cells up close, with their means, which UMAPs have none."""
    cells, arrows = table[table["kind"] == "cell"], table[table["kind"] == "arrow"]
    other = cells[cells["arm"] == "other"]
    axes.scatter(other["x"], other["y"], color=PALE, alpha=0.5, **{**LOOK, "s": 3})
    mixed = cells[cells["arm"] != "other"]
    mixed = mixed.iloc[np.random.default_rng(0).permutation(len(mixed))]
    axes.scatter(mixed["x"], mixed["y"], color=[ARMS[arm] for arm in mixed["arm"]], alpha=0.4, **LOOK)
    for arm, marker in (("unperturbed", "D"), ("perturbed", "X")):
        inside = mixed["arm"] == arm
        axes.scatter([], [], color=ARMS[arm], label=arms[arm], **LOOK)
        if flat and inside.any():
            look: dict[str, Any] = {"ms": 9, "mfc": ARMS[arm], "mec": "white", "mew": 1.3, "zorder": 6}
            axes.plot(*mixed.loc[inside, ["x", "y"]].mean(), marker, ls="none", **look)
    axes.plot([], [], "D", color=GREY, ms=3, label="means of the arms (◆, ✖)")
    seen = mixed if flat and len(mixed) else cells
    if flat and len(mixed):
        for place, limit in (("x", axes.set_xlim), ("y", axes.set_ylim)):
            low, high = mixed[place].min(), mixed[place].max()
            limit(low - MARGIN * (high - low), high + MARGIN * (high - low))
    _draw_arrows(axes, arrows, float(np.ptp(seen["x"])))


def _draw_arrows(axes: Axes, arrows: pd.DataFrame, width: float) -> None:
    """Mean steps, the longest as long as a tenth of the panel; lengths compare within a panel only."""
    if not len(arrows):
        return
    length = np.hypot(arrows["u"], arrows["v"]).max()
    scale = float(length) / (0.1 * width) if length > 0 and width > 0 else 1.0
    axes.quiver(
        arrows["x"], arrows["y"], arrows["u"], arrows["v"], angles="xy", scale_units="xy", scale=scale, width=0.005,
        headwidth=4.5, headlength=5, color="#222222", zorder=4,
    )  # fmt: skip
