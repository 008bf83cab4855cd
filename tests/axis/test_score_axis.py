"""A whole case on simulated islets: planted genes are found, what must be at chance is, and what is wrong is told."""

from __future__ import annotations

import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scored_case import BETA, DISEASE, NORMAL, make_case
from scored_case import read_table as read

from perturbed.axis.axes import observed_weights
from perturbed.axis.baselines import correlate_with_axis
from perturbed.axis.cells import read_cells
from perturbed.axis.compact import CompactDecoder
from perturbed.axis.maps import find_gene
from perturbed.axis.run import score_axis
from perturbed.decoders.scvi import load_scvi
from perturbed.errors import DataError
from perturbed.gradients.gene_scores import score_genes


def recovery(tables, name, measure="auprc", group=BETA) -> pd.Series:
    table = read(tables, "planted")
    rows = table[(table["list"] == name) & (table["measure"] == measure) & (table["group"] == group)]
    assert len(rows) == 1
    return rows.iloc[0]


# --- results --------------------------------------------------------------------------------------------------------


def test_gradients_find_planted_genes(tables):
    for group in ("all", BETA):
        for arm in ("unperturbed", "perturbed"):
            row = recovery(tables, f"gradient_{arm}", group=group)
            assert row["value"] >= 0.8 and row["low"] <= row["value"] <= row["high"]
            assert recovery(tables, f"gradient_{arm}", "auroc_direction", group)["value"] > 0.97
        random = recovery(tables, "random", group=group)
        assert abs(random["value"] - random["chance"]) < 0.1


def test_gradients_beat_the_rivals_where_the_arms_hold_other_shares_of_cell_types(tables):
    """Over all cells: differences of means find markers of types. Within one type they do as well as gradients."""
    for arm in ("unperturbed", "perturbed"):
        low = recovery(tables, f"gradient_{arm}", group="all")["low"]
        assert low > recovery(tables, "median_decoded", group="all")["high"]
        assert low > recovery(tables, "axis_correlation", group="all")["high"]
    assert recovery(tables, "median_decoded")["value"] > 0.9


def test_permuted_labels_lose_the_direction_but_may_keep_the_genes(tables):
    """|cosine| does not see how long an axis is: what permutations destroy is the direction, and the axis' length."""
    row = recovery(tables, "gradient_unperturbed, labels permuted", "auroc_direction")
    assert abs(row["value"] - 0.5) < 0.08 and row["unit"] == "permutations"
    table = read(tables, "permutation").set_index(["group", "cells", "statistic"])
    assert table.loc[(BETA, "axis", "length"), "p"] <= 0.05
    reach = table.loc[(BETA, "unperturbed", "max_abs_reach")]
    assert reach["p"] <= 0.05 and reach["observed"] > reach["null_high"] and reach["n_genes_family"] > 5
    assert (table["studies_permuted"] == 2).all()


def test_scores_equal_those_of_gene_scores_on_the_same_cells(tables, world):
    decoder = load_scvi(world.model)
    case = make_case()
    cells = read_cells(case, world.cells, decoder)
    rows = cells.group(BETA)
    axis = cells.z[rows][cells.arm[rows] == 1].mean(axis=0) - cells.z[rows][cells.arm[rows] == 0].mean(axis=0)
    table = read(tables, "gene_scores")
    for k, arm in enumerate(("unperturbed", "perturbed")):
        inside = rows[cells.arm[rows] == k]
        slow = score_genes(decoder, cells.z[inside], decoder.context(list(cells.batch[inside])), axis)
        own = table[(table["group"] == BETA) & (table["cells"] == arm)].set_index("gene").loc[list(decoder.genes)]
        np.testing.assert_allclose(own["cosine"], slow.cosine[0], atol=1e-4)
        np.testing.assert_allclose(own["norm"], slow.norm[0], rtol=1e-3)
        np.testing.assert_allclose(own["projection"], slow.projection[0], atol=1e-5)
        assert (own["n_cells"] == len(inside)).all()
        assert ((own["low"] <= own["cosine"] + 0.05) & (own["cosine"] <= own["high"] + 0.05)).mean() > 0.95
        shown = own[own["kept"]]
        assert shown["fdr"].ge(shown["p"] - 1e-12).all() and own.loc[~own["kept"], "p"].isna().all()


