"""The simulators' files, cards and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from perturbed.config import read_yaml
from perturbed.data.cards import Card, SimulationSource, load_card
from perturbed.data.contracts import read_h5ad
from perturbed.data.simulate import build_generator, simulate, write_simulation
from perturbed.data.simulators.params import EpistasisParams, ScmParams
from perturbed.errors import ConfigError
from perturbed.files import hash_file
from perturbed.names import genes_of
from simulated_world import GENERATORS, SMALL, log_normalised, simulated, source, well_sampled

ROOT = Path(__file__).parents[2]


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", GENERATORS)
def test_raw_holds_sparse_integer_counts(generator: str) -> None:
    raw, truth = simulated(generator)
    assert isinstance(raw.X, sparse.csr_matrix)
    assert raw.X.dtype == np.float32
    assert (raw.X.data == np.round(raw.X.data)).all()
    assert raw.X.data.min() >= 1
    assert raw.obs_names.is_unique
    assert list(raw.var_names) == list(truth.var_names)
    assert raw.var["gene_id"].is_unique
    sizes = raw.obs["perturbation"].value_counts()
    assert sizes["control"] == SMALL["n_control"]
    assert (sizes.drop("control") == SMALL["n_cells_per_perturbation"]).all()
    assert set(sizes.index) == set(truth.obs_names)
    for name in sizes.index.drop("control"):
        assert list(genes_of(name)) == sorted(set(genes_of(name)))
        assert all(gene in raw.var_names and gene in sizes.index for gene in genes_of(name))


@pytest.mark.parametrize("generator", GENERATORS)
def test_truth_is_the_mean_and_variance_of_the_cells(generator: str) -> None:
    raw, truth = well_sampled(generator)
    values = log_normalised(raw)
    assert set(truth.obs["context"]) == {"all"}
    for row, name in enumerate(truth.obs_names):
        cells = values[(raw.obs["perturbation"] == name).to_numpy()]
        variance = truth.layers["variance"][row]
        error = np.sqrt(variance * (1 / len(cells) + 1 / truth.obs["n_cells"].iloc[row]))
        z = (cells.mean(axis=0) - truth.X[row]) / error
        limit = 5.0 if len(cells) > 1000 else 4.5
        assert np.abs(z).max() < limit, name
        assert 0.5 < np.sqrt((z**2).mean()) < 1.6, name
        if len(cells) > 1000:
            np.testing.assert_allclose(cells.var(axis=0, ddof=1), variance, rtol=0.25)


@pytest.mark.parametrize("generator", GENERATORS)
def test_truth_does_not_depend_on_the_cells(generator: str) -> None:
    _, truth = simulated(generator)
    _, other = simulate(source(generator, n_cells_per_perturbation=7, n_control=11), "small")
    np.testing.assert_array_equal(truth.X, other.X)
    for layer in ("rate", "log_rate", "variance"):
        np.testing.assert_array_equal(truth.layers[layer], other.layers[layer])
    _, fewer = simulate(source(generator, n_doubles=2), "small")
    singles = [name for name in truth.obs_names if "+" not in name]
    np.testing.assert_array_equal(truth[singles].X, fewer[singles].X)


@pytest.mark.parametrize("generator", GENERATORS)
def test_truth_is_no_average_of_the_written_cells(generator: str) -> None:
    """Otherwise the noise-free reference would know the test cells' noise."""
    raw, truth = simulated(generator)
    values = log_normalised(raw)
    name = truth.obs_names[1]
    own = values[(raw.obs["perturbation"] == name).to_numpy()].mean(axis=0) - truth[name].X.ravel()
    expected = np.sqrt((truth[name].layers["variance"] * (1 / 20 + 1 / 600)).mean())
    assert 0.5 * expected < np.sqrt((own**2).mean()) < 2 * expected


@pytest.mark.parametrize("generator", GENERATORS)
def test_same_seed_gives_the_same_bytes(generator: str, tmp_path: Path) -> None:
    paths = [[tmp_path / f"{what}{i}.h5ad" for what in ("raw", "truth")] for i in range(2)]
    for raw_path, truth_path in paths:
        write_simulation(source(generator), "small", raw_path, truth_path)
    for first, second in zip(*paths):
        assert hash_file(first) == hash_file(second)
    back = read_h5ad(paths[0][0])
    raw, truth = simulated(generator)
    np.testing.assert_array_equal(back.X.toarray(), raw.X.toarray())
    assert back.uns["provenance"] == raw.uns["provenance"]
    read = read_h5ad(paths[0][1])
    np.testing.assert_array_equal(read.X, truth.X)
    for key in truth.obsm:
        np.testing.assert_array_equal(read.obsm[key], truth.obsm[key])


@pytest.mark.parametrize("generator", GENERATORS)
def test_another_seed_gives_another_screen(generator: str) -> None:
    raw, truth = simulated(generator)
    other_raw, other_truth = simulate(source(generator, seed=1), "small")
    assert (raw.X != other_raw.X).nnz > 0
    assert not np.array_equal(truth.varm["loadings_nu"], other_truth.varm["loadings_nu"])
    assert list(truth.obs_names) != list(other_truth.obs_names)


