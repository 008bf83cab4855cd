"""Enrichment against slow references: enumeration, Fisher's test, statsmodels, and lists drawn at random."""

from __future__ import annotations

from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pathway_world import expressed_sets, make_rankings, random_sets, write_gmt, write_rankings
from scipy import sparse, stats
from statsmodels.stats.multitest import multipletests

from perturbed.config import parse
from perturbed.errors import ConfigError, DataError
from perturbed.pathways.enrichment import write_enrichment
from perturbed.pathways.nulls import bin_genes, count_as_good, draw_lists, make_rng, matched_probability, pool_rates
from perturbed.pathways.spec import EnrichmentSpec
from perturbed.pathways.statistics import (
    adjust,
    count_rejections,
    rank_probability,
    rank_values,
    standardise_rank_sums,
    tail_probability,
)
from perturbed.pathways.tables import find_planted

N_GENES = 1200


def spec_of(**keys: Any) -> EnrichmentSpec:
    return parse(EnrichmentSpec, {"lists": "random", **keys}, "spec")


def enrich(tmp_path: Path, table: pd.DataFrame, sets: dict[str, list[str]], top: int, **keys: Any) -> dict[str, Any]:
    """The tables of one run, by name."""
    options = {name: keys.pop(name) for name in ("planted", "genome") if name in keys}
    if "shown" in keys:
        keys["top"] = keys.pop("shown")
    keys.setdefault("lists", list(dict.fromkeys(table["list"])))
    rankings = write_rankings(tmp_path, table)
    library = write_gmt(tmp_path / "lib.gmt", sets)
    write_enrichment(rankings, {"lib": library}, spec_of(**keys), tmp_path / "out", top=top, **options)
    return {
        path.stem: pd.read_csv(path, keep_default_na=False, na_values=[""]) for path in (tmp_path / "out").glob("*")
    }


def as_matrix(members: list[list[int]], n_genes: int) -> sparse.csr_matrix:
    matrix = np.zeros((n_genes, len(members)))
    for column, rows in enumerate(members):
        matrix[rows, column] = 1
    return sparse.csr_matrix(matrix)


# --- the tests --------------------------------------------------------------------------------------------------------


def test_the_tail_is_that_of_all_possible_lists_and_fishers() -> None:
    n_genes, n_list, in_set = 9, 4, {0, 1, 2, 5, 7}
    overlaps = np.array([len(in_set.intersection(drawn)) for drawn in combinations(range(n_genes), n_list)])
    for k in range(n_list + 1):
        p = tail_probability(np.array([[k]]), np.array([len(in_set)]), n_list, n_genes)[0, 0]
        assert p == pytest.approx(np.mean(overlaps >= k), rel=1e-12)
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 300, 40)
    overlap = rng.binomial(np.minimum(sizes, 200), 0.2)
    ours = tail_probability(overlap[None, :], sizes, 200, 2000)[0]
    for k, size, p in zip(overlap, sizes, ours):
        table = [[k, 200 - k], [size - k, 2000 - 200 - size + k]]
        assert p == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue, rel=1e-9)


def test_rates_are_statsmodels_and_rejections_are_counted_from_them() -> None:
    rng = np.random.default_rng(1)
    p = np.vstack([rng.random(300), rng.beta(0.3, 1, 300), rng.beta(0.05, 1, 300), np.ones(300)])
    for row in p:
        np.testing.assert_allclose(adjust(row), multipletests(row, method="fdr_bh")[1], rtol=1e-12)
    slow = [(multipletests(row, method="fdr_bh")[1] <= 0.05).sum() for row in p]
    assert slow == count_rejections(p, 0.05).tolist() and slow[0] == 0 < slow[1] < slow[2]


def test_rank_sums_are_mann_whitneys_with_ties() -> None:
    rng = np.random.default_rng(2)
    values = np.round(rng.normal(size=80), 1)
    members = [list(rng.choice(80, size, replace=False)) for size in (5, 20, 60)]
    membership, ranks = as_matrix(members, 80), rank_values(values)
    z = standardise_rank_sums(ranks[None, :] @ membership, ranks, membership, np.zeros(80, dtype=int))[0]
    for signed, side in ((False, "greater"), (True, "two-sided")):
        for rows, p in zip(members, rank_probability(z, signed)):
            rest = np.delete(values, rows)
            test = stats.mannwhitneyu(values[rows], rest, alternative=side, method="asymptotic", use_continuity=False)
            assert p == pytest.approx(test.pvalue, rel=1e-9)