def test_rankings_keep_their_contract(tables):
    table = read(tables, "rankings")
    assert list(table) == ["list", "group", "gene", "symbol", "score", "rank", "kept", "mean_expression"]
    assert set(table["group"]) == {"all", BETA}
    kept = table["kept"].astype(str) == "True"
    for _, own in table.groupby(["group", "list"]):
        inside = own[kept[own.index]].sort_values("rank")
        np.testing.assert_array_equal(inside["rank"], np.arange(1, len(inside) + 1))
        assert inside["score"].abs().is_monotonic_decreasing
        assert own.loc[~kept[own.index], "rank"].isna().all() and own["gene"].is_unique
    lists = read(tables, "lists")
    assert set(lists["list"]) == set(table["list"]) and lists["note"].isna().all()
    assert (lists["n_kept"] + lists["n_dropped"] == 400).all() and (lists["n_dropped"] > 10).all()
    symbols = table.drop_duplicates("gene").set_index("gene")["symbol"]
    assert symbols["ENSMUSG99000000001"] == "Ins1"


def test_flows_lead_where_they_were_planted(tables):
    """Ins1 falls in disease: raising it leads β cells back, lowering it leads them on."""
    scores = read(tables, "flow_scores").set_index(["flow", "arm"])
    for arm in ("unperturbed", "perturbed"):
        up, down = scores.loc[("Ins1_beta", arm)], scores.loc[("Ins1_down", arm)]
        assert up["high"] < 0 < down["low"]
        np.testing.assert_allclose([up["cosine"], up["low"]], [-down["cosine"], -down["high"]], rtol=1e-5)
    table = read(tables, "gene_scores").query("gene == 'ENSMUSG99000000001' and group == @BETA").set_index("cells")
    np.testing.assert_allclose(
        table.loc["perturbed", "cosine"], scores.loc[("Ins1_beta", "perturbed"), "cosine"], atol=1e-4
    )
    flows = read(tables, "flows")
    arrows = flows[(flows["kind"] == "arrow") & (flows["flow"] == "Ins1_beta")]
    for sign in (1, -1):
        along = arrows[(arrows["projection"] == "axis") & (arrows["sign"] == sign)]
        assert len(along) > 5 and (np.sign(along["u"]) == -sign).mean() > 0.9
        assert len(arrows[(arrows["projection"] == "umap") & (arrows["sign"] == sign)]) > 0
    assert {"pca", "axis", "umap"} == set(flows["projection"])


def test_all_flows_and_the_map_have_the_components_of_all_cells(tables, world):
    decoder = load_scvi(world.model)
    found = read_cells(make_case(), world.cells, decoder, None)
    centred = found.z - found.z.mean(axis=0)
    reference = np.abs(centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T)  # up to signs
    cells = read(tables, "cells").set_index("cell")
    wanted = reference[pd.Index(found.names).get_indexer(cells.index)]
    np.testing.assert_allclose(cells[["pc1", "pc2"]].abs(), wanted, atol=1e-3)
    flows = read(tables, "flows")
    for name in ("Ins1_beta", "Ins1_down"):
        dots = flows[(flows["flow"] == name) & (flows["projection"] == "pca") & (flows["kind"] == "cell")]
        np.testing.assert_allclose(np.sort(dots["x"]), np.sort(cells["pc1"]), rtol=1e-5)
        own = dots[dots["arm"] != "other"]
        assert len(own) == (cells["type"] == BETA).sum() < len(dots)


def test_composition_and_axes_tables(tables):
    composition = read(tables, "composition")
    shares = composition[composition["measure"] == "share"].pivot(index="type", columns="cells", values="value")
    np.testing.assert_allclose(shares.sum(), 1, atol=1e-5)
    assert shares.loc[BETA, "unperturbed"] > shares.loc[BETA, "perturbed"] + 0.05
    cosines = composition[composition["measure"] == "cosine_of_axes"]["value"]
    assert cosines.between(0.3, 0.999).all()
    axes = read(tables, "axes").set_index("group")
    assert axes.loc["all", "donors_perturbed"] == 8 and axes.loc[BETA, "cosine_halves"] > 0.7
    stability = read(tables, "stability")
    assert stability[stability["measure"] == "top_overlap_bootstrap"]["mean"].gt(0.5).all()


# --- other inputs ---------------------------------------------------------------------------------------------------


def small(**changes):
    return make_case(judged=(BETA,), n_cells=40, **changes)


def test_latents_without_counts_give_the_same_scores_and_say_what_is_absent(tables, world, tmp_path):
    decoder = load_scvi(world.model)
    full = anndata.read_h5ad(world.cells)
    encoded = decoder.encode(sparse.csr_matrix(full.X), list(full.obs["batch"]))
    bare = anndata.AnnData(sparse.csr_matrix((len(full), 0), dtype=np.float32), obs=full.obs)
    bare.obsm["qz_mean"], bare.obsm["qz_sd"] = encoded.mean.numpy(), encoded.sd.numpy()
    bare.write_h5ad(tmp_path / "cells.h5ad")
    score_axis(make_case(judged=(BETA,)), tmp_path / "cells.h5ad", world.model, tmp_path / "t", symbols=world.truth)
    lists = read(tmp_path / "t", "lists").set_index("list")["note"]
    assert lists[["pseudobulk", "axis_correlation"]].str.contains("without counts").all()
    assert set(read(tmp_path / "t", "rankings")["list"]) == set(lists.index) - {"pseudobulk", "axis_correlation"}
    assert not (tmp_path / "t" / "planted.csv").exists()
    one, other = (read(t, "gene_scores").query("group == 'all'") for t in (tables, tmp_path / "t"))
    np.testing.assert_allclose(one["cosine"].to_numpy(), other["cosine"].to_numpy(), atol=1e-4)
    assert "Ins1" in set(other["symbol"])


