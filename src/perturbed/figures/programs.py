"""Programs of PerturbedVAE: hit map, pruned latent graph, enrichment and stability (the paper's figures 5, 7 and 8)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.errors import DataError
from perturbed.figures.style import GREY, OKABE_ITO, PALE, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UP, DOWN = OKABE_ITO[1], OKABE_ITO[0]
TABLES = ("hits", "graph", "names", "enrichment", "stability")
METRICS = {
    "adjusted_rand": "Assignments, adjusted Rand",
    "jaccard": "Assignments, Jaccard",
    "effect_correlation": "Effects, |correlation|",
    "edge_jaccard": "Graph, Jaccard of edges",
}
N_BARS = 12


def draw(folder: Path) -> Figure:
    """Draw the folder of `perturbed.interpret.programs.write_programs`: first seed, and stability over all.

    Raises
    ------
    DataError
        If a table is missing.
    """
    tables = {}
    for name in TABLES:
        if not (Path(folder) / f"{name}.csv").is_file():
            raise DataError(f"{folder}: holds no {name}.csv; make it with `perturbed programs`")
        tables[name] = pd.read_csv(Path(folder) / f"{name}.csv", keep_default_na=False, na_values=[""])
    seed = tables["hits"]["seed"].iloc[0]
    first = {name: table[table["seed"] == seed] for name, table in tables.items() if "seed" in table}
    n_perturbed = first["hits"]["perturbation"].nunique()
    figure = new_figure(WIDTH, 9.6 + 0.055 * max(0, n_perturbed - 40))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15], squeeze=False)[0]
    _draw_hits(left.subplots(), first["hits"])
    graph, enrichment, stability = right.subplots(3, 1, height_ratios=[1.35, 1, 0.8])
    _draw_graph(graph, first["graph"], first["names"])
    _draw_enrichment(enrichment, first["enrichment"], first["names"])
    _draw_stability(stability, tables["stability"])
    return figure


def _draw_hits(axes: Axes, hits: pd.DataFrame) -> None:
    """Heat map of standardised effects, genes ordered by their strongest latent and its size."""
    latents = list(dict.fromkeys(hits["latent"]))
    wide = hits.pivot(index="perturbation", columns="latent", values="standardised_effect")[latents]
    best = wide.abs().to_numpy().argmax(axis=1)
    order = np.lexsort((-wide.abs().to_numpy().max(axis=1), best))
    values = wide.to_numpy()[order]
    limit = float(np.quantile(np.abs(values), 0.98)) or 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.plot(best[order], np.arange(len(order)), ".", ms=2.5, color="black")
    axes.set_xticks(range(len(latents)), latents, rotation=90)
    size = 6.5 if len(order) <= 60 else 4
    axes.set_yticks(range(len(order)), wide.index[order], fontsize=size)
    axes.tick_params(length=0)
    axes.set_title("Hit map: effect of each perturbed gene\n(dot: its strongest latent)", loc="left")
    bar = axes.figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, aspect=30, pad=0.02)
    bar.set_label("effect on the latent, in sd over control cells", fontsize=8)


def _draw_graph(axes: Axes, graph: pd.DataFrame, names: pd.DataFrame) -> None:
    """Latents with programs on a circle in causal order, kept edges as arrows as wide as their weight."""
    from matplotlib.patches import FancyArrowPatch

    kept = graph[graph["kept"]]
    programs = names.set_index("program")
    shown = {*programs.index, *kept["source"], *kept["target"]}
    nodes = sorted(shown, key=lambda latent: int(latent[1:]))
    angle = {node: np.pi / 2 - 2 * np.pi * i / max(1, len(nodes)) for i, node in enumerate(nodes)}
    place = {node: (float(np.cos(a)), float(np.sin(a))) for node, a in angle.items()}
    most = float(kept["standardised_weight"].abs().max()) if len(kept) else 1.0
    for row in kept.to_dict("records"):
        weight = float(row["standardised_weight"])
        look: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 9, "shrinkB": 9}
        style: dict[str, Any] = {"color": UP if weight > 0 else DOWN, "lw": 0.6 + 2 * abs(weight) / most, "alpha": 0.8}
        look |= {"posA": place[row["source"]], "posB": place[row["target"]]}
        axes.add_patch(FancyArrowPatch(connectionstyle="arc3,rad=0.12", **look, **style))
    for node, (x, y) in place.items():
        axes.plot(x, y, "o", ms=15, color="white", mec="black" if node in programs.index else GREY, mew=1, zorder=3)
        axes.text(x, y, node, ha="center", va="center", fontsize=7, zorder=4)
        if node in programs.index:
            side = "left" if x > 0.05 else "right" if x < -0.05 else "center"
            label = f"{programs.loc[node, 'name']} ({programs.loc[node, 'n_targets']})"
            axes.text(1.17 * x, 1.17 * y, label, ha=side, va="center", fontsize=6.5)
    axes.set_xlim(-2.3, 2.3)
    axes.set_ylim(-1.35, 1.35)
    axes.set_axis_off()
    title = f"Latent graph: {len(kept)} of {len(graph)} edges kept, and programs\n"
    title += "(orange raises, blue lowers; number of targets)"
    axes.set_title(title, loc="left")


def _draw_enrichment(axes: Axes, enrichment: pd.DataFrame, names: pd.DataFrame) -> None:
    """The best set of each program; filled where random lists of equal expression hardly reach it."""
    axes.set_title("Best gene set of each program", loc="left")
    if enrichment.empty:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no gene sets were given", ha="center", style="italic", color=GREY)
        return
    best = enrichment.sort_values("p_value").drop_duplicates("program").head(N_BARS)
    x = -np.log10(best["fdr"].to_numpy(dtype=float).clip(1e-300))
    for y, (value, row) in enumerate(zip(x, best.to_dict("records"))):
        solid = row["p_random_lists"] < 0.05
        axes.barh(y, value, color=OKABE_ITO[2] if solid else "white", edgecolor=OKABE_ITO[2], height=0.65)
    labels = [f"{row['program']}: {_shorten(row['gene_set'])}" for row in best.to_dict("records")]
    axes.set_yticks(range(len(best)), labels, fontsize=6.5)
    axes.invert_yaxis()
    axes.axvline(-np.log10(0.05), color=GREY, lw=1, ls=(0, (4, 2)))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("−log10 FDR (filled: better than 95 % of random lists)", fontsize=8)


def _shorten(name: str, width: int = 38) -> str:
    name = str(name).replace("_", " ")
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _draw_stability(axes: Axes, stability: pd.DataFrame) -> None:
    """Agreement of pairs of fits (points) over the null's 95 % quantile (band)."""
    axes.set_title("Stability", loc="left")
    if stability.empty:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "one fit and no planted truth: nothing to compare", ha="center", style="italic", color=GREY)
        return
    looks = {"seeds": ("o", "black", -0.14), "planted": ("s", OKABE_ITO[2], 0.14)}
    for y, metric in enumerate(METRICS):
        for kind, (marker, colour, shift) in looks.items():
            rows = stability[(stability["metric"] == metric) & (stability["kind"] == kind)]
            if rows["null_high"].notna().any():
                axes.barh(y + shift, rows["null_high"].mean(), height=0.24, color=PALE, lw=0, zorder=0)
            if rows["value"].isna().all() and len(rows):
                axes.text(0.01, y + shift, "no edges", va="center", fontsize=7, style="italic", color=GREY)
            axes.plot(rows["value"], np.full(len(rows), y + shift), marker, ms=4.5, color=colour, ls="none", label=kind)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    names = [{"seeds": "between seeds", "planted": "against planted truth"}[label] for label in unique]
    axes.legend(unique.values(), names, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=7, borderpad=0)
    axes.set_yticks(range(len(METRICS)), list(METRICS.values()))
    axes.set_xlim(0, 1.02)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("agreement (grey: up to the 95 % quantile of permutations)", fontsize=8)
