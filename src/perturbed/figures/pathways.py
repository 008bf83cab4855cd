"""The pathways of each list: enrichment ratio, significance, relevance, and what random lists would have shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.errors import DataError
from perturbed.figures.style import GREY, OKABE_ITO, PALE, RC, WIDTH, arrange_panels, draw_note, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK, LIGHT = "#0B3C6F", "#A9C8E8"
TITLES = {
    "gradient_unperturbed": "Gradients, unperturbed cells",
    "gradient_perturbed": "Gradients, perturbed cells",
    "gradient_logits_unperturbed": "Logit gradients, unperturbed cells",
    "gradient_logits_perturbed": "Logit gradients, perturbed cells",
    "median_decoded": "Decoded medians (baseline)",
    "pseudobulk": "Pseudobulk difference",
    "axis_correlation": "Correlation with the axis",
    "random": "Random genes",
}
ACROSS = 3
"""Most panels in a row."""
_LINE = 27
"""Characters of a pathway's name in a line."""
_LABELS = 100
"""Points that such a line takes, left of the bars; headings begin there."""


def draw_pathways(
    enrichment: Path,
    verdicts: Path | None,
    out_stem: Path,
    title: str = "",
    *,
    level: float = 0.05,
    published: Path | None = None,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Draw the first pathways of every list by over-representation, on the first background tested.

    Parameters
    ----------
    enrichment
        Folder of `perturbed enrich`.
    verdicts
        csv with `pathway`, `library`, `verdict` (yes, no, undecided); None where nobody judged.
    out_stem
        Path without suffix: `.svg`, `.png` and `.csv` (the numbers drawn) are written.
    title
        Title of the figure.
    level
        False discovery rate up to which a bar is dark; that of the enrichment's spec.
    published
        The paper's table, where the case answers it: its numbers are written beside ours.
    titles
        Names of lists for readers, by list.

    Raises
    ------
    DataError
        If a table is missing or broken.
    """
    import matplotlib as mpl

    names = {**TITLES, **(titles or {})}
    source = read_bars(enrichment, verdicts, published)
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)
        if source.empty:
            figure, source = draw_note("No list has a gene in any pathway.")
        else:
            figure = _draw(source, title, level, names)
        save(figure, source, Path(out_stem))


def read_bars(enrichment: Path, verdicts: Path | None, published: Path | None) -> pd.DataFrame:
    """A bar a row, longest first in each list, with its verdict and its list's counts; arguments of `draw_pathways`."""
    top, counts = (_read(enrichment / f"{name}.csv") for name in ("top", "counts"))
    shown = None if published is None else _count_published(read_published(published))
    return _join(top, counts, None if verdicts is None else _read(verdicts), shown)


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; make it with `perturbed {'enrich' if path.stem != 'verdicts' else 'judge'}`"
        )
    texts = dict.fromkeys(("library", "list", "group", "pathway", "verdict"), str)
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=texts).fillna({"group": ""})


def read_published(path: Path) -> pd.DataFrame:
    """The paper's bars (`kind` bar) and final verdicts (`kind` verdict)."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; leave it out, or give the published table")
    table = pd.read_csv(path, comment="#", keep_default_na=False, dtype=str)
    table["ratio"] = pd.to_numeric(table["ratio"])
    return table.assign(significant=table["significant"].str.lower() == "true")


def _count_published(table: pd.DataFrame) -> pd.DataFrame:
    """By list: significant and relevant bars of the paper, and bars in all."""
    bars = table[table["kind"] == "bar"]
    return (
        bars.assign(relevant=bars["verdict"] == "yes")
        .groupby("list")
        .agg(
            paper_significant=("significant", "sum"),
            paper_relevant=("relevant", "sum"),
            paper_bars=("relevant", "size"),
        )
    )


def _join(
    top: pd.DataFrame, counts: pd.DataFrame, verdicts: pd.DataFrame | None, published: pd.DataFrame | None
) -> pd.DataFrame:
    """What is drawn, a bar a row: primary background, longest bar first, with its verdict and its list's counts."""
    ora = top[top["method"] == "ora"]
    if ora.empty:
        return ora
    ora = ora[ora["background"] == ora["background"].iloc[0]]
    keys = ["library", "list", "group", "method", "background"]
    wanted = ["n_significant", "expected", "expected_low", "expected_high", "n_matched", "n_list"]
    joined = ora.merge(
        counts[[*keys, *wanted]].rename(columns={"expected": "expected_significant"}),
        on=keys,
        how="left",
        validate="m:1",
    )
    if verdicts is None:
        joined["verdict"] = "not judged"
    else:
        for column in ("pathway", "library", "verdict"):
            if column not in verdicts:
                raise DataError(f"verdicts: no column {column!r}; make the table with `perturbed judge`")
        known = verdicts[["library", "pathway", "verdict"]].drop_duplicates(["library", "pathway"])
        joined = joined.merge(known, on=["library", "pathway"], how="left", validate="m:1")
        joined["verdict"] = joined["verdict"].fillna("not judged")
    if published is not None:
        joined = joined.merge(published, left_on="list", right_index=True, how="left")
    order = {
        key: place for place, key in enumerate(dict.fromkeys(zip(joined["library"], joined["group"], joined["list"])))
    }
    block = [order[key] for key in zip(joined["library"], joined["group"], joined["list"])]
    joined = joined.assign(_block=block, _down=-joined["ratio"])
    return joined.sort_values(["_block", "_down", "place"], kind="stable", ignore_index=True).drop(
        columns=["_block", "_down", "genes"]
    )