def test_cells_with_several_diseases_are_in_the_arm_of_each_and_counted(world, tmp_path):
    cells = anndata.read_h5ad(world.cells)
    disease = cells.obs["disease"].astype(str).to_numpy(dtype=object)
    some = np.flatnonzero(disease == DISEASE)[:25]
    disease[some] = f"obesity || {DISEASE}"
    cells.obs["disease"] = disease
    cells.write_h5ad(tmp_path / "cells.h5ad")
    score_axis(small(), tmp_path / "cells.h5ad", world.model, tmp_path / "t")
    arms = read(tmp_path / "t", "arms").set_index("arm")
    assert arms["n_cells_several_values"].tolist() == [0, 25]
    assert arms.loc["perturbed", "n_cells"] == (disease == DISEASE).sum() + 25


@pytest.mark.parametrize("axis", ["donors", "discriminant"])
def test_other_axes_find_planted_genes_too(world, tables, tmp_path, axis):
    score_axis(make_case(judged=(BETA,), axis=axis), world.cells, world.model, tmp_path / "t", truth=world.truth)
    row = read(tmp_path / "t", "axes").set_index("group").loc[BETA]
    assert row["axis"] == axis and f"cosine_{axis}" not in row and 0 < row["cosine_means"] < 1
    means = read(tables, "axes").set_index("group").loc[BETA, f"cosine_{axis}"]
    np.testing.assert_allclose(row["cosine_means"], means, rtol=1e-4)
    assert recovery(tmp_path / "t", "gradient_unperturbed", group="all")["low"] > 0.8
    assert recovery(tmp_path / "t", "gradient_unperturbed", "auroc_direction", "all")["value"] > 0.95
    assert recovery(tmp_path / "t", "gradient_unperturbed", "auroc_direction")["low"] > 0.7


def test_equal_seeds_are_equal_bytes(world, tmp_path):
    for name in ("a", "b"):
        score_axis(small(), world.cells, world.model, tmp_path / name)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_given_axis_has_no_permutations(world, tmp_path):
    (tmp_path / "axis.csv").write_text("axis\n" + "\n".join("10000000") + "\n")
    case = small(axis="given", given=str(tmp_path / "axis.csv"))
    score_axis(case, world.cells, world.model, tmp_path / "t")
    table = read(tmp_path / "t", "permutation")
    assert table["note"].str.contains("given").all() and read(tmp_path / "t", "gene_scores")["p"].isna().all()
    assert (read(tmp_path / "t", "axes")["axis"] == "given").all()


def test_confounded_arms_have_no_permutations(world, tmp_path):
    """Normal cells of one study, diseased cells of the other: labels cannot be exchanged, and it is said."""
    cells = anndata.read_h5ad(world.cells)
    first = cells.obs["dataset_id"].astype(str).str.endswith("1")
    cells[(first == (cells.obs["disease"] == NORMAL)).to_numpy()].copy().write_h5ad(tmp_path / "cells.h5ad")
    score_axis(small(), tmp_path / "cells.h5ad", world.model, tmp_path / "t")
    table = read(tmp_path / "t", "permutation")
    assert table["note"].str.contains("no study has donors in both arms").all()


@pytest.mark.parametrize("batch_representation", ["one-hot", "embedding"])
def test_compact_decoder_equals_the_models(world, tmp_path, batch_representation):
    folder = world.model
    if batch_representation == "embedding":
        import scvi

        cells = anndata.read_h5ad(world.cells)[::10].copy()
        scvi.model.SCVI.setup_anndata(cells, batch_key="donor_id")
        model = scvi.model.SCVI(cells, n_hidden=8, n_latent=3, batch_representation="embedding")
        model.train(1, accelerator="cpu", enable_progress_bar=False, logger=False)
        model.save(tmp_path / "model")
        folder = tmp_path / "model"
    decoder = load_scvi(folder)
    z = np.random.default_rng(0).normal(size=(6, decoder.n_latent)).astype(np.float32)
    for names in (list(decoder.batches[1:3]) * 3, [decoder.batches[-1]] * 6):
        few = CompactDecoder(decoder, names)
        axis = np.ones(decoder.n_latent)
        one = score_genes(decoder, z, decoder.context(names), axis)
        other = score_genes(few, z, few.context(names), axis)
        np.testing.assert_allclose(one.cosine, other.cosine, atol=1e-5)
        np.testing.assert_allclose(one.norm, other.norm, rtol=1e-4)
    with pytest.raises(DataError, match="not among those kept"):
        few.context([decoder.batches[0]])


