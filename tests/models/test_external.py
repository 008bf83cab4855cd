from __future__ import annotations

import numpy as np
import pytest
from planted_cells import plant

from perturbed.data.contracts import Prediction, write_prediction
from perturbed.errors import DataError, MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun
from perturbed.models.external import External, ExternalParams


@pytest.fixture(scope="module")
def data():
    return plant(n_single=3, n_cells=5, n_control=6).data


def write(path, data, *, genes=None, names=("G00", "G00+G01"), contexts=None, variance=False):
    genes = list(data.genes) if genes is None else genes
    mean = np.arange(len(names) * len(genes), dtype=np.float32).reshape(len(names), -1)
    contexts = contexts or ("all",) * len(names)
    layer = mean / 10 if variance else None
    write_prediction(path, Prediction(mean, tuple(genes), tuple(names), tuple(contexts), variance=layer))
    return mean


def fitted(path, data) -> External:
    method = External(ExternalParams(path=str(path)))
    method.fit(data, FitRun())
    return method


def test_rows_come_back_by_name(tmp_path, data):
    mean = write(tmp_path / "mine.h5ad", data, variance=True)
    method = fitted(tmp_path / "mine.h5ad", data)
    prediction = method.predict([("G00+G01", "all"), ("G00", "all")])
    np.testing.assert_array_equal(prediction.mean, mean[[1, 0]])
    np.testing.assert_allclose(prediction.variance, mean[[1, 0]] / 10)


def test_reordered_and_further_genes_are_matched_by_name(tmp_path, data):
    genes = ["EXTRA", *reversed(data.genes)]
    mean = write(tmp_path / "mine.h5ad", data, genes=genes)
    found = fitted(tmp_path / "mine.h5ad", data).predict_one("G00", "all")["mean"]
    expected = dict(zip(genes, mean[0]))
    assert dict(zip(data.genes, found)) == {gene: expected[gene] for gene in data.genes}


def test_a_missing_gene_is_named(tmp_path, data):
    write(tmp_path / "mine.h5ad", data, genes=[gene for gene in data.genes if gene not in ("G07", "G31")])
    with pytest.raises(MethodError, match=r"mine\.h5ad: gene 'G07' is missing \(and 1 more of 50\)"):
        fitted(tmp_path / "mine.h5ad", data)


def test_absent_perturbations_are_refused(tmp_path, data):
    write(tmp_path / "mine.h5ad", data)
    method = fitted(tmp_path / "mine.h5ad", data)
    with pytest.raises(UnseenPerturbationError, match="G02"):
        method.predict_one("G02", "all")
    assert set(method.predict([("G00", "all"), ("G02", "all")]).refused) == {"G02"}


def test_contexts_are_told_apart_and_a_file_without_them_answers_for_all(tmp_path, data):
    mean = write(tmp_path / "two.h5ad", data, names=("G00", "G00"), contexts=("a", "b"))
    method = fitted(tmp_path / "two.h5ad", data)
    np.testing.assert_array_equal(method.predict_one("G00", "b")["mean"], mean[1])
    with pytest.raises(UnseenPerturbationError):
        method.predict_one("G00", "c")
    mean = write(tmp_path / "one.h5ad", data)
    np.testing.assert_array_equal(fitted(tmp_path / "one.h5ad", data).predict_one("G00", "c")["mean"], mean[0])


def test_other_spellings_of_a_combination_are_understood_but_not_twice(tmp_path, data):
    mean = write(tmp_path / "mine.h5ad", data, names=("G00", "G01+G00"))
    np.testing.assert_array_equal(fitted(tmp_path / "mine.h5ad", data).predict_one("G00+G01", "all")["mean"], mean[1])
    write(tmp_path / "twice.h5ad", data, names=("G00+G01", "G01+G00"))
    with pytest.raises(MethodError, match="twice"):
        fitted(tmp_path / "twice.h5ad", data)


def test_no_path_and_no_file_are_one_line(tmp_path, data):
    with pytest.raises(MethodError, match="`path`"):
        External()
    with pytest.raises(DataError, match="no such file"):
        fitted(tmp_path / "absent.h5ad", data)
