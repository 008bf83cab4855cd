"""What the judge said: lists against random pathways, shares with their counts, and whether the votes agree."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.errors import DataError
from perturbed.evaluation.statistics import wilson
from perturbed.figures.style import GREY, OKABE_ITO, PALE, RC, WIDTH, draw_note, new_figure, save, write_in_row
from perturbed.pathways.judge_statistics import NOT_JUDGED, POOLED
from perturbed.pathways.spec import CONTROL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LISTED, RANDOM = OKABE_ITO[1], GREY
COLOURS = {"random": RANDOM, "control": RANDOM, "pooled": "#000000", "gradient": LISTED, "rival": OKABE_ITO[0]}
MARKERS = {"random": "s", "control": "o", "pooled": "D", "gradient": "o", "rival": "o"}
LIMITS = (1 / 50, 50.0)
"""Odds ratios beyond are drawn as arrows at the edge."""


def draw_judge_figure(folder: Path, out_stem: Path, title: str = "") -> None:
    """Draw the tables of the judge and write `out_stem.svg`, `.png` and `.csv` (the numbers drawn).

    Parameters
    ----------
    folder
        Folder of `perturbed.pathways.judge.judge_pathways`.
    out_stem
        Path without suffix.
    title
        Title of the figure.

    Raises
    ------
    DataError
        If the folder lacks a table.
    """
    import matplotlib as mpl

    tables = {name: _read(folder / f"{name}.csv") for name in ("odds", "verdicts", "agreement")}
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever matplotlibrc the user has
        mpl.rcParams.update(RC)
        if (tables["verdicts"]["verdict"] == NOT_JUDGED).all():
            figure, source = _draw_not_judged(tables["verdicts"])
        else:
            figure, source = draw_judge(tables, title)
        save(figure, source, out_stem)


def draw_judge(tables: dict[str, pd.DataFrame], title: str = "") -> tuple[Figure, pd.DataFrame]:
    """Three panels: odds ratios, shares judged relevant, and pathways by their number of votes."""
    odds = tables["odds"].reset_index(drop=True)
    rows = _arrange(odds)
    figure = new_figure(WIDTH, 0.34 * len(rows) + 2.1)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1.0, 0.8])
    _draw_odds(left, rows)
    _draw_shares(middle, rows)
    votes = _count_votes(tables["verdicts"])
    _draw_votes(right, votes, tables["agreement"])
    left.set_yticks(range(len(rows)), list(rows["label"]))
    middle.set_yticks(range(len(rows)), [])
    for axes in (left, middle):
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    source = pd.concat([rows.assign(table="lists"), votes.assign(table="votes")], ignore_index=True)
    return figure, source[["table", *(column for column in source if column != "table")]]


def _arrange(odds: pd.DataFrame) -> pd.DataFrame:
    """Rows from top to bottom: for each library its random pathways, the gradient lists together, and each list."""
    many = odds["library"].nunique() > 1
    grouped = odds.loc[odds["list"] != POOLED, "group"].nunique() > 1
    rows: list[dict[str, Any]] = []
    for library, part in odds.groupby("library", sort=False):
        prefix = f"{library}: " if many else ""
        first = part.iloc[int(part["n_random"].argmax())]  # the control's row leaves its own pathways out of them
        counts = {key: first[f"n_random_{key}"] for key in ("yes", "no", "undecided")}
        rows.append({"label": f"{prefix}random pathways", "kind": "random", **counts})
        for row in part.to_dict("records"):
            name = str(row["list"]).replace("_", " ") + (f", {row['group']}" if grouped and row["group"] else "")
            kind = "gradient" if str(row["list"]).startswith("gradient_") else "rival"
            kind = {POOLED: "pooled", CONTROL: "control"}.get(row["list"], kind)
            name = {"pooled": f"{name} together", "control": "random genes (control)"}.get(kind, name)
            counts = {key: row[f"n_{key}"] for key in ("yes", "no", "undecided")}
            kept = {key: row[key] for key in ("odds_ratio", "low", "high", "p", "p_holm", "reason")}
            rows.append({"label": fill(prefix + name, 34), "kind": kind, **counts, **kept})
    table = pd.DataFrame(rows)
    total = table["yes"] + table["no"]
    table["share"] = (table["yes"] / total.where(total > 0)).astype(float)
    limits = [wilson(share, n) for share, n in zip(table["share"], total)]
    return table.assign(share_low=[low for low, _ in limits], share_high=[high for _, high in limits])


def _draw_odds(axes: Axes, rows: pd.DataFrame) -> None:
    axes.set_xscale("log")
    axes.set_xlim(*LIMITS)
    axes.axvline(1, color=GREY, lw=1, ls=(0, (4, 2)), zorder=0)
    for y, row in enumerate(rows.to_dict("records")):
        if row["kind"] == "random":
            write_in_row(axes, y, "what the lists are compared to")
            continue
        if not np.isfinite(row["low"]) and not np.isfinite(row["high"]):
            write_in_row(axes, y, row["reason"] if isinstance(row["reason"], str) and row["reason"] else "undefined")
            continue
        colour = COLOURS[row["kind"]]
        low, high, value = (float(np.clip(row[key], *LIMITS)) for key in ("low", "high", "odds_ratio"))
        axes.plot([low, high], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        for end, limit, marker in ((low, LIMITS[0], "<"), (high, LIMITS[1], ">")):
            if end == limit:
                axes.plot(end, y, marker, ms=5, color=colour, clip_on=False)
        if LIMITS[0] < value < LIMITS[1]:
            axes.plot(value, y, MARKERS[row["kind"]], ms=5.5, color=colour)
    ticks = [0.02, 0.1, 0.5, 1, 2, 10, 50]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("odds ratio of “relevant”")
    axes.set_title("Lists against random pathways", loc="left")


def _draw_shares(axes: Axes, rows: pd.DataFrame) -> None:
    chance = rows.loc[rows["kind"] == "random", "share"]
    if len(chance) == 1:
        axes.axvline(float(chance.iloc[0]), color=GREY, lw=1, ls=(0, (4, 2)), zorder=0)
    for y, row in enumerate(rows.to_dict("records")):
        counts = f"{row['yes']:.0f}/{row['yes'] + row['no']:.0f}"
        if row["undecided"]:
            counts += f", {row['undecided']:.0f} undecided"
        axes.text(1.03, y, counts, va="center", fontsize=7.5, color="#333333", clip_on=False)
        if np.isnan(row["share"]):
            write_in_row(axes, y, "no verdict")
            continue
        colour = COLOURS[row["kind"]]
        axes.plot([row["share_low"], row["share_high"]], [y, y], color=colour, lw=1.6, solid_capstyle="butt")
        axes.plot(row["share"], y, MARKERS[row["kind"]], ms=5.5, color=colour, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("share judged relevant")
    axes.set_title("Judged relevant, of those decided", loc="left")


def _count_votes(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Pathways by how many votes said yes, of those with an answer in every vote; the others counted apart."""
    answered = verdicts["votes_yes"] + verdicts["votes_no"]
    n_votes = int((answered + verdicts["votes_invalid"] + verdicts["votes_refused"]).max())
    rows = []
    for kind, inside in (("listed", ~verdicts["is_random"]), ("random", verdicts["is_random"])):
        complete = inside & (answered == n_votes)
        for yes in range(n_votes + 1):
            n = int((complete & (verdicts["votes_yes"] == yes)).sum())
            rows.append({"kind": kind, "votes_yes": yes, "n": n, "of": int(inside.sum())})
        rows.append({"kind": kind, "votes_yes": -1, "n": int((inside & ~complete).sum()), "of": int(inside.sum())})
    return pd.DataFrame(rows)