def test_correlation_with_the_axis_equals_numpys(world):
    cells = read_cells(make_case(), world.cells, load_scvi(world.model))
    rows, place = cells.group(BETA), np.random.default_rng(0).normal(size=len(cells.group(BETA)))
    full = anndata.read_h5ad(world.cells)[list(cells.names[rows])]
    logs = np.log1p(1e4 * full.X.toarray() / full.X.sum(axis=1))
    found = correlate_with_axis(cells.counts, rows, place)
    for g in (0, 17, 210):
        slow = np.corrcoef(np.asarray(logs)[:, g], place)[0, 1]
        np.testing.assert_allclose(found[list(cells.decoder.genes).index(full.var_names[g])], slow, atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": "celltype"}, "no obs column 'celltype'; did you mean 'cell_type'"),
        ({"donors": "donor"}, "no obs column 'donor'; did you mean 'donor_id'"),
        ({"perturbed": {"column": "disease", "values": "T2D"}}, "no cell has disease 'T2D'"),
        ({"perturbed": {"column": "disease", "values": NORMAL}}, "'normal' are in both arms"),
        ({"keep": {"assay": ["10x"]}}, "keep: no cell has assay '10x'"),
        ({"judged": ["beta"]}, "no cell of either arm has cell_type 'beta'"),
        ({"donors": "sex"}, "has cells in both arms .*name a column of samples"),
        ({"min_donors": 20}, "all: 8 unperturbed donors, min_donors is 20"),
        ({"min_cells": 5000}, r"all: \d+ unperturbed cells, min_cells is 5000"),
        ({"flows": [{"gene": "Ins9"}]}, "no gene 'Ins9'; did you mean 'Ins"),
        ({"flows": [{"gene": "Ins1", "cells": ["beta"]}]}, "Ins1: no cell of either arm is 'beta'"),
    ],
)
def test_wrong_cases_are_told_in_one_line(world, tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as error:
        score_axis(make_case(**changes), world.cells, world.model, tmp_path / "t")
    assert "\n" not in str(error.value) and not (tmp_path / "t").exists()


def test_wrong_files_are_told_in_one_line(world, tmp_path):
    def fails(message, change=None, model=world.model, **options):
        cells = anndata.read_h5ad(world.cells)
        cells = cells if change is None else change(cells)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.h5ad"
        cells.write_h5ad(path)
        with pytest.raises(DataError, match=message) as error:
            score_axis(small(), path, model, tmp_path / "t", **options)
        assert "\n" not in str(error.value) and not (tmp_path / "t").exists()

    def batches(cells):
        cells.obs["batch"] = "elsewhere"
        return cells

    def genes(cells):
        cells.var_names = [f"other{i}" for i in range(cells.n_vars)]
        return cells

    def latents(cells):
        cells.obsm["qz_mean"] = np.zeros((len(cells), 3), dtype=np.float32)
        return cells

    def nothing(cells):
        return anndata.AnnData(sparse.csr_matrix((len(cells), 0), dtype=np.float32), obs=cells.obs)

    def species(cells):
        cells.var_names = [name.replace("ENSMUSG", "ENSG") for name in cells.var_names]
        return cells

    fails("1 of 1 batches .* were not in the model's training.*such as 'elsewhere'", batches)
    fails("genes are named like 'other0', the model's by Ensembl ids", genes)
    fails("genes are those of homo_sapiens, the model's those of mus_musculus", species)
    fails("has 3 latents, the model 8", latents)
    fails("neither counts nor obsm", nothing)
    (tmp_path / "truth.csv").write_text("gene_id,symbol,effect\nENSMUSG00000000001,Gnai3,1\n")
    fails("none of its genes with an effect", truth=tmp_path / "truth.csv")
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    with pytest.raises(DataError, match="no such file"):
        score_axis(small(), tmp_path / "none.h5ad", world.model, tmp_path / "t")


def test_ambiguous_symbols_are_told(world):
    cells = read_cells(make_case(), world.cells, load_scvi(world.model))
    cells.symbols[1] = cells.symbols[0]
    with pytest.raises(DataError, match=r"'Ins1' is the symbol of 2 genes of the model .*give one's id"):
        find_gene(cells, "Ins1")
    assert find_gene(cells, cells.decoder.genes[1]) == 1
    assert observed_weights(np.array([0, 1, -1])).perturbed.ravel().tolist() == [0, 1, 0]
    assert set(cells.donors["arm"]) == {0, 1} and DISEASE != NORMAL
