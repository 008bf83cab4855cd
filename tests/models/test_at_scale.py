"""PerturbedVAE on cells that stay on disk, and in two processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_world import make_counts, make_fold, make_prepared
from perturbed.data import streaming
from perturbed.errors import MethodError
from perturbed.models.fitting import fit_model, predict_split

TINY = 1e-9
PARAMS = {"n_nu": 3, "n_iota": 4, "n_hidden": 8, "epochs": 3, "batch_size": 16, "lr": 0.01, "warm_up_epochs": 0,
          "n_samples": 0, "edge_penalty": 0.01}  # fmt: skip
NB = {"likelihood": "nb", "reconstruction_reduction": "sum"}


@pytest.fixture
def fold(tmp_path):
    prepared = make_prepared(tmp_path, make_counts(n_cells=20, n_control=40))
    return (prepared, *make_fold(tmp_path, prepared))


def fit(fold, out: Path, params=None, **how) -> tuple[pd.DataFrame, bytes]:
    spec = {"title": "P", "implementation": "perturbed.models.perturbedvae:PerturbedVAE", "params": {**PARAMS, **(params or {})}}  # fmt: skip  # noqa: E501
    history = out.with_suffix(".csv")
    fit_model(spec, *fold, out, seed=1, device="cpu", history=history, **how)
    return pd.read_csv(history), (out / "state.pt").read_bytes()


@pytest.mark.parametrize("params", [{}, NB])
def test_the_loss_in_two_processes_is_that_of_one(fold, tmp_path, params):
    alone, _ = fit(fold, tmp_path / "alone", params)
    shared, _ = fit(fold, tmp_path / "shared", params, processes=2)
    keys = ["epoch", "term"]
    both = alone.merge(shared, on=keys, suffixes=("", "_shared"), validate="one_to_one")
    assert len(both) == len(alone) == len(shared)
    both = both[~both["term"].str.contains("active_iota")]  # counted in each share
    np.testing.assert_allclose(both["value_shared"], both["value"], rtol=1e-5, atol=1e-7)
    assert not list(tmp_path.glob("*.part*"))


def test_two_processes_of_cells_on_disk(fold, tmp_path, monkeypatch):
    alone, _ = fit(fold, tmp_path / "alone", memory_gb=TINY)
    shared, _ = fit(fold, tmp_path / "shared", memory_gb=TINY, processes=2)
    mine = ~alone["term"].str.contains("active_iota")
    np.testing.assert_allclose(shared["value"][mine], alone["value"][mine], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("params", [{}, NB])
def test_cells_on_disk_train_as_those_in_memory_in_the_same_order(fold, tmp_path, monkeypatch, params):
    """With the order of the windows the loss is that of memory to rounding (of the starting mean); so only the order differs."""  # noqa: E501
    streamed, state = fit(fold, tmp_path / "streamed", params, memory_gb=TINY)
    again, same = fit(fold, tmp_path / "again", params, memory_gb=TINY)
    assert state == same and streamed.equals(again)
    in_memory, _ = fit(fold, tmp_path / "memory", params)
    assert not np.allclose(in_memory["value"], streamed["value"], rtol=1e-6)  # another order
    monkeypatch.setattr("perturbed.training._permuted", window_order())
    ordered, _ = fit(fold, tmp_path / "ordered", params)
    np.testing.assert_allclose(streamed["value"], ordered["value"], rtol=1e-4, atol=1e-6)


def window_order():
    def batches(rows, batch_size, rng):
        order, ends = streaming.draw_windows(rows, batch_size, rng)
        for start, end in zip([0, *ends], ends):
            for first in range(start, end, batch_size):
                yield order[first : min(first + batch_size, end)]

    return batches


def test_a_streamed_model_predicts(fold, tmp_path):
    fit(fold, tmp_path / "model", memory_gb=TINY)
    predict_split(tmp_path / "model", fold[0], fold[1], tmp_path / "prediction.h5ad", method="p")
    assert (tmp_path / "prediction.h5ad").is_file()


def test_what_cannot_be_shared_says_so(fold, tmp_path):
    with pytest.raises(MethodError, match="trains in one process, 2 were asked for"):
        fit(fold, tmp_path / "model", {"mmd_weight": 1.0}, processes=2)
    spec = {"title": "Additive", "implementation": "perturbed.models.baselines:Additive", "params": {}}
    with pytest.raises(MethodError, match="Additive: trains in one process"):
        fit_model(spec, *fold, tmp_path / "model", processes=2)
    assert not (tmp_path / "model").exists()


def test_the_model_says_nothing_of_processes(fold, tmp_path):
    fit(fold, tmp_path / "one")
    fit(fold, tmp_path / "two", processes=2)
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one == two