def test_the_spread_of_rank_sums_is_that_of_all_permutations_within_bins() -> None:
    ranks, bins = np.array([1.0, 2.5, 2.5, 4, 5, 6, 7]), np.array([0, 1, 0, 1, 0, 1, 0])
    rows = [0, 3, 4]
    first, second = np.flatnonzero(bins == 0), np.flatnonzero(bins == 1)
    sums = []
    for a, b in product(permutations(first), permutations(second)):
        mixed = ranks.copy()
        mixed[first], mixed[second] = ranks[list(a)], ranks[list(b)]
        sums.append(mixed[rows].sum())
    membership = as_matrix([rows], len(ranks))
    z = standardise_rank_sums(ranks[None, :] @ membership, ranks, membership, bins)[0, 0]
    assert z == pytest.approx((ranks[rows].sum() - np.mean(sums)) / np.std(sums), rel=1e-12)


def test_the_matched_tail_is_that_of_all_lists_with_as_many_genes_per_bin() -> None:
    bins = np.array([0] * 5 + [1] * 4 + [2] * 3)
    chosen = np.array([0, 1, 5, 6, 7, 9])
    members = [[0, 1, 2, 5, 9], [3, 4, 8, 10], list(range(12)), [5]]
    membership = as_matrix(members, 12)
    wanted = np.bincount(bins[chosen])
    pools = [combinations(np.flatnonzero(bins == b), int(n)) for b, n in enumerate(wanted)]
    lists = [set().union(*parts) for parts in product(*pools)]
    for k in range(7):
        ours = matched_probability(np.full(4, k), membership, bins, chosen)
        slow = [np.mean([len(drawn & set(rows)) >= k for drawn in lists]) for rows in members]
        np.testing.assert_allclose(ours, slow, rtol=1e-12, atol=0)


def test_matched_in_one_bin_is_the_ordinary_test_even_far_out() -> None:
    rng = np.random.default_rng(3)
    members = [list(range(60)), list(rng.choice(500, 100, replace=False))]
    membership, chosen = as_matrix(members, 500), np.arange(50)
    overlap = np.asarray(membership[chosen].sum(axis=0)).ravel().astype(int)
    ours = matched_probability(overlap, membership, np.zeros(500, dtype=int), chosen)
    sizes = np.array([60, 100])
    assert ours[0] < 1e-50
    np.testing.assert_allclose(ours, tail_probability(overlap[None, :], sizes, 50, 500)[0], rtol=1e-8)


def test_random_lists_keep_the_number_of_genes_per_bin_and_count_what_is_exact() -> None:
    rng = np.random.default_rng(4)
    expression = rng.normal(size=400)
    bins = bin_genes(expression, 10)
    assert np.bincount(bins).tolist() == [40] * 10 and expression[bins == 3].max() <= expression[bins == 4].min()
    chosen = np.argsort(-expression + rng.normal(size=400))[:60]
    members = [list(np.argsort(-expression)[:50]), list(rng.choice(400, 80, replace=False))]
    membership = as_matrix(members, 400)
    drawn = draw_lists(bins, chosen, 4000, make_rng(0, "a"))
    assert (drawn.max(), set(np.asarray(drawn.sum(axis=1)).ravel())) == (1, {60})
    for b in range(10):
        assert set(np.asarray(drawn[:, bins == b].sum(axis=1)).ravel()) == {(bins[chosen] == b).sum()}
    overlap = np.asarray(membership[chosen].sum(axis=0)).ravel().astype(int)
    counted = count_as_good(overlap, (drawn @ membership).toarray())
    exact = matched_probability(overlap, membership, bins, chosen)
    np.testing.assert_allclose(counted, exact, atol=4 * np.sqrt(exact.max() / 4000))
    assert (drawn_again := draw_lists(bins, chosen, 4000, make_rng(0, "a"))).nnz == drawn.nnz
    assert abs(drawn - drawn_again).sum() == 0


