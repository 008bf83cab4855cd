from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from planted_cells import plant
from scipy import sparse

from perturbed.errors import DataError, MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, TrainingData, load_method_spec, load_model, save_model
from perturbed.models.baselines import measure_effects
from perturbed.models.embedding import (
    CellEmbedding,
    CellEmbeddingParams,
    GeneEmbedding,
    GeneEmbeddingParams,
    read_vectors,
    take_vectors,
)
from perturbed.names import CONTROL

RUN = FitRun(progress=False)
METHODS = [Path(__file__).parents[2] / "config" / "methods"]


def write_csv(path, names, values):
    pd.DataFrame(values, index=pd.Index(names, name="name")).to_csv(path)
    return path


def write_h5ad(path, names, **obsm):
    x = obsm.pop("X", None)
    anndata.AnnData(X=x, obs=pd.DataFrame(index=list(names)), obsm=obsm).write_h5ad(path)
    return path


def linear_world(n_genes=30, n_perturbed=24, n_dimensions=3, noise=0.0, seed=0):
    """Cells whose effects are exactly linear in the vectors of their perturbed genes; two genes are never perturbed."""
    rng = np.random.default_rng(seed)
    genes = [f"P{i:02d}" for i in range(n_perturbed + 2)]
    vectors = rng.normal(size=(len(genes), n_dimensions)) + 3
    map_, offset, base = rng.normal(size=(n_dimensions, n_genes)), rng.normal(size=n_genes), rng.uniform(5, 9, n_genes)
    effects = {gene: offset + vectors[i] @ map_ for i, gene in enumerate(genes)}
    labels, rows = [], []
    for name in [CONTROL, *genes[:n_perturbed], "P00+P01"]:
        mean = base + sum((effects[gene] for gene in name.split("+") if gene != CONTROL), np.zeros(n_genes))
        rows += [mean + noise * rng.normal(size=n_genes) for _ in range(4)]
        labels += [name] * 4
    data = TrainingData(
        sparse.csr_matrix(np.array(rows)), np.array(labels), np.full(len(labels), "all"), np.zeros(len(labels), bool),
        tuple(f"X{i}" for i in range(n_genes)), np.zeros(n_genes), np.zeros((n_genes, 1)),
        cells=np.array([f"cell{i}" for i in range(len(labels))], dtype=object),
    )  # fmt: skip
    return data, genes, vectors, effects, base


def with_file(data, role, path):
    return replace(data, files={role: path})


# --- reading ------------------------------------------------------------------------------------------------------


def test_csv_and_h5ad_say_the_same(tmp_path):
    names, values = ["b", "a", "c"], np.arange(6.0).reshape(3, 2)
    csv = write_csv(tmp_path / "v.csv", names, values)
    in_x = write_h5ad(tmp_path / "x.h5ad", names, X=values)
    in_sparse = write_h5ad(tmp_path / "s.h5ad", names, X=sparse.csr_matrix(values))
    in_obsm = write_h5ad(tmp_path / "o.h5ad", names, X=np.zeros((3, 9)), X_uce=values)
    for path in (csv, in_x, in_sparse, in_obsm):
        found, read = read_vectors(path)
        assert list(found) == names
        np.testing.assert_array_equal(read, values)
        np.testing.assert_array_equal(take_vectors(path, ["a", "b"], "genes"), values[[1, 0]])


def test_an_obsm_with_several_embeddings_needs_a_key(tmp_path):
    path = write_h5ad(tmp_path / "v.h5ad", ["a", "b"], X_uce=np.zeros((2, 2)), X_pca=np.ones((2, 3)))
    with pytest.raises(DataError, match="several embeddings; set `key` to one of: X_pca, X_uce"):
        read_vectors(path)
    assert read_vectors(path, "X_pca")[1].shape == (2, 3)
    with pytest.raises(DataError, match="has no 'X_state'"):
        read_vectors(path, "X_state")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene,d0\na,1\na,2\n", "1 names are there more than once, such as 'a'"),
        ("gene,d0\na,1\nb,\n", "finite numbers"),
        ("gene,d0\na,word\n", "not a readable table"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, message):
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_vectors(tmp_path / "v.csv")
    with pytest.raises(DataError, match="not a readable table"):
        read_vectors(tmp_path / "absent.h5ad")


