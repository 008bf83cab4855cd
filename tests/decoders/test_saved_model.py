"""The second audience: a saved scvi-tools folder and an h5ad in, gene scores and flows out; the README's example."""

from __future__ import annotations

import re
import textwrap
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbed.decoders.scvi import load_scvi
from perturbed.errors import DataError
from perturbed.gradients import user
from perturbed.gradients.gene_scores import score_genes
from perturbed.gradients.user import score_saved_model

README = Path(__file__).parents[2] / "README.md"
AXIS = {"column": "disease", "unperturbed": ["healthy"], "perturbed": ["diabetic"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with `scvi_model/` and `cells.h5ad`: disease raises the first 5 genes and lowers 15 others."""
    import scvi

    folder, rng, n = tmp_path_factory.mktemp("user"), np.random.default_rng(0), 400
    sick = np.arange(n) % 2 == 1
    rate = np.full((n, 30), 10.0)
    rate[sick, :5] *= 3  # as much as the others lose, so that the shares of the rest stay
    rate[sick, 5:20] /= 3
    cells = anndata.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    cells.var_names = ["Ins1", "Gcg", *(f"g{i}" for i in range(2, 30))]
    cells.obs_names = [f"c{i}" for i in range(n)]
    cells.obs["disease"] = np.where(sick, "diabetic", "healthy")
    cells.obs["cell_type"] = np.where(np.arange(n) < 370, "beta", np.where(np.arange(n) < 395, "alpha", "delta"))
    cells.obs["donor"] = np.array(["m1", "m2", "m3"])[rng.integers(0, 3, n)]
    scvi.settings.seed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi.model.SCVI.setup_anndata(cells, batch_key="donor")
        model = scvi.model.SCVI(cells, n_hidden=24, n_latent=4, gene_likelihood="nb")
        options = {"enable_progress_bar": False, "logger": False, "batch_size": 64, "plan_kwargs": {"lr": 1e-2}}
        model.train(40, accelerator="cpu", **options)
        model.save(folder / "scvi_model")
    cells[:, ::-1].copy().write_h5ad(folder / "cells.h5ad")
    return folder


def test_planted_genes_score_highest_and_lowest(saved, tmp_path):
    table = score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "out", **AXIS)
    assert set(table["cells"]) == {"unperturbed", "perturbed"} and set(table["group"]) == {"all"}
    written = pd.read_csv(tmp_path / "out" / "gene_scores.csv")
    pd.testing.assert_frame_equal(written, table, rtol=1e-4, check_dtype=False)
    up, down = {"Ins1", "Gcg", "g2", "g3", "g4"}, {f"g{i}" for i in range(5, 20)}
    for _, part in table.groupby("cells"):
        assert len(part) == 30 and part["cosine"].is_monotonic_decreasing
        assert set(part["gene"].head(5)) == up and len(down & set(part["gene"].tail(15))) >= 11
        assert (part["n_cells"] == 200).all()
    free = score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "free", **AXIS, logits=True)
    assert set(free["gene"].head(5)) == up and not np.allclose(free["cosine"], table["cosine"], atol=1e-3)
    turned = {**AXIS, "unperturbed": ["diabetic"], "perturbed": ["healthy"]}
    other = score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "turned", **turned)
    assert len(down & set(other[other["cells"] == "perturbed"]["gene"].head(15))) >= 11


def test_scores_equal_those_made_by_hand(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(user, "CHUNK", 37)
    found = score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "out", **AXIS, batch="donor")
    decoder, cells = load_scvi(saved / "scvi_model"), anndata.read_h5ad(saved / "cells.h5ad")
    encoded = decoder.encode(decoder.counts_of(cells), list(cells.obs["donor"].astype(str)))
    sick = (cells.obs["disease"] == "diabetic").to_numpy()
    z = encoded.mean.numpy()
    healthy = {key: value[~sick] for key, value in encoded.context.items()}
    scores = score_genes(decoder, z[~sick], healthy, z[sick].mean(axis=0) - z[~sick].mean(axis=0))
    part = found[found["cells"] == "unperturbed"].set_index("gene")
    np.testing.assert_allclose(part.loc[list(decoder.genes), "cosine"], scores.cosine[0], atol=1e-5)
    np.testing.assert_allclose(part.loc[list(decoder.genes), "norm"], scores.norm[0], rtol=1e-4)


def test_groups_have_axes_of_their_own_and_small_ones_are_left_out(saved, tmp_path):
    options = {**AXIS, "per": "cell_type", "min_cells": 10, "n_cells": 50}
    table = score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "a", **options)
    assert set(table["group"]) == {"alpha", "beta"}
    assert table.groupby("group")["n_cells"].max().to_dict() == {"alpha": 13, "beta": 50}
    again = score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "b", **options)
    pd.testing.assert_frame_equal(table, again)
    with pytest.raises(DataError, match="no group has 300 cells"):
        score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "c", **AXIS, min_cells=300)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("storage", ["csc", "dense", "layer"])
def test_storage_and_gene_names_do_not_matter(saved, tmp_path, storage):
    cells = anndata.read_h5ad(saved / "cells.h5ad")
    expected = score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "a", **AXIS)
    cells.var["symbol"] = cells.var_names
    cells.var_names = [f"ENSMUSG{i}" for i in range(30)]
    layer = "counts" if storage == "layer" else None
    if layer:
        cells.layers["counts"], cells.X = cells.X.copy(), cells.X * 0.5
    else:
        cells.X = sparse.csc_matrix(cells.X) if storage == "csc" else cells.X.toarray()
    cells.write_h5ad(tmp_path / "other.h5ad")
    options = {**AXIS, "layer": layer, "gene_column": "symbol"}
    found = score_saved_model(saved / "scvi_model", tmp_path / "other.h5ad", tmp_path / "b", **options)
    pd.testing.assert_frame_equal(found, expected)


def project_without_compiling(z, start, end, seed):
    return z[:, :2], np.stack([start[:, :2], end[:, :2]])


def test_flows_are_drawn_with_their_numbers(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(user, "project_by_umap", project_without_compiling)  # umap compiles for half a minute
    out = tmp_path / "out"
    score_saved_model(saved / "scvi_model", saved / "cells.h5ad", out, **AXIS, flow_genes=["Ins1"], umap=True)
    assert {path.name for path in out.iterdir()} == {
        "gene_scores.csv", "flow_Ins1.svg", "flow_Ins1.png", "flow_Ins1.csv",
    }  # fmt: skip
    numbers = pd.read_csv(out / "flow_Ins1.csv")
    assert set(numbers["table"]) == {"cells", "umap"} and set(numbers["arm"]) == {"unperturbed", "perturbed"}
    cells = numbers[numbers["table"] == "cells"]
    sick = cells["arm"] == "perturbed"
    shift = cells.loc[sick, ["x", "y"]].mean() - cells.loc[~sick, ["x", "y"]].mean()
    assert (cells[["u", "v"]].to_numpy() @ shift.to_numpy()).mean() > 0  # Ins1 rises towards disease, as planted


def test_errors_name_what_is_wrong_in_one_line(saved, tmp_path):
    cases = [
        ({"column": "diseas"}, "no obs column 'diseas'; did you mean 'disease'"),
        ({"perturbed": ["diabtic"]}, "no cell has disease 'diabtic'; did you mean 'diabetic'"),
        ({"perturbed": ["healthy"]}, "cannot be both"),
        ({"batch": "cell_type"}, "batch 'beta' was not in the model's training|batch 'alpha'|batch 'delta'"),
        ({"layer": "raw"}, "no layer 'raw'"),
        ({"gene_column": "symbol"}, "no var column 'symbol'"),
        ({"per": "celltype"}, "no obs column 'celltype'; did you mean 'cell_type'"),
        ({"flow_genes": ["Ins3"]}, "'Ins3' is no output of the decoder; did you mean 'Ins1'"),
    ]
    for change, message in cases:
        with pytest.raises(DataError, match=message) as error:
            score_saved_model(saved / "scvi_model", saved / "cells.h5ad", tmp_path / "out", **{**AXIS, **change})
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no such file"):
        score_saved_model(saved / "scvi_model", tmp_path / "none.h5ad", tmp_path / "out", **AXIS)
    renamed = anndata.read_h5ad(saved / "cells.h5ad")
    renamed.obs = renamed.obs.rename(columns={"donor": "mouse"})
    renamed.write_h5ad(tmp_path / "renamed.h5ad")
    with pytest.raises(DataError, match="column 'donor', which is not in obs"):
        score_saved_model(saved / "scvi_model", tmp_path / "renamed.h5ad", tmp_path / "out", **AXIS)


def test_the_readmes_example_runs(saved, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    blocks = [textwrap.dedent(block) for block in blocks if "score_saved_model" in block]
    if not blocks:
        pytest.skip("the README has no example of it yet")
    monkeypatch.chdir(tmp_path)
    for name in ("scvi_model", "cells.h5ad"):
        (tmp_path / name).symlink_to(saved / name)
    exec(compile(blocks[0], str(README), "exec"), {})
    assert (tmp_path / "scores" / "gene_scores.csv").is_file()