def test_provenance_is_json_with_every_parameter() -> None:
    raw, truth = simulated("epistasis")
    found = json.loads(raw.uns["provenance"])
    assert raw.uns["provenance"] == truth.uns["provenance"]
    assert found["seed"] == 0
    assert set(found["params"]) == set(EpistasisParams.model_fields)
    assert found["params"]["depth"] == 1000.0


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generator", "params", "words"),
    [
        ("scm", {"n_gene": 50}, ["source.params", "n_gene", "n_genes"]),
        ("scm", {"n_doubles": 16}, ["n_doubles", "pairs", "15"]),
        ("scm", {"n_perturbed_genes": 61}, ["n_perturbed_genes", "n_genes", "60"]),
        ("scm", {"gene_set_size": 61}, ["gene_set_size", "60"]),
        ("scm", {"n_targets": 5}, ["n_targets", "d_nu - 1"]),
        ("scm", {"depth": -1}, ["depth", "greater"]),
        ("scm", {"effect_size": float("nan")}, ["effect_size"]),
        ("scm", {"expression_sd": float("inf")}, ["expression_sd", "finite"]),
        ("scm", {"n_control": 0}, ["n_control"]),
        ("scm", {"n_genes": "many"}, ["n_genes", "integer"]),
        ("scm", {"interaction": 1.0}, ["interaction"]),
        ("epistasis", {"edge_density": 0.1}, ["edge_density"]),
        ("epistasis", {"dropout": 0.6}, ["dropout"]),
        ("epistasis", {"idiosyncratic_genes": 61}, ["idiosyncratic_genes"]),
    ],
)
def test_wrong_parameters_are_one_line_with_the_key(generator: str, params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(source(generator, **params), "mine")
    message = str(caught.value)
    assert "\n" not in message
    assert "dataset mine" in message
    for word in words:
        assert word in message


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"source\.seed"):
        simulate(source("scm", seed=-1), "mine")


def test_smallest_screen_works() -> None:
    small = {"n_perturbed_genes": 2, "n_doubles": 1, "d_nu": 2, "n_targets": 1, "n_states": 1, "d_state": 1}
    for generator in GENERATORS:
        raw, truth = simulate(source(generator, n_control=1, n_cells_per_perturbation=1, **small), "tiny")
        assert raw.shape == (4, 60)
        assert len(truth) == 4
        assert np.isfinite(truth.X).all()


# --- the cards ----------------------------------------------------------------------------------------------------

CARDS = {"simulation": ScmParams, "simulation_epistasis": EpistasisParams}


def card(name: str) -> Card:
    return load_card(name, [ROOT / "config" / "datasets"])


@pytest.mark.parametrize("name", CARDS)
def test_card_and_page_name_every_parameter(name: str) -> None:
    page = (ROOT / "docs" / "simulation.md").read_text()
    written = read_yaml(ROOT / "config" / "datasets" / f"{name}.yaml")["source"]["params"]
    assert written == CARDS[name]().model_dump()
    assert [key for key in CARDS[name].model_fields if f"`{key}`" not in page] == []


@pytest.mark.parametrize("name", [*CARDS, *(f"{name}_deep" for name in CARDS)])
def test_card_expects_what_it_plants(name: str) -> None:
    found = card(name)
    assert isinstance(found.source, SimulationSource)
    world = build_generator(found.source, name).world
    sizes = [len(key) for key in world.conditions.values()]
    p, expect = world.params, found.expect
    assert (expect.n_vars, expect.n_groups, expect.n_control) == (p.n_genes, len(sizes), p.n_control)
    assert (expect.n_single, expect.n_double) == (sizes.count(1), sizes.count(2))
    assert expect.n_obs == p.n_control + p.n_cells_per_perturbation * (len(sizes) - 1)
    if name.endswith("_deep"):  # more cells of the same world
        shallow = build_generator(card(name.removesuffix("_deep")).source, name).world
        np.testing.assert_array_equal(world.loadings_nu, shallow.loadings_nu)


@pytest.mark.parametrize(("name", "ceiling"), [("simulation", 0.98), ("simulation_epistasis", 0.94)])
def test_card_is_a_fair_task(name: str, ceiling: float) -> None:
    """Oracle > additive > mean effect, and additivity itself falls short, most outside the model class."""
    found = card(name).source
    assert isinstance(found, SimulationSource)
    params = {**found.params, "n_truth_cells": 400}
    raw, truth = simulate(found.model_copy(update={"params": params}), name)
    values, labels = log_normalised(raw), raw.obs["perturbation"].to_numpy()
    seen = {label: values[labels == label].mean(axis=0) for label in truth.obs_names}
    planted = dict(zip(truth.obs_names, truth.X.astype(float)))
    shared = np.mean([seen[name] for name in seen if name != "control" and "+" not in name], axis=0)
    doubles = [name for name in seen if "+" in name]

    def additive(rows: dict[str, np.ndarray], double: str) -> np.ndarray:
        return sum(rows[gene] for gene in genes_of(double)) - rows["control"]

    def score(predict: Any, target: dict[str, np.ndarray], base: np.ndarray) -> float:
        return float(np.mean([np.corrcoef(target[d] - base, predict(d) - base)[0, 1] for d in doubles]))

    control = seen["control"]
    mean_effect = score(lambda d: shared, seen, control)
    sums = score(lambda d: additive(seen, d), seen, control)
    oracle = score(lambda d: planted[d], seen, control)
    assert 0.4 < mean_effect < 0.62
    assert mean_effect + 0.1 < sums < oracle - 0.05
    assert score(lambda d: additive(planted, d), planted, planted["control"]) < ceiling
