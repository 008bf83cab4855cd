"""Frozen files: a dataset's h5ad with raw counts, and the minified cells beside a published model."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from census_world import BETA, file_card
from scipy import sparse

from perturbed.data.census import frozen
from perturbed.data.census.cells import open_cells
from perturbed.data.census.frozen import find_file, find_symbols, read_frozen
from perturbed.data.matrices import read_rows
from perturbed.errors import ConfigError, DataError, FetchError
from perturbed.files import hash_file

DATASET = "49e4ffcc-5444-406d-bdee-577127404ba8"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(frozen, "ROWS", 37)
    monkeypatch.setattr(frozen, "SLAB", 50)


def atlas(islets) -> anndata.AnnData:
    """As CELLxGENE's files are: normalised X, counts in raw, the design in obs, no dataset_id."""
    obs = islets.obs.drop(columns=["dataset_id", "nnz", "raw_sum", "soma_joinid"])
    obs = obs.assign(design=np.where(obs["donor_id"].astype(str).str.contains("STZ"), "STZ", "VSG"))
    obs.index = [f"AAAC-{i}" for i in range(len(obs))]
    var = pd.DataFrame({"feature_name": islets.var["feature_name"].to_numpy()}, index=islets.var["feature_id"])
    raw = anndata.AnnData(islets.counts.copy(), obs=obs, var=var)
    adata = raw.copy()
    adata.X.data = np.log1p(adata.X.data)
    adata.raw = raw
    return adata


@pytest.fixture
def atlas_file(islets, tmp_path) -> Path:
    atlas(islets).write_h5ad(tmp_path / "atlas.h5ad")
    return tmp_path / "atlas.h5ad"


