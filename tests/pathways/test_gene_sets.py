"""Libraries: strict reading, translation of ids with every loss counted, names, hashes, and the verb."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from perturbed.cli_pathways import enrich, gene_sets, read_libraries
from perturbed.config import parse
from perturbed.errors import ConfigError, DataError, FetchError
from perturbed.pathways.gene_sets import Access, hash_sets, read_gmt, write_gene_sets
from perturbed.pathways.spec import GeneSetCard, load_gene_set_card

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "genesets"
CARDS = Path(__file__).parents[2] / "config" / "gene_sets"


def card_of(path: Path, **keys: Any) -> GeneSetCard:
    value = {"source": {"kind": "path", "path": str(path)}, "organism": "mouse", **keys}
    return parse(GeneSetCard, value, "card")


def table_at(path: Path, **keys: Any) -> dict[str, Any]:
    return {"source": {"kind": "path", "path": str(path)}, **keys}


def run(card: GeneSetCard, tmp_path: Path, var: Path | None = None) -> tuple[dict[str, list[str]], pd.DataFrame]:
    """Sets written, and the report with the library's row as `""`."""
    out = tmp_path / "sets.gmt"
    write_gene_sets(card, "lib", out, access=Access(tmp_path / "data"), var_table=var)
    written = {one.name: list(one.genes) for one in read_gmt(out)}
    report = pd.read_csv(tmp_path / "sets.mapping.csv", keep_default_na=False, na_values={"n_in_data": [""]})
    return written, report.set_index("pathway")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_gmt_is_read_plain_or_gzipped_and_repeated_genes_count_once(tmp_path: Path) -> None:
    text = "A\tabout\tg1\tg2\tg1\n\nB\t\tg3,1.0\tg3\t\n"
    (tmp_path / "a.gmt").write_text(text)
    (tmp_path / "a.gmt.gz").write_bytes(gzip.compress(text.encode()))
    sets = read_gmt(tmp_path / "a.gmt")
    assert sets == read_gmt(tmp_path / "a.gmt.gz")
    assert [(one.name, one.genes, one.n_repeated) for one in sets] == [("A", ("g1", "g2"), 1), ("B", ("g3",), 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\tx\tg1\nB g1 g2\n", "line 2 is no gene set"),
        ("\tx\tg1\n", "line 1 is no gene set"),
        ("A\tx\tg1\nB\tx\tg1\nA\tx\tg2\nB\tx\tg2\n", "sets named twice: 'A', 'B'"),
        ("\n\n", "holds no gene set"),
    ],
)
def test_a_broken_gmt_is_refused_with_its_line_or_names(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.gmt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_gmt(tmp_path / "bad.gmt")


def test_a_truncated_gzip_and_a_missing_file_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gmt.gz").write_bytes(gzip.compress(b"A\tx\tg1\n" * 100)[:-12])
    for path in (tmp_path / "bad.gmt.gz", tmp_path / "none.gmt"):
        with pytest.raises(DataError, match=path.name):
            read_gmt(path)


def test_the_normal_form_does_not_see_order_or_description(tmp_path: Path) -> None:
    for name, text in (
        ("a", "B\tx\tg2\tg1\nA\t\tg1\n"),
        ("b", "A\ty\tg1\nB\tz\tg1\tg2\n"),
        ("c", "A\ty\tg1\nB\tz\tg1\n"),
    ):
        (tmp_path / f"{name}.gmt").write_text(text)
    a, b, c = (hash_sets(read_gmt(tmp_path / f"{name}.gmt")) for name in "abc")
    assert a == b != c
    assert a == hashlib.sha256(b"A\t\tg1\nB\t\tg1\tg2\n").hexdigest()
    assert run(card_of(tmp_path / "a.gmt", sorted_sha256=a), tmp_path)[0] == {"A": ["g1"], "B": ["g1", "g2"]}
    with pytest.raises(DataError, match=f"sorted_sha256 is {c}"):
        run(card_of(tmp_path / "c.gmt", sorted_sha256=a), tmp_path)


# --- ids --------------------------------------------------------------------------------------------------------------


def test_entrez_ids_are_mapped_and_every_loss_is_counted(tmp_path: Path) -> None:
    (tmp_path / "lib.gmt").write_text("P2\td\t1\t2\t3\t4\t1\nP1\td\t9\nP3\td\n")
    (tmp_path / "map.tsv").write_text("#tax_id\tGeneID\tSymbol\n10\t1\tIns1\n10\t2\tGcg\n10\t3\tGcg\n10\t5\t-\n")
    (tmp_path / "var.csv").write_text("gene,symbol\nE1,Ins1\nE2,Other\n")
    keys = {"ids": "entrez", "map": table_at(tmp_path / "map.tsv", source_column="GeneID", target_column="Symbol")}
    written, report = run(card_of(tmp_path / "lib.gmt", **keys), tmp_path, tmp_path / "var.csv")
    assert written == {"P2": ["Gcg", "Ins1"]}
    counts = ["n_in", "n_repeated", "n_mapped", "n_lost", "n_ambiguous", "n_merged", "n_out", "n_in_data"]
    assert report.loc["P2", counts].tolist() == [4, 1, 3, 1, 0, 1, 2, 1]
    assert report.loc["P1", counts].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    assert report.loc["P3", counts].tolist() == [0] * 8
    assert report.loc["", counts].tolist() == [5, 1, 3, 2, 0, 1, 2, 1]
    assert report["level"].tolist() == ["library", "set", "set", "set"]
    assert report.loc["", "lost"] == "4;9" and report.loc["P2", "lost"] == "4"
    assert (tmp_path / "sets.gmt").read_text() == "P2\td\tGcg\tIns1\n"


@pytest.mark.parametrize(("many", "genes", "lost"), [("all", ["Gcg", "Ins1", "Ins2"], 1), ("drop", ["Gcg"], 2)])
def test_orthologs_with_several_targets_are_kept_or_dropped_and_counted(
    tmp_path: Path, many: str, genes: list[str], lost: int
) -> None:
    (tmp_path / "lib.gmt").write_text("P\td\tINS\tGCG\tONLYHUMAN\n")
    (tmp_path / "orthologs.csv").write_text("INS,Ins2\nINS,Ins1\nGCG,Gcg\nONLYHUMAN,\n")
    card = card_of(
        tmp_path / "lib.gmt", organism="human", orthologs=table_at(tmp_path / "orthologs.csv", separator=",", many=many)
    )
    written, report = run(card, tmp_path)
    assert written["P"] == genes
    assert report.loc["P", ["n_in", "n_lost", "n_ambiguous", "n_out"]].tolist() == [3, lost, 1, len(genes)]
    assert report["n_in_data"].isna().all()


def test_ensembl_ids_take_the_datas_own_symbols_whatever_their_version(tmp_path: Path) -> None:
    (tmp_path / "lib.gmt").write_text("P\td\tENSMUSG00000000001.4\tENSMUSG00000000002\tENSMUSG00000000003\n")
    (tmp_path / "var.csv").write_text("gene,symbol\nENSMUSG00000000001,Gnai3\nENSMUSG00000000002.7,Pbsn\n")
    card = card_of(tmp_path / "lib.gmt", ids="ensembl")
    written, report = run(card, tmp_path, tmp_path / "var.csv")
    assert written["P"] == ["Gnai3", "Pbsn"] and report.loc["", "n_lost"] == 1
    with pytest.raises(ConfigError, match="--var-table"):
        run(card, tmp_path)


def test_spelling_is_taken_from_the_data_where_only_case_differs(tmp_path: Path) -> None:
    (tmp_path / "lib.gmt").write_text("P\td\tINS1\tabc\tH2-AB1\tNEW\n")
    (tmp_path / "var.csv").write_text("symbol\nIns1\nAbc\naBc\nH2-Ab1\n")
    written, report = run(card_of(tmp_path / "lib.gmt", ignore_case=True), tmp_path, tmp_path / "var.csv")
    assert written["P"] == ["H2-Ab1", "Ins1", "NEW", "abc"]
    assert report.loc["P", "n_in_data"] == 2
    with pytest.raises(ConfigError, match="ignore_case"):
        run(card_of(tmp_path / "lib.gmt", ignore_case=True), tmp_path)


def test_names_follow_the_pattern_and_shared_ones_get_their_id(tmp_path: Path) -> None:
    lines = [
        "TCA cycle%WikiPathways_20240810%WP434%Mus musculus\turl\tg1",
        "Statin pathway%WikiPathways_20240810%WP1%Mus musculus\turl\tg1",
        "Statin pathway%WikiPathways_20240810%WP2%Mus musculus\turl\tg2",
    ]
    (tmp_path / "lib.gmt").write_text("\n".join(lines))
    pattern = load_gene_set_card("wikipathways_mouse_20240810", [CARDS]).name_pattern
    written, _ = run(card_of(tmp_path / "lib.gmt", name_pattern=pattern), tmp_path)
    assert written == {"Statin pathway (WP1)": ["g1"], "Statin pathway (WP2)": ["g2"], "TCA cycle": ["g1"]}
    assert "TCA cycle\tWP434\tg1" in (tmp_path / "sets.gmt").read_text()
    with pytest.raises(DataError, match="one name to several sets: 'Statin pathway'"):
        run(card_of(tmp_path / "lib.gmt", name_pattern="(?P<name>[^%]+).*"), tmp_path)
    with pytest.raises(DataError, match="does not match the card's name_pattern"):
        run(card_of(tmp_path / "lib.gmt", name_pattern="(?P<name>T.+)"), tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ids": "entrez"}, "Entrez ids need a `map`"),
        ({"map": table_at(Path("x"))}, "symbols already"),
        ({"name_pattern": "(x"}, "no regular expression"),
        ({"name_pattern": "x"}, "no group called name"),
        ({"idz": "symbol"}, "did you mean 'ids'"),
        ({"ids": "ensembl", "map": table_at(Path("x"), source_column="a")}, "both be names or both be numbers"),
    ],
)
def test_a_wrong_card_is_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        card_of(Path("lib.gmt"), **keys)


