"""The pathways of each list as a table for readers, beside what the paper published of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from perturbed.figures.pathways import TITLES, describe_list, read_bars, read_published
from perturbed.files import atomic

COLUMNS = ("library", "group", "list", "rank", "pathway", "overlap", "ratio", "fdr", "significant", "verdict")
PAPER = ("paper_pathway", "paper_ratio", "paper_significant", "paper_verdict", "paper_verdict_of_this")
HEADINGS = {
    "rank": "", "pathway": "pathway", "overlap": "genes", "ratio": "ratio", "fdr": "FDR", "significant": "significant",
    "verdict": "relevant", "paper_pathway": "paper: pathway", "paper_ratio": "paper: ratio",
    "paper_significant": "paper: significant", "paper_verdict": "paper: relevant",
    "paper_verdict_of_this": "paper on our pathway",
}  # fmt: skip
ILLEGIBLE = "(name not legible)"
_STYLE = """body { font: 14px/1.4 sans-serif; margin: 1.5em; color: #222 }
h1 { font-size: 1.3em } h2 { font-size: 1.05em; margin: 1.6em 0 0 } p { margin: .2em 0 .5em; color: #555 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: left }
th { border-bottom: 1px solid #888; font-weight: 600 } tr:nth-child(even) { background: #f4f4f4 }
.number { text-align: right; white-space: nowrap } .strong { font-weight: 600 }"""


def write_pathway_table(
    enrichment: Path,
    verdicts: Path | None,
    out_stem: Path,
    title: str = "",
    *,
    level: float = 0.05,
    published: Path | None = None,
) -> None:
    """Write the first pathways of every list as `out_stem.csv` and, to be read, `out_stem.html`.

    Parameters
    ----------
    enrichment
        Folder of `perturbed enrich`.
    verdicts
        csv with `pathway`, `library`, `verdict`; None where nobody judged.
    out_stem
        Path without suffix.
    title
        Title of the page.
    level
        False discovery rate up to which a pathway is significant; that of the enrichment's spec.
    published
        The paper's table: its bar of the same list and rank stands beside ours, and its verdict on our pathway. The two
        bars of a row are other pathways, as a rule: the cells, genes and libraries differ.

    Raises
    ------
    DataError
        If a table is missing or broken.
    """
    bars = read_bars(enrichment, verdicts, published)
    table = pd.DataFrame(columns=list(COLUMNS)) if bars.empty else _tabulate(bars, level, published)
    sections = [] if bars.empty else [_section(part, table.loc[part.index]) for part in _split(bars)]
    page = (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1>{''.join(sections) or '<p>No list has a gene in any pathway.</p>'}</html>\n"
    )
    with atomic(out_stem.with_name(f"{out_stem.name}.csv")) as part:
        table.to_csv(part, index=False, lineterminator="\n", float_format="%.6g")
    with atomic(out_stem.with_name(f"{out_stem.name}.html")) as part:
        part.write_text(page, encoding="utf-8")


def _split(bars: pd.DataFrame) -> list[pd.DataFrame]:
    return [part for _, part in bars.groupby(["library", "group", "list"], sort=False)]


def _tabulate(bars: pd.DataFrame, level: float, published: Path | None) -> pd.DataFrame:
    """A pathway a row, longest bar first, as the figure has them."""
    rank = bars.groupby(["library", "group", "list"], sort=False).cumcount() + 1
    table = bars.assign(rank=rank, significant=bars["fdr"] <= level)[list(COLUMNS)]
    if published is None:
        return table
    paper = read_published(published)
    own = paper[paper["kind"] == "bar"].assign(
        rank=lambda t: t["rank"].astype(int), paper_pathway=lambda t: t["pathway"]
    )
    own = own.rename(columns={"ratio": "paper_ratio", "significant": "paper_significant", "verdict": "paper_verdict"})
    own["paper_pathway"] = own["paper_pathway"].replace("", ILLEGIBLE)
    final = paper[paper["kind"] == "verdict"]
    said = dict(zip(final["pathway"].str.lower(), final["verdict"]))
    joined = table.merge(own[["list", "rank", *PAPER[:4]]], on=["list", "rank"], how="left", validate="m:1")
    joined[PAPER[4]] = joined["pathway"].str.lower().map(said)
    return joined


def _section(bars: pd.DataFrame, table: pd.DataFrame) -> str:
    """Heading, counts and rows of one list."""
    first = bars.iloc[0]
    name = TITLES.get(first["list"], str(first["list"]).replace("_", " "))
    place = ", ".join(str(part) for part in (first["library"], first["group"]) if part)
    paper = [column for column in PAPER if column in table and table[column].notna().any()]
    shown = table[[*COLUMNS[3:], *paper]]
    head = "".join(f"<th>{escape(HEADINGS[str(column)])}</th>" for column in shown)
    rows = "".join(_row(row) for row in shown.to_dict("records"))
    about = escape(describe_list(bars)).replace("\n", "<br>")
    return f"<h2>{escape(name)} ({escape(place)})</h2><p>{about}</p><table><tr>{head}</tr>{rows}</table>"


def _row(row: Mapping[Any, Any]) -> str:
    """A row of the page; what is significant is bold, the paper's for itself."""
    cells = []
    for column, value in row.items():
        strong = bool(row.get("paper_significant" if column in PAPER[:4] else "significant"))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        classes = " ".join(name for name, wanted in (("number", number), ("strong", strong)) if wanted)
        cells.append(f'<td class="{classes}">{_show(column, value)}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _show(column: Any, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if pd.isna(value):
        return ""
    if "ratio" in str(column):
        return f"{float(value):.2f}"
    return f"{value:.2g}" if isinstance(value, float) else escape(str(value))
