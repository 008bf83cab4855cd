"""The pathway figure: what it draws stands in its csv, and equal inputs give equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pathway_world import make_rankings, random_sets, write_gmt, write_rankings

from perturbed.config import parse
from perturbed.errors import DataError
from perturbed.figures.pathway_table import write_pathway_table
from perturbed.figures.pathways import draw_pathways, shorten
from perturbed.pathways.enrichment import write_enrichment
from perturbed.pathways.spec import EnrichmentSpec

PUBLISHED = Path(__file__).parents[2] / "config" / "published" / "paper_b_pathways.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, out = np.random.default_rng(0), tmp_path_factory.mktemp("enrichment")
    score = {name: rng.normal(size=300) for name in ("gradient_unperturbed", "random")}
    sets = random_sets(300, 30, rng)
    score["gradient_unperturbed"][[int(gene[1:]) for gene in sets["SET003"]]] += 4
    spec = parse(EnrichmentSpec, {"lists": list(score), "top": 5, "n_null": 20}, "spec")
    rankings = write_rankings(out, make_rankings(score, rng.normal(size=300)))
    write_enrichment(rankings, {"lib": write_gmt(out / "lib.gmt", sets)}, spec, out / "e", top=40)
    return out / "e"


def test_bars_are_the_first_pathways_by_length_on_the_primary_background(folder: Path, tmp_path: Path) -> None:
    draw_pathways(folder, None, tmp_path / "f", "Title")
    drawn, top = pd.read_csv(tmp_path / "f.csv"), pd.read_csv(folder / "top.csv")
    wanted = top.query("method == 'ora' and background == 'model'")
    assert set(zip(drawn["list"], drawn["pathway"])) == set(zip(wanted["list"], wanted["pathway"]))
    assert len(drawn) == 10 and (drawn["verdict"] == "not judged").all()
    for _, bars in drawn.groupby("list"):
        assert bars["ratio"].is_monotonic_decreasing
    counts = pd.read_csv(folder / "counts.csv").query("method == 'ora' and background == 'model'").set_index("list")
    first = drawn.drop_duplicates("list").set_index("list")
    assert first["n_significant"].to_dict() == counts["n_significant"].to_dict()
    assert first["expected_significant"].to_dict() == counts["expected"].to_dict()
    svg = (tmp_path / "f.svg").read_text()
    assert "SET003" in svg and "not judged" in svg and "judged irrelevant" not in svg


def test_verdicts_and_the_papers_numbers_are_joined_and_repeat_to_the_byte(folder: Path, tmp_path: Path) -> None:
    pathways = pd.read_csv(folder / "top.csv")["pathway"].unique()
    verdicts = pd.DataFrame({"pathway": pathways[:4], "library": "lib", "verdict": ["yes", "no", "no", "undecided"]})
    verdicts.to_csv(tmp_path / "verdicts.csv", index=False)
    for name in ("a", "b"):
        draw_pathways(folder, tmp_path / "verdicts.csv", tmp_path / name, published=PUBLISHED)
    for suffix in ("svg", "png", "csv"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    drawn = pd.read_csv(tmp_path / "a.csv")
    given = dict(zip(verdicts["pathway"], verdicts["verdict"]))
    assert [given.get(p, "not judged") for p in drawn["pathway"]] == drawn["verdict"].tolist()
    svg = (tmp_path / "a.svg").read_text()
    assert "paper: 3 significant; 10 of 10 relevant" in svg and "judged irrelevant" in svg
    assert drawn.query("list == 'random'")["paper_significant"].isna().all()


def test_missing_tables_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"top\.csv: no such file; make it with `perturbed enrich`"):
        draw_pathways(tmp_path, None, tmp_path / "f")
    with pytest.raises(DataError, match=r"verdicts\.csv: no such file; make it with `perturbed judge`"):
        draw_pathways(folder, tmp_path / "verdicts.csv", tmp_path / "f")
    (tmp_path / "bad.csv").write_text("pathway,verdict\nSET003,yes\n")
    with pytest.raises(DataError, match="no column 'library'"):
        draw_pathways(folder, tmp_path / "bad.csv", tmp_path / "f")


def test_long_names_are_wrapped_and_cut() -> None:
    assert shorten("TCA cycle") == "TCA cycle" and shorten("OXIDATIVE_PHOSPHORYLATION") == "Oxidative phosphorylation"
    lines = shorten("Splicing factor NOVA regulated synaptic proteins of the ageing brain", 20).split("\n")
    assert len(lines) == 2 and all(len(line) <= 20 for line in lines) and lines[1].endswith("…")


def test_the_published_table_is_the_papers() -> None:
    table = pd.read_csv(PUBLISHED, comment="#")
    bars, verdicts = table[table["kind"] == "bar"], table[table["kind"] == "verdict"]
    assert bars.groupby("list")["significant"].sum().to_dict() == {
        "gradient_unperturbed": 3,
        "gradient_perturbed": 1,
        "median_decoded": 0,
    }
    relevant = (bars["verdict"] == "yes").groupby(bars["list"]).sum().to_dict()
    assert relevant == {"gradient_unperturbed": 10, "gradient_perturbed": 10, "median_decoded": 7}
    assert len(verdicts) == verdicts["pathway"].nunique() == 30 and (verdicts["verdict"] == "yes").sum() == 26
    named = bars.dropna(subset="pathway").merge(verdicts, on="pathway", how="left", suffixes=("", "_final"))
    assert (named["verdict"] == named["verdict_final"]).all()


def test_the_table_holds_the_bars_and_the_papers_beside_them(folder: Path, tmp_path: Path) -> None:
    verdicts = pd.DataFrame({"pathway": ["SET003"], "library": "lib", "verdict": "yes"})
    verdicts.to_csv(tmp_path / "verdicts.csv", index=False)
    paper = pd.read_csv(PUBLISHED, comment="#", dtype=str, keep_default_na=False)
    own = paper[(paper["kind"] == "verdict") & (paper["verdict"] == "no")].head(1).assign(pathway="Set003")
    pd.concat([paper, own]).to_csv(tmp_path / "paper.csv", index=False)
    write_pathway_table(folder, tmp_path / "verdicts.csv", tmp_path / "t", "<Islets>", published=tmp_path / "paper.csv")
    draw_pathways(folder, tmp_path / "verdicts.csv", tmp_path / "f")
    table, drawn = pd.read_csv(tmp_path / "t.csv"), pd.read_csv(tmp_path / "f.csv")
    same = ["library", "list", "pathway", "ratio", "fdr", "verdict"]
    pd.testing.assert_frame_equal(table[same], drawn[same])
    assert (table["significant"] == (table["fdr"] <= 0.05)).all() and table["significant"].any()
    first = table[table["list"] == "gradient_unperturbed"].set_index("rank")
    assert first.loc[1, "paper_pathway"] == "Cytoplasmic ribosomal proteins" and first.loc[2, "paper_ratio"] == 6.95
    assert first.loc[4, "paper_pathway"] == "(name not legible)"
    assert first.set_index("pathway").loc["SET003", ["verdict", "paper_verdict_of_this"]].tolist() == ["yes", "no"]
    assert table.query("list == 'random'")["paper_ratio"].isna().all()
    page = (tmp_path / "t.html").read_text()
    assert "&lt;Islets&gt;" in page and "SET003" in page and "paper: 3 significant; 10 of 10 relevant" in page
    write_pathway_table(folder, None, tmp_path / "u")
    alone = pd.read_csv(tmp_path / "u.csv")
    assert "paper_ratio" not in alone and (alone["verdict"] == "not judged").all()