def test_missing_names_are_counted(tmp_path):
    path = write_csv(tmp_path / "v.csv", ["a"], [[1.0]])
    with pytest.raises(MethodError, match="no vector for 2 of 3 genes, such as 'x'"):
        take_vectors(path, ["a", "x", "y"], "genes")


# --- gene embeddings ----------------------------------------------------------------------------------------------


def test_a_linear_world_is_recovered_for_unseen_genes_and_combinations(tmp_path):
    data, genes, vectors, effects, base = linear_world()
    data = with_file(
        data, "gene_embedding", write_csv(tmp_path / "v.csv", ["extra", *genes], np.vstack([9 * vectors[:1], vectors]))
    )
    method = GeneEmbedding(GeneEmbeddingParams(ridge=1e-9))
    method.fit(data, RUN)
    for name in ("P03", "P24", "P03+P25", "P04+P05+P24"):
        truth = base + sum(effects[gene] for gene in name.split("+"))
        np.testing.assert_allclose(method.predict_one(name, "all")["mean"], truth, atol=1e-3)
    np.testing.assert_allclose(method.predict_one(CONTROL, "all")["mean"], base)
    with pytest.raises(UnseenPerturbationError, match="no vector for Q"):
        method.predict_one("P03+Q", "all")


def test_ridge_equals_its_formula_and_leave_one_out_shrinks_noise(tmp_path):
    data, genes, vectors, *_ = linear_world(noise=1.0)
    path = write_csv(tmp_path / "v.csv", genes, vectors)
    data = with_file(data, "gene_embedding", path)
    method = GeneEmbedding(GeneEmbeddingParams(ridge=2.0))
    method.fit(data, RUN)
    seen = vectors[:24]
    centred = (vectors - seen.mean(0)) / np.sqrt(np.square(seen - seen.mean(0)).sum(1).mean())
    effects = measure_effects(data)
    p = np.stack([sum(centred[genes.index(g)] for g in name.split("+")) for name in effects.perturbations])
    n = np.array([len(name.split("+")) for name in effects.perturbations])
    # slow and obvious: minimise over (b, W) jointly, b unpenalised
    design = np.column_stack([n, p])
    penalty = np.diag([0.0, *[2.0] * 3])
    b, *w = np.linalg.solve(design.T @ design + penalty, design.T @ effects.effect)
    expected = 2 * b + (centred[3] + centred[25]) @ np.stack(w)
    np.testing.assert_allclose(method.predict_effect("P03+P25"), expected, atol=1e-4)
    rng = np.random.default_rng(3)
    null = with_file(data, "gene_embedding", write_csv(tmp_path / "n.csv", genes, rng.normal(size=vectors.shape)))
    chosen = GeneEmbedding()
    chosen.fit(null, RUN)
    b_only = np.linalg.norm(chosen._head["offset"])
    assert np.linalg.norm(chosen.predict_effect("P24") - chosen._head["offset"]) < 0.3 * b_only


def test_knn_averages_the_nearest(tmp_path):
    data, genes, vectors, *_ = linear_world()
    vectors[24] = vectors[7] + 1e-6
    data = with_file(data, "gene_embedding", write_csv(tmp_path / "v.csv", genes, vectors))
    method = GeneEmbedding(GeneEmbeddingParams(head="knn", n_neighbours=1))
    method.fit(data, RUN)
    np.testing.assert_allclose(method.predict_effect("P24"), method.predict_effect("P07"))
    effects = measure_effects(data)
    np.testing.assert_allclose(method.predict_effect("P07"), effects.effect[effects.perturbations.index("P07")])
    everything = GeneEmbedding(GeneEmbeddingParams(head="knn", n_neighbours=999))
    everything.fit(data, RUN)
    np.testing.assert_allclose(everything.predict_effect("P24"), effects.effect.mean(0))


def test_files_that_lack_perturbed_genes_or_are_not_named_are_refused(tmp_path):
    data, genes, vectors, *_ = linear_world()
    with pytest.raises(MethodError, match=r"needs a gene_embedding file.*files\.gene_embedding"):
        GeneEmbedding().fit(data, RUN)
    short = write_csv(tmp_path / "v.csv", genes[2:], vectors[2:])
    with pytest.raises(MethodError, match="no vector for 2 of 24 perturbed genes, such as 'P00'"):
        GeneEmbedding().fit(with_file(data, "gene_embedding", short), RUN)


