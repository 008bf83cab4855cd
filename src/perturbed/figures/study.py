"""The figures of the studies by kind, and the one function that draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from perturbed.errors import DataError
from perturbed.figures.inputs import NothingToDraw
from perturbed.figures.style import RC, draw_note, save
from perturbed.study_config import Probe, Programs, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _draw_scored(path: Path, study: Study, titles: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    from perturbed.figures import studies
    from perturbed.figures.latent_map import draw_latent_map

    drawers: dict[str, Callable[..., Figure]] = {
        "comparison": studies.draw_comparison,
        "conditions": studies.draw_conditions,
        "sweep": studies.draw_sweep,
        "denoising": studies.draw_denoising,
        "latent_map": draw_latent_map,
    }
    table = _read(path)
    return drawers[study.kind](table, study, titles), table


def _draw_probe(path: Path, study: Study, titles: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    from perturbed.figures.probes import draw

    table = _read(path)
    parts = table["representation"].str.partition(", ")  # a method's name and, where it has several, which of them
    named = parts[0].map(lambda name: titles.get(name, name)) + parts[1] + parts[2].str.replace("z_iota", "z_ι")
    return _head(draw(table.assign(representation=named)), study), table


def _draw_identifiability(path: Path, study: Study, titles: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    from perturbed.figures.identifiability import draw

    table = _read(path)
    return _head(draw(table), study), table


def _draw_programs(path: Path, study: Study, titles: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    """The source data are all tables of the folder below each other, with the file's name in `table`."""
    from perturbed.figures.programs import draw

    parts = [_read(file) for file in sorted(path.glob("*.csv"))]
    names = [file.stem for file in sorted(path.glob("*.csv"))]
    parts = [part.assign(table=name) for part, name in zip(parts, names) if len(part)]
    if not parts:
        raise DataError(f"{path}: holds no csv; make the folder with `perturbed study programs`")
    table = pd.concat(parts, ignore_index=True)
    return _head(draw(path), study), table[["table", *(column for column in table if column != "table")]]


def _head(figure: Figure, study: Study) -> Figure:
    """Put the study's title, and the data of a study of one dataset and split, over a figure that has none."""
    where = f": {study.dataset} · {study.split}" if isinstance(study, Probe | Programs) else ""
    figure.suptitle(study.title + where, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


STUDY_FIGURES: dict[str, Callable[[Path, Study, Mapping[str, str]], tuple[Figure, pd.DataFrame]]] = {
    **dict.fromkeys(("comparison", "conditions", "sweep", "denoising", "latent_map"), _draw_scored),
    "probe": _draw_probe,
    "identifiability": _draw_identifiability,
    "programs": _draw_programs,
}
"""Every figure of a study: a function from its table (or folder of tables) to the drawing and the numbers drawn."""


def draw_study(path: Path, study: Study, out_stem: Path, titles: Mapping[str, str] | None = None) -> None:
    """Draw a study's figure and write `out_stem.svg`, `.png` and `.csv` (the numbers drawn).

    Parameters
    ----------
    path
        The study's table, or its folder of tables.
    study
        Its section of the config.
    out_stem
        Path without suffix.
    titles
        Method names for readers, by method.

    Raises
    ------
    DataError
        If the table is missing or holds nothing to draw.
    """
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()  # whatever matplotlibrc the user has
        mpl.rcParams.update(RC)
        try:
            figure, source = STUDY_FIGURES[study.kind](path, study, dict(titles or {}))
        except NothingToDraw as reason:
            figure, source = draw_note(f"This study's figure is empty: {reason}.")
        save(figure, source, out_stem)


def _read(path: Path) -> pd.DataFrame:
    try:
        # A gene may be called NA or NaN; only an empty field is missing.
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={"level": str})
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with `perturbed study`") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not a readable csv ({reason}); delete it and rerun the study") from None
    if table.empty:
        raise NothingToDraw(f"{path.name} holds no row")
    return table
