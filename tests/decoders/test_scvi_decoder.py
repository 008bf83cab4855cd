"""scvi-tools' SCVI as a decoder: equal to the model's own outputs, read without running anything the file holds."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from perturbed.decoders.scvi import SCVIDecoder, load_scvi, read_checkpoint
from perturbed.errors import DataError, MethodError
from perturbed.files import hash_file
from perturbed.gradients.gene_scores import score_genes
from perturbed.gradients.user import score_saved_model

VARIANTS = {
    "nb": {"gene_likelihood": "nb"},
    "zinb_two_layers": {"gene_likelihood": "zinb", "n_layers": 2},
    "poisson_learned_library": {"gene_likelihood": "poisson", "use_observed_lib_size": False},
    "nb_embedding": {"gene_likelihood": "nb", "batch_representation": "embedding"},
    "nb_layer_norm": {"gene_likelihood": "nb", "use_layer_norm": "both", "use_batch_norm": "none"},
    "nb_size_factor": {"gene_likelihood": "nb"},
}


def make_cells(n_cells: int = 90, n_genes: int = 30) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    cells = anndata.AnnData(sparse.csr_matrix(rng.poisson(2.0, (n_cells, n_genes)).astype(np.float32)))
    cells.var_names = [f"g{i}" for i in range(n_genes)]
    cells.obs_names = [f"c{i}" for i in range(n_cells)]
    cells.obs["lane"] = np.array(["b", "a", "c"])[np.arange(n_cells) % 3]
    cells.obs["size"] = np.asarray(cells.X.sum(axis=1)).ravel() / 60
    return cells


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Iterator[dict]:
    """A trained model of every variant, with the folder it was saved in."""
    import scvi

    folder, found = tmp_path_factory.mktemp("models"), {}
    scvi.settings.seed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in VARIANTS.items():
            cells = make_cells()
            size = {"size_factor_key": "size"} if name == "nb_size_factor" else {}
            scvi.model.SCVI.setup_anndata(cells, batch_key="lane", **size)
            model = scvi.model.SCVI(cells, n_hidden=12, n_latent=4, **options)
            model.train(1, accelerator="cpu", batch_size=64, enable_progress_bar=False, logger=False)
            model.save(folder / name, overwrite=True)
            found[name] = (model, cells, folder / name)
    yield found


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_and_encoding_equal_the_models_own(saved, name):
    model, cells, folder = saved[name]
    decoder = load_scvi(folder)
    assert decoder.genes == tuple(cells.var_names) and decoder.batches == ("a", "b", "c")
    encoded = decoder.encode(cells.X, list(cells.obs["lane"]))
    np.testing.assert_allclose(encoded.mean, model.get_latent_representation(cells), rtol=1e-4, atol=1e-5)
    mean, variance = model.get_latent_representation(cells, return_dist=True)
    np.testing.assert_allclose(encoded.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoded.sd**2, variance, rtol=1e-4, atol=1e-5)

    model.module.eval()
    z, context = encoded.mean, encoded.context
    size = {"size_factor": torch.ones(len(z), 1)} if name == "nb_size_factor" else {}
    with torch.no_grad():
        px = model.module.generative(z, context["log_library"], context["batch"], **size)["px"]
        decoded = decoder.decode(z, context)
    own = px.scale if px.scale is not None else px.rate / context["log_library"].exp()
    torch.testing.assert_close(decoded.expression, own, rtol=1e-5, atol=1e-7)
    assert decoded.heads.shape == (90, 0)
    last, hidden = decoder.last_layer(), decoder.hidden(z, context)
    link = {"softmax": lambda a: torch.softmax(a, dim=1), "softplus": torch.nn.functional.softplus}[last.link]
    torch.testing.assert_close(link(hidden @ last.weight.T + last.bias), decoded.expression)
    assert last.link == ("softplus" if name == "nb_size_factor" else "softmax")
    batch = decoder.decode(z, decoder.context(["a"] * 90)).expression
    assert (batch - decoded.expression).abs().max() > 1e-5  # the batch counts


@pytest.mark.parametrize("name", ["nb", "nb_size_factor"])
def test_scores_by_products_equal_those_by_tangents(saved, name, monkeypatch):
    _, cells, folder = saved[name]
    decoder = load_scvi(folder)
    encoded = decoder.encode(cells.X, list(cells.obs["lane"]))
    axis = np.array([1.0, -0.5, 0.2, 0.0])
    fast = score_genes(decoder, encoded.mean, encoded.context, axis)
    monkeypatch.setattr(SCVIDecoder, "last_layer", lambda self: None)
    slow = score_genes(load_scvi(folder), encoded.mean, encoded.context, axis)
    np.testing.assert_allclose(fast.cosine, slow.cosine, atol=1e-5)
    np.testing.assert_allclose(fast.norm, slow.norm, rtol=1e-4)


def test_the_trained_model_fits_its_average_expression(saved):
    """Also against the public interface, whose draws of z average out over cells."""
    model, cells, folder = saved["nb"]
    decoder = load_scvi(folder)
    encoded = decoder.encode(cells.X, list(cells.obs["lane"]))
    ours = decoder.decode(encoded.mean, encoded.context).expression.mean(dim=0).numpy()
    theirs = model.get_normalized_expression(cells, n_samples=20, return_numpy=True).mean(axis=0)
    np.testing.assert_allclose(ours, theirs, rtol=0.25)
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9


# --- data -------------------------------------------------------------------------------------------------------------


def test_genes_are_taken_by_name_and_missing_ones_are_zero(saved):
    _, cells, folder = saved["nb"]
    decoder = load_scvi(folder)
    shuffled = cells[:, np.random.default_rng(1).permutation(30)].copy()
    np.testing.assert_array_equal(decoder.counts_of(shuffled).toarray(), cells.X.toarray())
    part = decoder.counts_of(shuffled[:, [name not in ("g3", "g7") for name in shuffled.var_names]].copy()).toarray()
    assert (part[:, [3, 7]] == 0).all()
    keep = [i for i in range(30) if i not in (3, 7)]
    np.testing.assert_array_equal(part[:, keep], cells.X.toarray()[:, keep])
    layered = cells.copy()
    layered.layers["raw"], layered.X = cells.X.copy(), cells.X * 0.5
    np.testing.assert_array_equal(decoder.counts_of(layered, "raw").toarray(), cells.X.toarray())


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_wrong_data_is_told_in_one_line(saved, tmp_path):
    _, cells, folder = saved["nb"]
    decoder = load_scvi(folder)
    wrong = cells.copy()
    wrong.var_names = [f"ENSG{i}" for i in range(30)]
    genes = list(cells.var_names)

    def changed(place: int, value: float) -> sparse.csr_matrix:
        """The counts with one of the stored values, by its place in cell order, changed."""
        counts = sparse.csr_matrix(cells.X, copy=True)
        counts.data[place] = value
        return counts

    def score_file(change: dict) -> None:
        """Score these cells as a user does, from a file with some of their fields changed."""
        other = cells.copy()
        for field, value in change.items():
            setattr(other, field, value)
        other.write_h5ad(tmp_path / "wrong.h5ad")
        arms = {"column": "lane", "unperturbed": ["a"], "perturbed": ["b"]}
        score_saved_model(folder, tmp_path / "wrong.h5ad", tmp_path / "out", **arms)

    cases = [
        (lambda: decoder.counts_of(wrong), r"only 0% of the model's genes.*'g0'.*'ENSG0'"),
        (lambda: decoder.counts_of(anndata.AnnData(cells.X * 0.5, var=cells.var)), "no counts.*layer"),
        (lambda: decoder.counts_of(cells, "raw"), "no layer 'raw'"),
        (lambda: decoder.arrange(cells.X, [*genes[:-1], "g4"]), "gene 'g4' stands twice in the data; keep one"),
        (lambda: decoder.arrange(changed(-1, np.nan), genes), "NaN or infinite values; take these"),
        (lambda: decoder.arrange(changed(0, np.inf), genes), "NaN or infinite values; take these"),
        (lambda: decoder.arrange(changed(-1, 0.5), genes), "no counts.*layer"),  # after 2,000 whole numbers
        (lambda: decoder.arrange(changed(-1, -1.0), genes), "no counts.*layer"),
        (lambda: decoder.context(["a", "d"]), "batch 'd' was not in the model's training"),
        (lambda: score_file({"var_names": [*genes[:-1], "g4"]}), r"wrong\.h5ad: gene 'g4' stands twice"),
        (lambda: score_file({"X": changed(0, 0.5)}), r"wrong\.h5ad: the values are no counts"),
    ]
    for call, message in cases:
        with pytest.raises(DataError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# --- the file ---------------------------------------------------------------------------------------------------------


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def rewritten(folder: Path, target: Path, change) -> Path:
    content = torch.load(folder / "model.pt", weights_only=False)
    change(content)
    torch.save(content, target)
    return target


@pytest.mark.parametrize("place", ["attr_dict", "top", "plain_pickle"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(saved, tmp_path, place):
    witness, file = tmp_path / "ran", tmp_path / "model.pt"
    if place == "plain_pickle":
        file.write_bytes(pickle.dumps(Malicious(witness)))
    else:
        inside = (lambda c: c["attr_dict"]) if place == "attr_dict" else (lambda c: c)
        rewritten(saved["nb"][2], file, lambda c: inside(c).update(extra=Malicious(witness)))
    with pytest.raises(DataError, match=rf"allow-list.*--trust-sha256 {hash_file(file)}") as error:
        read_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="allow-list"):
        read_checkpoint(tmp_path, trust_sha256="0" * 64)
    assert not witness.exists()


def test_a_file_that_the_user_vouches_for_is_read(saved, tmp_path):
    file = rewritten(saved["nb"][2], tmp_path / "model.pt", lambda c: c["attr_dict"].update(extra=Path("x")))
    with pytest.raises(DataError, match="allow-list"):
        load_scvi(tmp_path)
    found = load_scvi(file, trust_sha256=hash_file(file))
    assert found.genes == load_scvi(saved["nb"][2]).genes


def test_what_an_older_version_leaves_out_is_not_needed(saved, tmp_path):
    def strip(content):
        for key in ("setup_method_name", "scvi_version"):
            content["attr_dict"]["registry_"].pop(key, None)
        content["attr_dict"].pop("history_", None)

    file = rewritten(saved["nb"][2], tmp_path / "model.pt", strip)
    z = torch.zeros(2, 4)
    one, two = load_scvi(file), load_scvi(saved["nb"][2])
    context = one.context(["a", "c"])
    torch.testing.assert_close(one.decode(z, context).expression, two.decode(z, context).expression)


def test_files_that_are_no_such_model_are_told(saved, tmp_path):
    with pytest.raises(DataError, match="no such file; give the folder"):
        load_scvi(tmp_path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(DataError, match="no SCVI model"):
        load_scvi(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "model.pt")
    with pytest.raises(DataError, match="no SCVI model"):
        load_scvi(tmp_path)

    def wider(content):
        content["attr_dict"]["init_params_"]["non_kwargs"]["n_layers"] = 3

    with pytest.raises(MethodError, match="weights do not fit"):
        load_scvi(rewritten(saved["nb"][2], tmp_path / "model.pt", wider))

    def covariates(content):
        fields = content["attr_dict"]["registry_"]["field_registries"]
        fields["extra_categorical_covs"]["summary_stats"]["n_extra_categorical_covs"] = 2

    with pytest.raises(MethodError, match="has extra categorical covs; only a batch"):
        load_scvi(rewritten(saved["nb"][2], tmp_path / "model.pt", covariates))