# --- cell embeddings ----------------------------------------------------------------------------------------------


def test_an_embedding_that_is_expression_gives_the_additive_model(tmp_path):
    data, *_ = linear_world(noise=0.1)
    order = np.random.default_rng(0).permutation(len(data.cells))
    vectors = data.X.toarray()[order]
    path = write_h5ad(
        tmp_path / "c.h5ad", [*data.cells[order], "test cell"], X_uce=np.vstack([vectors, vectors[:1] + 99])
    )
    method = CellEmbedding(CellEmbeddingParams(n_components=30, ridge=0.0))
    method.fit(with_file(data, "cell_embedding", path), RUN)
    effects = measure_effects(data)
    rows = [effects.perturbations.index(name) for name in ("P02", "P03")]
    np.testing.assert_allclose(method.predict_effect("P02+P03"), effects.effect[rows].sum(0), atol=1e-6)
    np.testing.assert_allclose(method.predict_effect("P02"), effects.effect[rows[0]], atol=1e-6)
    both = effects.effect[effects.perturbations.index("P00+P01")]
    np.testing.assert_allclose(method.predict_effect("P00+P01"), both, atol=1e-6)  # seen as a whole
    with pytest.raises(UnseenPerturbationError, match="never saw P24"):
        method.predict_effect("P02+P24")


def test_an_embedding_of_nothing_predicts_nothing(tmp_path):
    data = plant(n_single=6, n_cells=40, n_control=200).data
    data = replace(data, cells=np.array([f"c{i}" for i in range(len(data.perturbation))], dtype=object))
    rng = np.random.default_rng(5)
    path = write_csv(tmp_path / "c.csv", data.cells, rng.normal(size=(len(data.cells), 8)))
    method = CellEmbedding(CellEmbeddingParams(n_components=8))
    method.fit(with_file(data, "cell_embedding", path), RUN)
    effects = measure_effects(data)
    for name in effects.perturbations:
        size = np.linalg.norm(effects.effect[effects.perturbations.index(name)])
        assert np.linalg.norm(method.predict_effect(name)) < 0.35 * size


def test_missing_cells_are_counted(tmp_path):
    data, *_ = linear_world()
    path = write_csv(tmp_path / "c.csv", data.cells[5:], np.ones((len(data.cells) - 5, 2)))
    with pytest.raises(MethodError, match=f"no vector for 5 of {len(data.cells)} training cells, such as 'cell0'"):
        CellEmbedding().fit(with_file(data, "cell_embedding", path), RUN)
    nameless = replace(data, cells=np.array([], dtype=object), files={"cell_embedding": path})
    with pytest.raises(MethodError, match="without names"):
        CellEmbedding().fit(nameless, RUN)


def test_cells_are_represented_by_their_own_vectors_also_after_loading(tmp_path):
    data, *_ = linear_world(noise=0.1)
    order = np.random.default_rng(2).permutation(len(data.cells))
    vectors = np.random.default_rng(3).normal(size=(len(order) + 1, 4))
    path = write_csv(tmp_path / "c.csv", ["a test cell", *data.cells[order]], vectors)
    method = CellEmbedding(CellEmbeddingParams(n_components=2))
    method.fit(with_file(data, "cell_embedding", path), RUN)
    save_model(tmp_path / "model", method, load_method_spec("embedding_cells", METHODS))
    loaded = load_model(tmp_path / "model")
    wanted = ["a test cell", data.cells[order[2]]]
    for one in (method, loaded):
        np.testing.assert_allclose(one.represent_cells(data.X[:2], wanted), vectors[[0, 3]], rtol=1e-12)
    with pytest.raises(MethodError, match="no vector for 1 of 1 cells, such as 'stranger'"):
        loaded.represent_cells(data.X[:1], ["stranger"])
    path.unlink()
    with pytest.raises(DataError, match="not a readable table of vectors"):
        loaded.represent_cells(data.X[:2], wanted)