def test_pooled_rates_are_those_of_the_slow_definition() -> None:
    rng = np.random.default_rng(5)
    p, random_p = rng.beta(0.4, 1, 60).round(2), rng.random((30, 60)).round(2)
    slow = []
    for value in p:
        levels = [q for q in p if q >= value]
        slow.append(min(1, *((random_p <= q).sum() / 30 / (p <= q).sum() for q in levels)))
    np.testing.assert_allclose(pool_rates(p, random_p), slow, rtol=1e-12)


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_the_table_by_hand(tmp_path: Path) -> None:
    """10 genes, 8 of them kept, 7 of those annotated; list of 4, of which 3 annotated."""
    score = np.arange(10, 0, -1.0)
    kept = np.array([True] * 8 + [False] * 2)
    table = make_rankings({"a": score}, np.arange(10.0), kept=kept)
    sets = {"P": ["G0000", "G0001", "G0005", "G0009", "X1"], "Q": ["G0002", "G0004", "G0006", "G0007", "X2", "X3"]}
    tables = enrich(tmp_path, table, sets, 4, methods=["ora"], min_size=2, n_bins=1, n_null=50)
    rows = tables["enrichment"].set_index(["background", "pathway"])
    p = rows.loc[("model", "P")]
    # model background: G0000 G0001 G0005 | G0002 G0004 G0006 G0007 = 7 annotated kept genes; list: G0000 G0001 G0002
    assert p[["set_size", "overlap"]].tolist() == [3, 2] and p["genes"] == "G0000;G0001"
    assert p["expected"] == pytest.approx(3 * 3 / 7, rel=1e-5) and p["ratio"] == pytest.approx(2 / (9 / 7), rel=1e-5)
    assert p["p"] == pytest.approx((3 * 4 + 1) / 35, rel=1e-5) == p["matched_p"]
    # genome: the library's 11 genes, whole sets
    g = rows.loc[("genome", "P")]
    assert g["set_size"] == 5 and g["ratio"] == pytest.approx(2 / (3 * 5 / 11), rel=1e-5)
    counts = tables["counts"].set_index("background")
    assert counts.loc["model", ["n_top", "n_list", "n_background", "n_tested"]].tolist() == [4, 3, 7, 2]
    assert counts.loc["genome", "n_background"] == 11
    lost = tables["lost"]
    assert sorted(lost[lost["side"] == "library"]["gene"]) == ["X1", "X2", "X3"]
    assert sorted(lost[lost["side"] == "ranking"]["gene"]) == ["G0003", "G0008"]
    assert tables["libraries"].loc[0, ["n_sets", "n_genes", "n_shared"]].tolist() == [2, 11, 8]


def test_backgrounds_are_what_the_spec_says(tmp_path: Path) -> None:
    kept = np.arange(30) < 20
    table = make_rankings({"a": np.arange(30, 0, -1.0)}, np.arange(30.0), kept=kept)
    sets = {"P": [f"G{i:04d}" for i in range(0, 30, 2)] + ["X"]}
    (tmp_path / "genome.csv").write_text("symbol\n" + "\n".join([f"G{i:04d}" for i in range(28)] + ["X", "Y"]))

    def backgrounds(**keys: Any) -> dict[str, list[int]]:
        tables = enrich(tmp_path, table, sets, 5, methods=["ora"], min_size=1, n_null=20, **keys)
        counts = tables["counts"].set_index("background")[["n_background", "n_list"]]
        return {str(name): list(map(int, row)) for name, row in zip(counts.index, counts.to_numpy())}

    genome = tmp_path / "genome.csv"
    assert backgrounds() == {"model": [10, 3], "genome": [16, 3]}
    assert backgrounds(model_genes="all") == {"model": [15, 3], "genome": [16, 3]}
    assert backgrounds(annotated_only=False) == {"model": [20, 5], "genome": [31, 5]}
    assert backgrounds(annotated_only=False, model_genes="all") == {"model": [30, 5], "genome": [31, 5]}
    assert backgrounds(genome=genome) == {"model": [10, 3], "genome": [15, 3]}
    assert backgrounds(genome=genome, annotated_only=False) == {"model": [20, 5], "genome": [30, 5]}


def test_planted_pathways_are_found_by_every_method_and_others_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    expression = rng.normal(size=N_GENES)
    score = rng.normal(size=N_GENES)
    sets = random_sets(N_GENES, 80, rng)
    for i in range(4):
        genes = rng.choice(N_GENES, 25, replace=False)
        score[genes] += 3 * rng.choice([-1, 1], 25)
        sets[f"PLANTED{i}"] = [f"G{j:04d}" for j in genes]
    table = make_rankings({"a": score}, expression)
    keys: dict[str, Any] = {"methods": ["ora", "rank", "gsea"], "n_permutations": 200}
    tables = enrich(tmp_path, table, sets, 100, planted=["PLANTED"], **keys)
    assert find_planted(["PLANTED1", "PLANTED*"], list(sets)) == {f"PLANTED{i}" for i in range(4)}
    assert find_planted(["PLANTED1"], list(sets)) == {"PLANTED1"}
    planted = tables["planted"].set_index(["method", "background", "criterion"])
    assert len(planted) == 3 + 3 + 3 + 1
    assert (planted["sensitivity"] == 1).all() and (planted["specificity"] > 0.95).all()
    assert (planted["n_planted"] == 4).all() and (planted["n_other"] == 80).all()
    counts = tables["counts"].set_index(["method", "background"]).loc[("ora", "model")]
    assert counts["n_significant"] >= 4 > 3 > counts["expected_high"] and counts["p"] < 0.01
    first = tables["top"].groupby(["method", "background"], sort=False).head(4)
    assert first["pathway"].str.startswith("PLANTED").all()
    assert tables["top"].groupby(["method", "background"])["place"].max().max() == 10


