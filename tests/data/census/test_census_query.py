"""Streamed queries of a store: exactly the source's cells, interrupted ones gone on with, every defect told."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import anndata
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
from census_world import BETA, VERSION, query_card, write
from scipy import sparse

from perturbed.data.census import query, remote
from perturbed.data.census.query import query_cells
from perturbed.data.census.simulate import simulate_islets
from perturbed.data.census.spec import IsletParams
from perturbed.errors import ConfigError, DataError, FetchError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(query, "CHUNK_VALUES", 5000)


def expected(islets, keep) -> tuple[pd.DataFrame, sparse.csr_matrix]:
    rows = np.flatnonzero(keep)
    return islets.obs.iloc[rows], islets.counts[rows]


def test_the_real_client_reads_the_store(islets, store):
    small = {"soma.init_buffer_bytes": 2**24, "py.init_buffer_bytes": 2**24}
    with cellxgene_census.open_soma(uri=str(store), tiledb_config=small) as census:
        obs_filter = "disease == 'normal' and is_primary_data == True and nnz >= 100"
        found = cellxgene_census.get_anndata(census, "mus_musculus", obs_value_filter=obs_filter)
        obs = cellxgene_census.get_obs(census, "mus_musculus")
        presence = cellxgene_census.get_presence_matrix(census, "mus_musculus")
        summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
        stored = json.loads(census.metadata["about"])
    rows = (islets.obs["disease"] == "normal") & islets.obs["is_primary_data"] & (islets.obs["nnz"] >= 100)
    assert found.n_obs == rows.sum() > 50
    assert (islets.counts[np.flatnonzero(rows)] != found.X).nnz == 0
    assert found.var["feature_name"].tolist() == islets.var["feature_name"].tolist()
    for column in ("cell_type", "dataset_id", "raw_sum", "nnz"):
        np.testing.assert_array_equal(obs[column].astype(str), islets.obs[column].astype(str))
    assert presence.shape == (3, 300) and summary["total_cell_count"] == "240" and stored == {}


def test_a_query_gives_the_sources_cells_exactly(islets, store, tmp_path):
    card = query_card(obs_filter=[BETA, "nnz >= 100"], columns=["cell_type", "disease", "nnz"])
    query_cells(card, "beta", tmp_path / "cells.h5ad", store=store)
    found = anndata.read_h5ad(tmp_path / "cells.h5ad")
    keep = (islets.obs["cell_type"] == BETA["values"]) & islets.obs["is_primary_data"] & (islets.obs["nnz"] >= 100)
    obs, counts = expected(islets, keep)
    assert found.shape == (int(keep.sum()), 300) and keep.sum() > 60
    assert (counts != found.X).nnz == 0 and found.X.dtype == np.float32 and found.X.has_canonical_format
    assert found.obs["soma_joinid"].tolist() == obs["soma_joinid"].tolist()
    assert found.obs_names.tolist() == [str(i) for i in obs["soma_joinid"]]
    joined = obs["dataset_id"].astype(str) + obs["assay"].astype(str) + "cell" + obs["donor_id"].astype(str)
    assert found.obs["batch"].tolist() == joined.tolist()
    columns = "soma_joinid is_primary_data dataset_id assay suspension_type donor_id cell_type disease nnz batch"
    assert list(found.obs) == columns.split()
    assert found.var_names.tolist() == islets.var["feature_id"].tolist() and found.var.index.name == "feature_id"
    assert found.var["feature_name"].tolist() == islets.var["feature_name"].tolist()
    kept = json.loads(found.uns["provenance"])
    assert kept["census_version"] == VERSION and kept["n_cells"] == len(found) and kept["uri"] == str(store)
    assert kept["filter"] == ("(is_primary_data == True) and (cell_type == 'type B pancreatic cell') and (nnz >= 100)")
    assert kept["dataset_ids"] == sorted(set(obs["dataset_id"].astype(str)))
    assert set(kept["versions"]) == {"cellxgene-census", "tiledbsoma"}
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]  # nothing hidden is left


def test_genes_copies_and_a_draw_of_cells(islets, store, tmp_path):
    genes = [islets.var["feature_id"][k] for k in (250, 3, 17)]
    card = query_card(genes=genes, primary_only=False)
    query_cells(card, "some", tmp_path / "a.h5ad", store=store)
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert found.shape == (240, 3) and found.var_names.tolist() == [genes[1], genes[2], genes[0]]
    np.testing.assert_array_equal(found.X.toarray(), islets.counts[:, [3, 17, 250]].toarray())
    drawn = []
    for seed, name in ((1, "b"), (1, "c"), (2, "d")):
        query_cells(query_card(max_cells=30, seed=seed), name, tmp_path / f"{name}.h5ad", store=store)
        drawn.append(anndata.read_h5ad(tmp_path / f"{name}.h5ad").obs["soma_joinid"].tolist())
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 30 and drawn[0] == sorted(drawn[0])


def test_the_same_query_gives_the_same_bytes(store, tmp_path):
    for name in ("a", "b"):
        query_cells(query_card(obs_filter=[BETA]), "beta", tmp_path / f"{name}.h5ad", store=store)
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()


# --- interruptions ----------------------------------------------------------------------------------------------------


def count_reads(monkeypatch, stop_after: int | None = None) -> list[slice]:
    read, seen = query._Chunks._read, []

    def reading(self, span):
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(span)
        return read(self, span)

    monkeypatch.setattr(query._Chunks, "_read", reading)
    return seen


def test_an_interrupted_query_reads_only_what_is_missing(islets, store, tmp_path, monkeypatch, capsys):
    card, out = query_card(), tmp_path / "cells.h5ad"
    query_cells(card, "x", tmp_path / "whole.h5ad", store=store)
    with monkeypatch.context() as patch:
        seen = count_reads(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            query_cells(card, "x", out, store=store)
        assert len(seen) == 3 and not out.exists()
    kept = sorted((tmp_path / ".cells.h5ad.parts").rglob("*.npz"))
    assert len(kept) == 3
    kept[1].write_bytes(kept[1].read_bytes()[:-200])  # a chunk that a full disk cut short
    with monkeypatch.context() as patch:
        again = count_reads(patch)
        query_cells(card, "x", out, store=store)
    assert again[0] == seen[1] and again[1].start == seen[2].stop and again[-1].stop == 226
    assert "2 of" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.h5ad").read_bytes()
    assert not (tmp_path / ".cells.h5ad.parts").exists()


def test_chunks_of_another_query_are_not_used(store, tmp_path, monkeypatch):
    out = tmp_path / "cells.h5ad"
    with monkeypatch.context() as patch:
        count_reads(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            query_cells(query_card(), "x", out, store=store)
    (before,) = (tmp_path / ".cells.h5ad.parts").iterdir()
    query_cells(query_card(obs_filter=[BETA]), "x", out, store=store)
    assert not before.exists()
    assert set(anndata.read_h5ad(out).obs["cell_type"]) == {"type B pancreatic cell"}


def test_chunks_of_a_store_that_changed_meanwhile_are_read_again(islets, tmp_path, monkeypatch):
    """Another store at the same place; or a chunk whose counts are not those of the cells."""
    out = tmp_path / "cells.h5ad"
    path = write(islets, tmp_path / "store")
    with monkeypatch.context() as patch:
        count_reads(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            query_cells(query_card(), "x", out, store=path)
    shutil.rmtree(path)
    counts = islets.counts.copy()
    counts.data[counts.indptr[1] - 1] = 0
    counts.eliminate_zeros()
    changed = islets._replace(counts=counts, obs=islets.obs.assign(nnz=np.diff(counts.indptr)))
    query_cells(query_card(), "x", out, store=write(changed, path))
    primary = islets.obs["is_primary_data"].to_numpy()
    assert (counts[np.flatnonzero(primary)] != anndata.read_h5ad(out).X).nnz == 0

    with monkeypatch.context() as patch:
        count_reads(patch, stop_after=1)
        with pytest.raises(KeyboardInterrupt):
            query_cells(query_card(), "x", tmp_path / "again.h5ad", store=path)
    (chunk,) = (tmp_path / ".again.h5ad.parts").rglob("*.npz")
    with np.load(chunk) as arrays:
        np.savez(chunk, data=arrays["data"], indices=arrays["indices"], indptr=np.minimum(arrays["indptr"], 7))
    query_cells(query_card(), "x", tmp_path / "again.h5ad", store=path)
    assert (tmp_path / "again.h5ad").read_bytes() == out.read_bytes()


def test_a_failing_network_is_tried_again_and_then_told(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    calls = []

    def flaky(good_after):
        calls.append(1)
        if len(calls) <= good_after:
            raise tiledbsoma.SOMAError("curl: timed out")
        return "read"

    assert remote.persist(lambda: flaky(2), "counts", 5) == "read" and len(calls) == 3
    calls.clear()
    with pytest.raises(FetchError, match=r"^counts: curl: timed out \(5 attempts\); check the network"):
        remote.persist(lambda: flaky(9), "counts", 5)
    assert len(calls) == 5
    with pytest.raises(ZeroDivisionError):  # no fault of a network
        remote.persist(lambda: 1 / 0, "counts", 5)


# --- defects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"obs_filter": [BETA, {"column": "nnz", "at_least": 9999}]},
            "no cell matches: of 240 cells, is_primary_data == True leaves 226, cell_type == 'type B pancreatic cell' "
            "leaves {beta}, nnz >= 9999 leaves 0; correct cells.obs_filter",
        ),
        ({"obs_filter": ["cell_type == 'beta'"]}, "cell_type == 'beta' leaves 0"),
        ({"obs_filter": ["celltype == 'x'"]}, "cells.obs_filter: obs has no column 'celltype'; did you mean 'cell_ty"),
        ({"obs_filter": ["cell_type = 'x'"]}, "cannot be read (invalid syntax)"),
        ({"obs_filter": ["'x'"]}, "names no column"),
        ({"obs_filter": ["nnz == 'many'"]}, "cells.obs_filter: (is_primary_data == True) and (nnz == 'many')"),
        ({"columns": ["diseases"]}, "cells.columns: obs has no column 'diseases'; did you mean 'disease'?"),
        (
            {"obs_filter": [{"column": "cell_type", "values": ["pancreatic A cell", "pancreatic b cell"]}]},
            "no cell has cell_type 'pancreatic b cell'; did you mean 'pancreatic",
        ),
        ({"genes": ["ENSMUSG00000000001"]}, "'ENSMUSG00000000001' is not in Census 2023-12-15 (1 of 1"),
        ({"organism": "homo_sapiens"}, "the store has no homo_sapiens; it has mus_musculus"),
        ({"expect": {"n_obs": 7}}, "expect.n_obs: the card says 7, found 226"),
        ({"expect": {"values": {"disease": ["gout"]}}}, "expect.values: no cell has disease 'gout'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(islets, store, tmp_path, keys, message):
    primary = islets.obs[islets.obs["is_primary_data"]]
    message = message.format(beta=(primary["cell_type"] == "type B pancreatic cell").sum())
    with pytest.raises((ConfigError, DataError)) as error:
        query_cells(query_card(**keys), "x", tmp_path / "cells.h5ad", store=store)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_places_that_hold_no_census(tmp_path, store):
    with pytest.raises(DataError, match="no such store"):
        query_cells(query_card(), "x", tmp_path / "c.h5ad", store=tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: holds no Census"):
        query_cells(query_card(), "x", tmp_path / "c.h5ad", store=tmp_path / "folder")


def broken(islets, path, **change):
    return write(islets._replace(**change), path)


def test_counts_that_are_not_as_many_as_obs_says(islets, tmp_path):
    obs = islets.obs.copy()
    obs.loc[20, "nnz"] += 1
    path = broken(islets, tmp_path / "store", obs=obs)
    with pytest.raises(DataError, match=rf"cell 20 has {obs.nnz[20] - 1} values.*obs counts {obs.nnz[20]} \(1 such"):
        query_cells(query_card(), "x", tmp_path / "cells.h5ad", store=path)
    assert not (tmp_path / "cells.h5ad").exists()


def test_values_that_are_no_counts(islets, tmp_path):
    counts = islets.counts.copy()
    counts.data[5000] = 1.5
    path = broken(islets, tmp_path / "store", counts=counts)
    with pytest.raises(DataError, match=r"X\['raw'\]: holds 1.5, which is no count"):
        query_cells(query_card(), "x", tmp_path / "cells.h5ad", store=path)


def test_a_store_of_another_species(islets, tmp_path):
    var = islets.var.assign(feature_id=[name.replace("ENSMUSG", "ENSG") for name in islets.var["feature_id"]])
    path = broken(islets, tmp_path / "store", var=var)
    with pytest.raises(DataError, match="is a gene of homo_sapiens, the cells are those of mus_musculus"):
        query_cells(query_card(), "x", tmp_path / "cells.h5ad", store=path)


def test_releases_without_counted_values_are_read_as_well(islets, tmp_path, monkeypatch):
    monkeypatch.setattr(query, "CHUNK_CELLS", 100)
    path = broken(islets, tmp_path / "store", obs=islets.obs.drop(columns=["nnz"]))
    query_cells(query_card(columns=["disease"], primary_only=False), "x", tmp_path / "cells.h5ad", store=path)
    assert (islets.counts != anndata.read_h5ad(tmp_path / "cells.h5ad").X).nnz == 0
    rows = islets.counts.tolil()
    rows[17] = 0
    counts = sparse.csr_matrix(rows)
    path = broken(islets, tmp_path / "empty", obs=islets.obs.drop(columns=["nnz"]), counts=counts)
    with pytest.raises(DataError, match=r"cell 17 has no value in X\['raw'\] \(1 such cells\); the store is broken"):
        query_cells(query_card(columns=["disease"], primary_only=False), "x", tmp_path / "c.h5ad", store=path)


def test_the_release_of_a_store_is_the_cards_claim(store, tmp_path):
    query_cells(query_card(census_version="2024-07-01"), "x", tmp_path / "cells.h5ad", store=store)
    kept = json.loads(anndata.read_h5ad(tmp_path / "cells.h5ad").uns["provenance"])
    assert kept["census_version"] == "2024-07-01" and kept["census_version_is"] == "claimed by the card"
    assert kept["summary"]["census_build_date"] == VERSION
    with pytest.raises(ConfigError, match=r"census_version: 2023-05-15 is before the store at .* built \(2023-12-15\)"):
        query_cells(query_card(census_version="2023-05-15"), "x", tmp_path / "c.h5ad", store=store)


def test_cells_with_several_diseases_count_for_each(islets, tmp_path):
    """Releases since 2025-11-08 join diseases of one cell by ` || `."""
    obs = islets.obs.assign(disease=islets.obs["disease"].astype(str))
    diabetic = np.flatnonzero(obs["is_primary_data"] & (obs["disease"] == "type 2 diabetes mellitus"))
    obs.loc[diabetic[:9], "disease"] = "obesity || type 2 diabetes mellitus"
    obs["disease"] = obs["disease"].astype("category")
    path = broken(islets, tmp_path / "store", obs=obs)
    wanted = {"column": "disease", "values": "type 2 diabetes mellitus"}
    card = query_card(obs_filter=[wanted], expect={"values": {"disease": ["obesity"]}})
    query_cells(card, "x", tmp_path / "cells.h5ad", store=path)
    found = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert found.n_obs == len(diabetic) and (found.obs["disease"] != "type 2 diabetes mellitus").sum() == 9
    card = query_card(obs_filter=[{"column": "disease", "values": "obesity"}])
    query_cells(card, "x", tmp_path / "b.h5ad", store=path)
    assert anndata.read_h5ad(tmp_path / "b.h5ad").n_obs == 9


def test_memory_stays_bounded_by_the_chunk(tmp_path, monkeypatch):
    """Measured: what numpy and Python hold at once, beside the bytes of all counts."""
    larger = simulate_islets(IsletParams(n_cells=2000, n_genes=600, n_decoys=150), 0)
    path = write(larger, tmp_path / "store")
    peaks = {}
    for n_values in (20_000, 10**7):
        monkeypatch.setattr(query, "CHUNK_VALUES", n_values)
        query_cells(query_card(max_cells=30), "x", tmp_path / "first.h5ad", store=path)  # imports
        tracemalloc.start()
        query_cells(query_card(), "x", tmp_path / f"{n_values}.h5ad", store=path)
        peaks[n_values] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    whole = 8 * larger.counts.nnz
    assert peaks[20_000] < 0.5 * whole < peaks[10**7]
