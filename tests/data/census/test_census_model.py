"""Models of Census cells: fitted by the published recipe, fetched and checked, and refused where they do not fit."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from census_world import QUICK_FIT, model_card, query_card

from perturbed.data.census.cells import open_cells
from perturbed.data.census.model import check_model_fits, fetch_model, fit_model, load_model
from perturbed.data.census.query import query_cells
from perturbed.decoders.scvi import load_scvi
from perturbed.errors import ConfigError, DataError, FetchError
from perturbed.files import hash_file


@pytest.fixture(scope="module")
def cells(store, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    query_cells(query_card(), "cells", path, store=store)
    return path


@pytest.fixture(scope="module")
def fitted(cells, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted") / "model"
    fit_model(cells, model_card(**QUICK_FIT), folder, name="quick")
    return folder


def test_a_fitted_model_is_saved_as_the_published_ones_and_encodes(fitted, cells):
    adata = anndata.read_h5ad(cells)
    assert sorted(path.name for path in fitted.iterdir()) == ["model.json", "model.pt"]
    content = torch.load(fitted / "model.pt", weights_only=False)
    assert set(content) == {"model_state_dict", "var_names", "attr_dict"}
    registry = content["attr_dict"]["registry_"]["field_registries"]["batch"]["state_registry"]
    assert registry["original_key"] == "batch"
    assert list(registry["categorical_mapping"]) == sorted(set(adata.obs["batch"]))
    options = content["attr_dict"]["init_params_"]["non_kwargs"]
    nested = content["attr_dict"]["init_params_"]["kwargs"]
    assert options["n_layers"] == 2 and options["gene_likelihood"] == "nb"
    assert not any(values.get("encode_covariates", False) for values in nested.values())

    decoder = load_scvi(fitted)
    assert decoder.genes == tuple(adata.var_names) and decoder.n_latent == 4
    encoded = decoder.encode(decoder.counts_of(adata), list(adata.obs["batch"].astype(str)))
    assert encoded.mean.shape == (226, 4) and torch.isfinite(encoded.mean).all()
    share = decoder.decode(encoded.mean, encoded.context).expression
    torch.testing.assert_close(share.sum(dim=1), torch.ones(226), rtol=1e-4, atol=1e-4)
    observed = np.asarray(adata.X.sum(axis=0)).ravel() / adata.X.sum()
    assert np.corrcoef(share.mean(dim=0).numpy(), observed)[0, 1] > 0.5
    record = json.loads((fitted / "model.json").read_text())
    assert record["sha256"] == hash_file(fitted / "model.pt") and record["n_cells"] == 226
    check_model_fits(decoder, open_cells(cells))
    assert torch.are_deterministic_algorithms_enabled() is False


def test_the_same_cells_and_seed_give_the_same_weights(fitted, cells, tmp_path):
    torch.rand(3)  # whatever ran before
    fit_model(cells, model_card(**QUICK_FIT), tmp_path / "again", name="quick")
    one, two = (torch.load(f / "model.pt", weights_only=False) for f in (fitted, tmp_path / "again"))
    weights = {key: value for key, value in one["model_state_dict"].items() if isinstance(value, torch.Tensor)}
    assert len(weights) > 20
    for key, value in weights.items():
        assert torch.equal(value, two["model_state_dict"][key]), key
    assert (fitted / "model.pt").read_bytes() == (tmp_path / "again" / "model.pt").read_bytes()
    fit_model(cells, model_card(**QUICK_FIT, seed=1), tmp_path / "other", name="quick")
    other = torch.load(tmp_path / "other" / "model.pt", weights_only=False)["model_state_dict"]
    assert any(not torch.equal(value, other[key]) for key, value in weights.items())


def test_genes_are_chosen_and_poor_cells_left_out(cells, tmp_path):
    card = model_card(**(QUICK_FIT | {"n_top_genes": 60, "min_genes": 150, "epochs": 1}))
    fit_model(cells, card, tmp_path / "model", name="quick")
    decoder, adata = load_model(tmp_path / "model"), anndata.read_h5ad(cells)
    assert len(decoder.genes) == 60 and set(decoder.genes) < set(adata.var_names)
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["n_cells"] == (adata.obs["nnz"] >= 150).sum() < 226
    dispersion = np.asarray(adata.X.toarray().var(axis=0) / (adata.X.toarray().mean(axis=0) + 0.05))
    chosen = adata.var_names.isin(decoder.genes)
    assert np.median(dispersion[chosen]) > np.median(dispersion[~chosen])


def test_cells_that_no_model_can_be_fitted_to(cells, tmp_path):
    with pytest.raises(DataError, match=r"no cell has 9999 detected genes; lower model.min_genes"):
        fit_model(cells, model_card(**(QUICK_FIT | {"min_genes": 9999})), tmp_path / "model")
    adata = anndata.read_h5ad(cells)
    minified = anndata.AnnData(obs=adata.obs, obsm={"qz_mean": np.zeros((226, 4), np.float32)})
    minified.write_h5ad(tmp_path / "minified.h5ad")
    with pytest.raises(DataError, match="holds no counts to fit a model to"):
        fit_model(tmp_path / "minified.h5ad", model_card(**QUICK_FIT), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- cells and model ----------------------------------------------------------------------------------------------


def test_cells_of_batches_that_were_not_trained_are_refused(fitted, cells):
    adata = anndata.read_h5ad(cells)
    batch = adata.obs["batch"].astype(str).to_numpy(dtype=object)
    batch[:3] = ["new", "new", "newer"]
    adata.obs["batch"] = batch
    n = adata.obs["batch"].nunique()
    message = rf"2 of {n} batches \(3 of 226 cells\) were not in the model's training.*such as 'new'; take"
    with pytest.raises(DataError, match=message) as error:
        check_model_fits(load_model(fitted), adata)
    assert "\n" not in str(error.value)
    del adata.obs["batch"]
    with pytest.raises(DataError, match="obs has no column 'batch'"):
        check_model_fits(load_model(fitted), adata)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("ENSMUSG", "ENSG"), "genes are those of homo_sapiens, the model's those of mus_mus"),
        (lambda name: f"Gene{name[-3:]}", "genes are named like 'Gene001', the model's by Ensembl ids"),
        (lambda name: name.replace("G99", "G11"), "only 0% of the model's genes are in the cells"),
    ],
)
def test_cells_with_other_genes_are_refused(fitted, cells, rename, message):
    adata = anndata.read_h5ad(cells)
    adata.var_names = [rename(name) for name in adata.var_names]
    with pytest.raises(DataError, match=message) as error:
        check_model_fits(load_model(fitted), adata)
    assert "\n" not in str(error.value)


def test_minified_cells_must_have_latents_of_the_models_width(fitted, cells):
    obs = anndata.read_h5ad(cells).obs
    decoder = load_model(fitted)
    check_model_fits(decoder, anndata.AnnData(obs=obs, obsm={"qz_mean": np.zeros((226, 4), np.float32)}))
    with pytest.raises(DataError, match="latents have 50 dimensions, the model has 4"):
        check_model_fits(decoder, anndata.AnnData(obs=obs, obsm={"qz_mean": np.zeros((226, 50), np.float32)}))
    with pytest.raises(DataError, match="neither counts nor latents"):
        check_model_fits(decoder, anndata.AnnData(obs=obs))


# --- fetched and saved models -----------------------------------------------------------------------------------------


@pytest.fixture
def server(fitted, monkeypatch):
    """The model over http, as its publisher serves it."""
    monkeypatch.setenv("PERTURBED_ALLOW_LOCALHOST", "1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(fitted))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/model.pt"
        running.shutdown()


def published(url: str, sha256: str | None, **expect):
    file = {"name": "tiny.pt", "urls": [url], **({"sha256": sha256} if sha256 else {})}
    return model_card(kind="published", file=file, organism="mus_musculus", census_version="2023-12-15", expect=expect)


def test_a_published_model_is_fetched_by_its_hash(server, fitted, cells, tmp_path):
    sha256 = hash_file(fitted / "model.pt")
    card = published(server, sha256, n_genes=300, n_latent=4)
    fetch_model(card, tmp_path / "model", data_dir=tmp_path / "data", cells=cells, name="tiny")
    assert hash_file(tmp_path / "model" / "model.pt") == sha256
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    assert record["urls"] == [server] and record["census_version"] == "2023-12-15" and record["trust_sha256"] == sha256
    assert load_model(tmp_path / "model").genes == load_scvi(fitted).genes


@pytest.mark.parametrize(
    ("sha256", "expect", "error", "message"),
    [
        ("0" * 64, {}, FetchError, "sha256 [0-9a-f]{64}, expected 0000"),
        (None, {}, FetchError, "pins no hash"),
        ("right", {"n_genes": 8000}, DataError, "expect.n_genes: the card says 8,000, the model has 300"),
    ],
)
def test_a_model_that_is_not_the_pinned_one_is_refused(server, fitted, tmp_path, sha256, expect, error, message):
    sha256 = hash_file(fitted / "model.pt") if sha256 == "right" else sha256
    with pytest.raises(error, match=message):
        fetch_model(published(server, sha256, **expect), tmp_path / "model", data_dir=tmp_path / "data")
    assert not (tmp_path / "model").exists()


def test_an_unpinned_model_is_accepted_when_asked_for_and_its_hash_printed(server, fitted, tmp_path, capsys):
    card = published(server, None)
    fetch_model(card, tmp_path / "model", data_dir=tmp_path / "data", allow_unpinned=True)
    assert f"sha256: {hash_file(fitted / 'model.pt')}" in capsys.readouterr().err
    assert json.loads((tmp_path / "model" / "model.json").read_text())["trust_sha256"] is None


PX_SCALE = "decoder.px_scale_decoder.0.weight"


def rewritten(fitted: Path, folder: Path, change) -> Path:
    content = torch.load(fitted / "model.pt", weights_only=False)
    change(content)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "model.pt")
    return folder


def test_a_checkpoint_of_an_older_scvi_tools_is_read(fitted, cells, tmp_path):
    """The newest scvi-tools asks for a key that checkpoints of older ones do not have."""

    def strip(content):
        del content["attr_dict"]["registry_"]["setup_method_name"]
        content["attr_dict"]["registry_"].pop("scvi_version")

    folder = rewritten(fitted, tmp_path / "old", strip)
    fetch_model(model_card(kind="path", folder=str(folder)), tmp_path / "model", cells=cells)
    one, two = load_model(tmp_path / "model"), load_model(fitted)
    z = torch.ones(2, 4)
    batch = one.context(list(one.batches[:2]))
    torch.testing.assert_close(one.decode(z, batch).expression, two.decode(z, batch).expression)


def test_older_layouts_and_missing_models_are_told(fitted, tmp_path):
    old = rewritten(fitted, tmp_path / "old", lambda content: content["attr_dict"].pop("registry_"))
    for load in (load_scvi, lambda path: fetch_model(model_card(kind="path", folder=str(path)), tmp_path / "model")):
        with pytest.raises(DataError, match=r"model.pt: saved by a scvi-tools before 0.15.*legacy_save") as error:
            load(old)
        assert "\n" not in str(error.value)
    other = rewritten(fitted, tmp_path / "other", lambda content: content["model_state_dict"].pop(PX_SCALE))
    with pytest.raises(DataError, match=rf"not a model of the class SCVI \({PX_SCALE} missing\)"):
        load_scvi(other)
    with pytest.raises(DataError, match=r"model.folder: .*none/model.pt: no such file"):
        fetch_model(model_card(kind="path", folder=str(tmp_path / "none")), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_the_allow_list_refuses_needs_a_hash_in_the_card(fitted, tmp_path):
    folder = rewritten(fitted, tmp_path / "odd", lambda content: content["attr_dict"].update(extra=Path("x")))
    with pytest.raises(DataError, match="allow-list"):
        fetch_model(model_card(kind="path", folder=str(folder)), tmp_path / "model")
    sha256 = hash_file(folder / "model.pt")
    fetch_model(model_card(kind="path", folder=str(folder), trust_sha256=sha256), tmp_path / "model")
    assert load_model(tmp_path / "model").n_latent == 4  # the trust is remembered beside the model
    with pytest.raises(ConfigError, match="trust_sha256"):
        model_card(kind="path", folder="x", trust_sha256="yes")