def test_lists_drawn_at_random_give_what_is_expected_of_them(tmp_path: Path) -> None:
    """Observed over many random lists against the expectation stated beside each; false discoveries are controlled."""
    rng = np.random.default_rng(7)
    expression = rng.normal(size=N_GENES)
    sets = random_sets(N_GENES, 60, rng) | expressed_sets(expression, 30, rng)
    scores = {}
    for i in range(60):  # highly expressed genes score high, whatever set they are in
        scores[f"r{i:02d}"] = np.exp(0.8 * expression + rng.normal(size=N_GENES))
    tables = enrich(tmp_path, make_rankings(scores, expression), sets, 100, n_null=100, backgrounds=["model"])
    for method in ("ora", "rank"):
        counts = tables["counts"].query(f"method == '{method}'")
        assert counts["expected"].mean() > 3, "the naive test must be fooled for this to say anything"
        assert counts["n_significant"].mean() == pytest.approx(counts["expected"].mean(), rel=0.2)
        inside = (counts["n_significant"] >= counts["expected_low"]) & (
            counts["n_significant"] <= counts["expected_high"]
        )
        assert inside.mean() > 0.8
        assert (counts["p"] <= 0.05).mean() < 0.15
        # every discovery is false here, so the share of lists with any is the false discovery rate
        assert (counts["n_matched"] > 0).mean() <= 0.12
        assert counts["n_matched"].mean() < 0.05 * counts["n_significant"].mean()
        rows = tables["enrichment"].query(f"method == '{method}'")
        naive, matched = ((rows[name] <= 0.05).mean() for name in ("p", "matched_p"))
        assert matched < 0.06 < naive
        high = rows[rows["pathway"].str.startswith("HIGH")]
        assert (high["fdr"] <= 0.05).mean() > 0.2 > 0.01 > (high["matched_fdr"] <= 0.05).mean()


def test_a_signed_ranking_sees_direction_and_an_absolute_one_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    score = rng.normal(size=400)
    score[:20] -= 2.0
    sets = {"DOWN": [f"G{i:04d}" for i in range(20)], **random_sets(400, 20, rng)}
    table = make_rankings({"a": score}, rng.normal(size=400))
    ratio = {}
    for rank_by in ("signed", "absolute"):
        tables = enrich(tmp_path, table, sets, 50, methods=["rank"], rank_by=rank_by, annotated_only=False)
        row = tables["enrichment"].set_index("pathway").loc["DOWN"]
        assert row["fdr"] < 1e-3 and row["empirical_p"] < 0.01
        ratio[rank_by] = row["ratio"]
    assert ratio["signed"] < 0.5 < 1.3 < ratio["absolute"]
    members = np.arange(400) < 20
    u = stats.mannwhitneyu(np.abs(score[members]), np.abs(score[~members])).statistic
    assert ratio["absolute"] == pytest.approx(2 * u / (20 * 380), rel=1e-5)


def test_genes_that_share_a_symbol_count_once_the_better_one(tmp_path: Path) -> None:
    table = make_rankings({"a": np.arange(20, 0, -1.0)}, np.arange(20.0))
    table.loc[5, "symbol"] = "G0000"
    table.loc[6, "symbol"] = ""
    tables = enrich(tmp_path, table, {"P": ["G0000", "G0007", "G0015"]}, 7, methods=["ora"], min_size=1, n_null=20)
    lost = tables["lost"]
    assert lost[lost["side"] == "repeated"]["gene"].tolist() == ["ENSMUSG00000000005"]
    assert "ENSMUSG00000000006" in set(lost[lost["side"] == "ranking"]["gene"])
    row = tables["enrichment"].query("background == 'model'").iloc[0]
    assert row["genes"] == "G0000;G0007"  # the 7 best symbols reach to G0007 now