# --- drawing ----------------------------------------------------------------------------------------------------------


def _draw(source: pd.DataFrame, title: str, level: float, names: Mapping[str, str]) -> Figure:
    """A block of panels for each library and group, a panel a list."""
    blocks = [(key, part) for key, part in source.groupby(["library", "group"], sort=False)]
    shapes = [arrange_panels(part["list"].nunique(), ACROSS) for _, part in blocks]
    heights = [rows * (0.75 + 0.33 * _most_bars(part)) + 0.25 for (rows, _), (_, part) in zip(shapes, blocks)]
    figure = new_figure(WIDTH, sum(heights) + 0.75)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    parts = figure.subfigures(len(blocks) + 1, 1, height_ratios=[*heights, 0.5], squeeze=False)[:, 0]
    for part, (rows, columns), ((library, group), bars) in zip(parts, shapes, blocks):
        if len(blocks) > 1:
            heading = f"{library}, {group}" if group else str(library)
            part.suptitle(heading, x=0.01, ha="left", fontsize=9.5, weight="bold")
        axes = part.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        lists = list(dict.fromkeys(bars["list"]))
        most = _most_bars(bars)
        for axis, name in zip(axes, lists):
            _draw_list(axis, bars[bars["list"] == name], names.get(name, name.replace("_", " ")), level, most)
        for axis in axes[len(lists) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(lists) - columns) : len(lists)]:
            axis.set_xlabel("enrichment ratio", fontsize=8)
            axis.tick_params(labelbottom=True)
    _draw_key(parts[-1], source, level)
    return figure


def _most_bars(part: pd.DataFrame) -> int:
    return int(part.groupby("list").size().max())


def _draw_list(axes: Axes, bars: pd.DataFrame, name: str, level: float, most: int) -> None:
    """One list's bars, longest on top, named above their lower edge."""
    places = np.arange(len(bars))
    for y, row in zip(places, bars.to_dict("records")):
        look: dict[str, Any] = {"color": DARK if row["fdr"] <= level else LIGHT, "height": 0.7, "lw": 0}
        if row["verdict"] == "no":
            look |= {"hatch": "////", "edgecolor": "white", "lw": 0.0}
        axes.barh(y, row["ratio"], **look)
        if row["matched_fdr"] <= level:
            axes.plot(row["ratio"], y, "o", ms=4, color=OKABE_ITO[1], clip_on=False, zorder=4)
        if row["verdict"] == "undecided":
            axes.annotate(
                "?", (row["ratio"], y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=GREY
            )
    axes.axvline(1, color=GREY, lw=0.8, ls=(0, (4, 2)))
    axes.set_yticks(places, [shorten(text) for text in bars["pathway"]], fontsize=6.5)
    axes.set_ylim(most - 0.5, -0.6)
    axes.tick_params(axis="y", length=0)
    text = describe_list(bars)
    heights = ((text, 4, 7.5, "normal"), (name, 8 + 10 * (text.count("\n") + 1), 9, "bold"))
    for words, up, size, weight in heights:
        axes.annotate(
            words, (0, 1), (-_LABELS, up), xycoords="axes fraction", textcoords="offset points", fontsize=size,
            weight=weight, linespacing=1.25, va="bottom",
        )  # fmt: skip


def shorten(name: str, width: int = _LINE, lines: int = 2) -> str:
    """A pathway's name in at most so many lines; names all in capitals, as MSigDB writes them, are made readable."""
    text = str(name).replace("_", " ")
    if text == text.upper() and len(text) > 6:
        text = text.capitalize()
    parts = wrap(text, width)
    if len(parts) <= lines:
        return "\n".join(parts)
    last = parts[lines - 1]
    return "\n".join([*parts[: lines - 1], (last if len(last) < width else last[: width - 1]) + "…"])


def describe_list(bars: pd.DataFrame) -> str:
    """Significant pathways found and expected, and how many of those shown were called relevant."""
    row = bars.iloc[0]
    text = f"{row['n_significant']:.0f} significant, by chance {row['expected_significant']:.1f}"
    text += f" [{row['expected_low']:.0f}–{row['expected_high']:.0f}]; "
    judged = bars["verdict"].isin(["yes", "no"])
    text += f"{(bars['verdict'] == 'yes').sum()} of {judged.sum()} relevant" if judged.any() else "not judged"
    if "paper_significant" in bars and pd.notna(row["paper_significant"]):
        text += f"\npaper: {row['paper_significant']:.0f} significant; "
        text += f"{row['paper_relevant']:.0f} of {row['paper_bars']:.0f} relevant"
    return text


def _draw_key(part: Any, source: pd.DataFrame, level: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(color=DARK, lw=0, label=f"FDR ≤ {level:g}"),
        Patch(color=LIGHT, lw=0, label=f"FDR > {level:g}"),
        Line2D(
            [], [], marker="o", ls="", ms=4, color=OKABE_ITO[1], label="also against random genes of like expression"
        ),
    ]
    if (source["verdict"] == "no").any():
        handles.append(Patch(facecolor=PALE, hatch="////", edgecolor="white", lw=0, label="judged irrelevant"))
    if (source["verdict"] == "undecided").any():
        handles.append(Line2D([], [], marker="$?$", ls="", ms=5, color=GREY, label="undecided"))
    handles.append(Line2D([], [], color=GREY, lw=0.8, ls=(0, (4, 2)), label="no enrichment"))
    part.legend(handles=handles, loc="center", ncols=len(handles), fontsize=7.5, handlelength=1.4, columnspacing=1.2)