def test_a_table_that_maps_nothing_or_lacks_a_column_says_so(tmp_path: Path) -> None:
    (tmp_path / "lib.gmt").write_text("P\td\t1\t2\n")
    (tmp_path / "map.tsv").write_text("id\tname\n7\tIns1\n")
    with pytest.raises(DataError, match=r"none of its 2 ids \(first '1'\)"):
        run(card_of(tmp_path / "lib.gmt", ids="entrez", map=table_at(tmp_path / "map.tsv")), tmp_path)
    with pytest.raises(DataError, match=r"no column 'GeneID' \(there are id, name\)"):
        table = table_at(tmp_path / "map.tsv", source_column="GeneID", target_column="name")
        run(card_of(tmp_path / "lib.gmt", ids="entrez", map=table), tmp_path)
    assert not (tmp_path / "sets.gmt").exists() and not (tmp_path / "sets.mapping.csv").exists()


# --- files from elsewhere ---------------------------------------------------------------------------------------------


def test_a_library_is_fetched_by_hash_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTURBED_ALLOW_LOCALHOST", "1")
    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as archive:
        archive.writestr("lib.gmt", "B\td\tg2\tg1\n")
    digest = hashlib.sha256((tmp_path / "lib.zip").read_bytes()).hexdigest()
    file = {"name": "lib.zip", "urls": [(tmp_path / "lib.zip").as_uri()], "member": "lib.gmt"}
    pinned = {"source": {"kind": "url", "file": file | {"sha256": digest}}, "organism": "mouse"}
    written, _ = run(parse(GeneSetCard, pinned, "card"), tmp_path)
    assert written == {"B": ["g1", "g2"]}
    other = {"source": {"kind": "url", "file": file | {"name": "other.zip", "sha256": "0" * 64}}, "organism": "mouse"}
    with pytest.raises(FetchError, match=r"other\.zip"):
        run(parse(GeneSetCard, other, "card"), tmp_path)
    unpinned = {"source": {"kind": "url", "file": file | {"name": "third.zip"}}, "organism": "mouse"}
    with pytest.raises(FetchError, match="pins no hash"):
        run(parse(GeneSetCard, unpinned, "card"), tmp_path)
    content = hash_sets(read_gmt(tmp_path / "sets.gmt"))
    run(parse(GeneSetCard, unpinned | {"sorted_sha256": content}, "card"), tmp_path)