def test_the_order_is_webgestalts(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    table = make_rankings({"b": rng.normal(size=300), "a": rng.normal(size=300)}, rng.normal(size=300))
    tables = enrich(tmp_path, table, random_sets(300, 40, rng), 30, shown=4, n_null=20)
    top, whole = tables["top"], tables["enrichment"]
    assert list(dict.fromkeys(top["list"])) == ["b", "a"]
    for _, rows in top.groupby(["list", "method", "background"]):
        assert rows["place"].tolist() == [1, 2, 3, 4] and rows["fdr"].is_monotonic_increasing
        assert (rows["overlap"] > 0).all()
        same = whole.merge(rows[["list", "method", "background"]].drop_duplicates())
        assert rows["p"].tolist() == sorted(same[same["overlap"] > 0]["p"])[:4]


def test_same_input_same_bytes_whichever_other_lists_are_tested(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    table = make_rankings({"b": rng.normal(size=300), "a": rng.normal(size=300)}, rng.normal(size=300))
    sets = random_sets(300, 20, rng)
    keys: dict[str, Any] = {"methods": ["ora", "rank", "gsea"], "n_permutations": 100, "n_null": 30}
    written = []
    for n, lists in enumerate((["b", "a"], ["b", "a"], ["a"])):
        enrich(tmp_path / str(n), table, sets, 30, lists=lists, **keys)
        written.append({path.name: path.read_bytes() for path in sorted((tmp_path / str(n) / "out").glob("*"))})
    assert written[0] == written[1] and len(written[0]) == 5
    both, alone = (pd.read_csv(tmp_path / n / "out" / "enrichment.csv") for n in "02")
    pd.testing.assert_frame_equal(both[both["list"] == "a"].reset_index(drop=True), alone)


def test_lists_that_a_case_may_lack_are_left_out_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = make_rankings({"random": np.arange(50, 0, -1.0)}, np.arange(50.0))
    sets = {"P": [f"G{i:04d}" for i in range(12)]}
    tables = enrich(tmp_path, table, sets, 10, lists=["pseudobulk", "random"], methods=["ora"], n_null=20)
    assert set(tables["counts"]["list"]) == {"random"}
    assert "has no list 'pseudobulk'; it is left out" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------------------------------


def _case(tmp_path: Path, **change: Any) -> dict[str, Any]:
    table = make_rankings({"gradient": np.arange(50, 0, -1.0)}, np.arange(50.0))
    return {"table": table, "sets": {"P": [f"G{i:04d}" for i in range(12)]}, "top": 10, "n_null": 20} | change


def test_errors_are_one_line_with_the_mend(tmp_path: Path) -> None:
    table = _case(tmp_path)["table"]
    nothing = table.assign(kept=False)
    mouse = table.assign(symbol=table["symbol"].str.lower())
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "has no list 'gradiant'; did you mean 'gradient'", {"lists": "gradiant"}),
        (ConfigError, "has none of pseudobulk; it has gradient", {"lists": "pseudobulk"}),
        (DataError, "list 'gradient', group 'beta': is empty, no gene was kept", {"table": nothing}),
        (DataError, "keeps 50 genes, of which the top 50 would be all; lower `top`", {"top": 50}),
        (
            DataError,
            r"12 if case is ignored \(its first is 'G0000', the rankings' first is 'g0000'\)",
            {"table": mouse},
        ),
        (DataError, "none of its 1 genes is in the rankings .*'ENSMUSG1'.*'G0000'", {"sets": {"P": ["ENSMUSG1"]}}),
        (DataError, "sets named twice", {"sets": {"P": ["G0000"], "P\tx\tG0001\nP": ["G0001"]}}),
        (DataError, "no set has 20 to 2000 of the 12 background genes", {"min_size": 20}),
        (DataError, "lacks column 'symbol'", {"table": table.drop(columns="symbol")}),
        (DataError, "column kept must hold true or false", {"table": table.assign(kept="maybe")}),
        (DataError, "is kept but lacks score", {"table": table.assign(mean_expression=np.nan)}),
        (DataError, "comes twice in list 'gradient'", {"table": table.assign(gene="E")}),
        (ConfigError, "'Q' is in no library", {"planted": ["Q"]}),
        (ConfigError, "min_size 9 is above max_size 3", {"min_size": 9, "max_size": 3}),
        (ConfigError, "names something twice", {"methods": ["ora", "ora"]}),
    ]
    for error, message, change in cases:
        case = _case(tmp_path, **change)
        with pytest.raises(error, match=message):
            enrich(tmp_path, case.pop("table"), case.pop("sets"), case.pop("top"), **case)
        assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no such file"):
        write_enrichment(tmp_path / "no.csv", {"a": tmp_path / "lib.gmt"}, spec_of(), tmp_path / "out", top=5)
    with pytest.raises(ConfigError, match="no library"):
        write_enrichment(tmp_path / "no.csv", {}, spec_of(), tmp_path / "out", top=5)