def test_counts_of_a_frozen_file(islets, atlas_file, tmp_path):
    clauses = [BETA, {"column": "design", "values": "STZ"}, {"column": "nnz", "at_least": 100}]
    card = file_card(
        "h5ad", atlas_file, dataset_id=DATASET, obs_filter=clauses, columns=["cell_type", "disease", "design", "nnz"]
    )
    read_frozen(card, "atlas", atlas_file, tmp_path / "cells.h5ad")
    found = anndata.read_h5ad(tmp_path / "cells.h5ad")
    donor = islets.obs["donor_id"].astype(str)
    keep = (islets.obs["cell_type"] == BETA["values"]) & islets.obs["is_primary_data"] & (islets.obs["nnz"] >= 100)
    rows = np.flatnonzero(keep & donor.str.contains("STZ"))
    assert found.shape == (len(rows), 300) and len(rows) > 30
    assert (islets.counts[rows] != found.X).nnz == 0
    assert found.obs["source_row"].tolist() == rows.tolist()
    assert found.obs_names.tolist() == [f"AAAC-{i}" for i in rows]
    assert found.obs["nnz"].tolist() == islets.obs["nnz"].iloc[rows].tolist()
    assays = islets.obs["assay"].astype(str)
    assert found.obs["batch"].tolist() == [f"{DATASET}{assays[i]}cell{donor[i]}" for i in rows]
    assert found.var_names.tolist() == islets.var["feature_id"].tolist()
    kept = json.loads(found.uns["provenance"])
    assert kept["file"]["sha256"] == hash_file(atlas_file) and kept["dataset_ids"] == [DATASET]
    on_disk = open_cells(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(read_rows(on_disk.X, np.array([1, 4])).toarray(), found.X[[1, 4]].toarray())


def test_cells_of_a_frozen_file_with_several_diseases_count_for_each(islets, tmp_path):
    adata = atlas(islets)
    primary = np.flatnonzero(adata.obs["is_primary_data"])
    disease = adata.obs["disease"].astype(str).to_numpy(dtype=object)
    disease[primary[:5]] = "obesity || type 2 diabetes mellitus"
    adata.obs["disease"] = disease
    adata.write_h5ad(tmp_path / "atlas.h5ad")
    clause = {"column": "disease", "values": "type 2 diabetes mellitus"}
    card = file_card("h5ad", tmp_path / "atlas.h5ad", dataset_id=DATASET, obs_filter=[clause], columns=["disease"])
    read_frozen(card, "atlas", tmp_path / "atlas.h5ad", tmp_path / "cells.h5ad")
    found = anndata.read_h5ad(tmp_path / "cells.h5ad").obs["disease"]
    assert (found == disease[primary[0]]).sum() == 5 and len(found) == 5 + (disease[primary] == clause["values"]).sum()


def test_genes_and_a_draw_of_a_frozen_file(islets, atlas_file, tmp_path):
    genes = [islets.var["feature_id"][9], islets.var["feature_id"][2] + ".3"]
    card = file_card("h5ad", atlas_file, dataset_id=DATASET, genes=genes, max_cells=20, seed=5, columns=["disease"])
    read_frozen(card, "atlas", atlas_file, tmp_path / "cells.h5ad")
    found = anndata.read_h5ad(tmp_path / "cells.h5ad")
    rows = found.obs["source_row"].to_numpy()
    assert found.shape == (20, 2) and islets.obs["is_primary_data"].iloc[rows].all()
    np.testing.assert_array_equal(found.X.toarray(), islets.counts[rows][:, [2, 9]].toarray())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "obs has no column 'dataset_id'"),
        ({"dataset_id": DATASET, "counts": "X"}, "which is no count; raw counts are needed"),
        ({"dataset_id": DATASET, "obs_filter": [{"column": "strain", "values": "x"}]}, "obs has no column 'strain'"),
        (
            {"dataset_id": DATASET, "obs_filter": [{"column": "disease", "values": "Normal"}]},
            "no cell has disease 'Normal'; did you mean 'normal'?",
        ),
        (
            {"dataset_id": DATASET, "obs_filter": [BETA, {"column": "nnz", "at_least": 1e6}]},
            "of 240 cells, is_primary_data == True leaves 226, cell_type == 'type B pancreatic cell' leaves",
        ),
        ({"dataset_id": DATASET, "obs_filter": [{"column": "disease", "at_least": 1}]}, "disease holds text"),
        ({"dataset_id": DATASET, "organism": "homo_sapiens"}, "is a gene of mus_musculus, the cells are those of homo"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(atlas_file, tmp_path, keys, message):
    out = tmp_path / "out" / "cells.h5ad"
    with pytest.raises((ConfigError, DataError)) as error:
        read_frozen(file_card("h5ad", atlas_file, **keys), "atlas", atlas_file, out)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_symbols_columns_and_broken_files_are_told(islets, tmp_path):
    adata = atlas(islets)
    card = file_card("h5ad", "x", dataset_id=DATASET)
    symbols = anndata.AnnData(adata.raw.X, obs=adata.obs)
    symbols.var_names = islets.var["feature_name"].tolist()
    symbols.write_h5ad(tmp_path / "symbols.h5ad")
    with pytest.raises(DataError, match=r"'Ins1' is no Ensembl id.*must be named by Ensembl ids"):
        read_frozen(card, "x", tmp_path / "symbols.h5ad", tmp_path / "c.h5ad")
    symbols.X = sparse.csc_matrix(symbols.X)
    symbols.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(DataError, match="X is no CSR matrix"):
        read_frozen(card, "x", tmp_path / "csc.h5ad", tmp_path / "c.h5ad")
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "symbols.h5ad").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut.h5ad: not a readable h5ad"):
        read_frozen(card, "x", tmp_path / "cut.h5ad", tmp_path / "c.h5ad")
    with pytest.raises(DataError, match=r"cells.local: nowhere.h5ad: no such file"):
        find_file(file_card("h5ad", "nowhere.h5ad").cells, "x")


# --- minified ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def minified_file(islets, tmp_path) -> Path:
    rng = np.random.default_rng(0)
    obs = islets.obs.assign(_scvi_observed_lib_size=islets.obs["raw_sum"])
    obs.index = obs["soma_joinid"].astype(str).to_numpy()
    var = pd.DataFrame(index=islets.var["feature_id"].to_numpy())
    adata = anndata.AnnData(sparse.csr_matrix((240, 300), dtype=np.float32), obs=obs, var=var)
    adata.obsm["_scvi_latent_qzm"] = rng.normal(size=(240, 6)).astype(np.float32)
    adata.obsm["_scvi_latent_qzv"] = rng.gamma(2.0, size=(240, 6)).astype(np.float32)
    adata.uns["_scvi_adata_minify_type"] = "latent_posterior_parameters"
    adata.write_h5ad(tmp_path / "adata_minified.h5ad")
    return tmp_path / "adata_minified.h5ad"