def test_every_card_of_the_repository_is_valid() -> None:
    names = sorted(path.stem for path in CARDS.glob("*.yaml"))
    assert "wikipathways_mouse_20240810" in names
    for name in names:
        card = load_gene_set_card(name, [CARDS])
        assert card.organism in ("mouse", "human") and card.about.title
    with pytest.raises(ConfigError, match="did you mean 'hallmark_mouse'"):
        load_gene_set_card("halmark_mouse", [CARDS])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared gene sets are not on this machine")
def test_human_wikipathways_are_carried_over_to_mouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    card = load_gene_set_card("wikipathways_human_to_mouse_shared", [CARDS])
    written, report = run(card, tmp_path)
    whole = report.loc[""]
    raw = gzip.decompress((SHARED / "wikipathways.v7.2.symbols.gmt.gz").read_bytes()).decode().splitlines()
    ids = {gene for line in raw for gene in line.split("\t")[2:] if gene}
    assert whole["n_in"] == len(ids) == whole["n_mapped"] + whole["n_lost"]
    assert whole["n_out"] == len({gene for genes in written.values() for gene in genes})
    assert 0 < whole["n_lost"] < 0.15 * len(ids)
    assert len(written) == len(raw) and {"Ins1", "Ins2"} <= {g for genes in written.values() for g in genes}
    assert {"Rpl3", "Rps6"} <= set(written["CYTOPLASMIC_RIBOSOMAL_PROTEINS"])