def _draw_votes(axes: Axes, votes: pd.DataFrame, agreement: pd.DataFrame) -> None:
    incomplete = votes.loc[votes["votes_yes"] < 0, "n"].sum() > 0
    shown = votes if incomplete else votes[votes["votes_yes"] >= 0]
    places = sorted(shown["votes_yes"].unique(), key=lambda count: (count < 0, count))
    for shift, kind, colour in ((-0.2, "listed", LISTED), (0.2, "random", PALE)):
        part = shown[shown["kind"] == kind].set_index("votes_yes").loc[places]
        share = (part["n"] / part["of"].clip(lower=1)).to_numpy(float)
        at = np.arange(len(places)) + shift
        axes.bar(at, share, 0.38, color=colour, label=kind)
        for x, height, n in zip(at, share, part["n"]):
            axes.text(x, height + 0.01, f"{n}", ha="center", va="bottom", fontsize=7, color="#333333")
    axes.set_xticks(range(len(places)), ["votes\nlacking" if place < 0 else str(place) for place in places])
    axes.set_ylim(0, 1.3 * float((shown["n"] / shown["of"].clip(lower=1)).max()))
    axes.set(xlabel="votes for “relevant”", ylabel="share of pathways")
    axes.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.03), columnspacing=1.0, handlelength=1.4)
    axes.set_title(_say_agreement(agreement), loc="left")


def _say_agreement(agreement: pd.DataFrame) -> str:
    row = agreement[agreement["pathways"] == "all"].iloc[0]
    if np.isnan(row["kappa"]):
        return fill(f"Agreement: {row['reason']}", 24)
    limits = "" if np.isnan(row["kappa_low"]) else f"\n({row['kappa_low']:.2f} to {row['kappa_high']:.2f})"
    return f"Agreement: κ {row['kappa']:.2f}{limits}"


def _draw_not_judged(verdicts: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    n_random = int(verdicts["is_random"].sum())
    return draw_note(
        f"Not judged: no language model was asked about these {len(verdicts) - n_random} pathways and {n_random} "
        "random ones. Set `provider` of the section `judge` to ask one, or to replay answers that were kept."
    )


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{path}: no such file; make the folder with `perturbed judge`")
    text = dict.fromkeys(("library", "list", "group", "pathway", "lists", "verdict", "reason"), str)
    table = pd.read_csv(path, keep_default_na=False, na_values={}, dtype=text)  # a pathway may be called NA
    for column in table.columns.difference([*text, "is_random", "pathways"]):
        table[column] = pd.to_numeric(table[column], errors="coerce")
    return table