def test_latents_of_minified_cells(islets, minified_file, tmp_path):
    card = file_card("minified", minified_file, obs_filter=[BETA], columns=["cell_type", "disease"])
    read_frozen(card, "latents", minified_file, tmp_path / "cells.h5ad")
    found, source = anndata.read_h5ad(tmp_path / "cells.h5ad"), anndata.read_h5ad(minified_file)
    rows = np.flatnonzero((islets.obs["cell_type"] == BETA["values"]) & islets.obs["is_primary_data"])
    assert found.shape == (len(rows), 300) and found.X is None and "feature_name" not in found.var
    assert found.var_names.tolist() == islets.var["feature_id"].tolist()
    assert found.obs["source_row"].tolist() == rows.tolist()
    np.testing.assert_array_equal(found.obsm["qz_mean"], source.obsm["_scvi_latent_qzm"][rows])
    np.testing.assert_allclose(found.obsm["qz_sd"] ** 2, source.obsm["_scvi_latent_qzv"][rows], rtol=1e-5)
    joined = source.obs["dataset_id"].astype(str) + source.obs["assay"].astype(str) + "cell"
    assert found.obs["batch"].tolist() == (joined + source.obs["donor_id"].astype(str)).iloc[rows].tolist()
    assert found.obs["soma_joinid"].tolist() == rows.tolist()
    assert json.loads(found.uns["provenance"])["kind"] == "minified"
    np.testing.assert_array_equal(open_cells(tmp_path / "cells.h5ad").obsm["qz_sd"], found.obsm["qz_sd"])


def test_minified_cells_get_symbols_from_a_table(islets, minified_file, tmp_path):
    table = islets.var[["feature_id", "feature_name"]].iloc[:-1]
    table.to_csv(tmp_path / "symbols.csv.gz", index=False, header=False)
    symbols = {"source": {"kind": "path", "path": str(tmp_path / "symbols.csv.gz")}, "separator": ","}
    card = file_card("minified", minified_file, columns=["disease"], symbols=symbols)
    read_frozen(card, "latents", minified_file, tmp_path / "cells.h5ad", find_symbols(card.cells, "latents"))
    var = anndata.read_h5ad(tmp_path / "cells.h5ad").var
    assert var["feature_name"].tolist() == [*table["feature_name"], islets.var["feature_id"].iloc[-1]]
    with pytest.raises(DataError, match=r"cells.symbols: names none of the file's genes, such as 'ENSMUSG99"):
        read_frozen(card, "latents", minified_file, tmp_path / "c.h5ad", {"ENSMUSG00000000001": "Gnai3"})
    card = file_card("minified", minified_file, symbols={"source": {"kind": "path", "path": "nowhere.csv"}})
    with pytest.raises(DataError, match=r"latents: cells.symbols: source.path: nowhere.csv: no such file"):
        find_symbols(card.cells, "latents")


def test_latents_under_another_name_are_told(minified_file, tmp_path):
    card = file_card("minified", minified_file, qzm="X_latent_qzm")
    with pytest.raises(DataError, match="obsm has no 'X_latent_qzm'; did you mean '_scvi_latent_qzm'"):
        read_frozen(card, "x", minified_file, tmp_path / "c.h5ad")


def test_a_file_of_the_web_is_fetched_and_its_hash_checked(minified_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBED_ALLOW_LOCALHOST", "1")
    file = {"name": "min.h5ad", "urls": [minified_file.as_uri()], "sha256": hash_file(minified_file)}
    card = file_card("minified", "x").cells.model_dump() | {"local": None, "file": file}
    cells = frozen.MinifiedCells.model_validate(card)
    found = find_file(cells, "x", data_dir=tmp_path / "data")
    assert found == tmp_path / "data" / "downloads" / "min.h5ad" and hash_file(found) == file["sha256"]
    wrong = frozen.MinifiedCells.model_validate(card | {"file": file | {"name": "b.h5ad", "sha256": "0" * 64}})
    with pytest.raises(FetchError, match=r"sha256 .* expected 0000"):
        find_file(wrong, "x", data_dir=tmp_path / "data")
    unpinned = frozen.MinifiedCells.model_validate(card | {"file": file | {"name": "c.h5ad", "sha256": None}})
    with pytest.raises(FetchError, match="pins no hash"):
        find_file(unpinned, "x", data_dir=tmp_path / "data")