# --- the verbs --------------------------------------------------------------------------------------------------------


def test_the_verbs_run_record_themselves_and_repeat_to_the_byte(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("gene-sets")(gene_sets)
    app.command("enrich")(enrich)
    (tmp_path / "lib.gmt").write_text("B\td\tg2\tg1\nA\td\tg3\tg1\n")
    (tmp_path / "card.yaml").write_text(f"source: {{kind: path, path: {tmp_path}/lib.gmt}}\norganism: mouse\n")
    written = []
    for n in range(2):
        out = tmp_path / f"{n}" / "sets.gmt"
        arguments = ["gene-sets", "--card", str(tmp_path / "card.yaml"), "--name", "lib", "--out", str(out)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        written.append((out.read_bytes(), out.with_name("sets.mapping.csv").read_bytes()))
        assert "sorted_sha256" in out.with_name("sets.gmt.provenance.json").read_text()
    assert written[0] == written[1]
    rows = ["list,group,gene,symbol,score,rank,kept,mean_expression"]
    rows += [f"random,,E{i},g{i},{9 - i},{i},true,{i}" for i in range(1, 7)]
    (tmp_path / "rankings.csv").write_text("\n".join(rows))
    arguments = ["enrich", "--scores", str(tmp_path), "--gene-sets", f"lib={tmp_path}/0/sets.gmt", "--top", "2"]
    arguments += ["--spec", "{lists: random, min_size: 2, methods: [ora], n_null: 20}", "--out", str(tmp_path / "e")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    table = pd.read_csv(tmp_path / "e" / "enrichment.csv")
    assert table[table["background"] == "model"]["overlap"].tolist() == [2, 1]
    assert (tmp_path / "e.provenance.json").is_file()


@pytest.mark.parametrize("item", ["nopath", "=x.gmt", "a="])
def test_libraries_are_given_as_name_and_path(item: str) -> None:
    with pytest.raises(ConfigError, match="give NAME=PATH"):
        read_libraries([item])


def test_libraries_that_are_missing_or_named_twice_are_refused(tmp_path: Path) -> None:
    sets = tmp_path / "sets.gmt"
    with pytest.raises(ConfigError, match="no such file"):
        read_libraries([f"a={sets}"])
    sets.write_text("A\td\tg1\n")
    assert read_libraries([f"a={sets}"]) == {"a": sets}
    with pytest.raises(ConfigError, match="given twice"):
        read_libraries([f"a={sets}", f"a={sets}"])
