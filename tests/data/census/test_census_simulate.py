"""Simulated islets: what is planted is in the cells, what confounds is there, and the same seed gives the same."""

from __future__ import annotations

import numpy as np
import pytest
from census_world import PARAMS, small_islets

from perturbed.data.census.simulate import DATASETS, DISEASE, NORMAL, simulate_islets
from perturbed.data.census.spec import IsletParams


@pytest.fixture(scope="module")
def large():
    return simulate_islets(IsletParams(n_cells=2400, n_genes=400), 0)


def test_the_same_seed_gives_the_same(islets):
    again, other = small_islets(), small_islets(4)
    for table in ("obs", "var", "truth"):
        assert getattr(islets, table).equals(getattr(again, table))
    np.testing.assert_array_equal(islets.counts.toarray(), again.counts.toarray())
    assert islets.gene_sets == again.gene_sets
    assert (islets.counts != other.counts).nnz > 0


def test_the_design(large):
    obs = large.obs
    donors = obs[obs["is_primary_data"]].groupby("disease", observed=True)["donor_id"].nunique()
    assert set(donors.index) == {NORMAL, DISEASE} and (donors >= 6).all()
    assert obs["dataset_id"].nunique() == 3 and obs["assay"].nunique() == 2 and obs["cell_type"].nunique() == 5
    assert (obs["nnz"] < 150).mean() > 0.01  # poor cells
    share = obs.groupby("disease", observed=True)["cell_type"].value_counts(normalize=True)
    assert share[NORMAL, "type B pancreatic cell"] - share[DISEASE, "type B pancreatic cell"] > 0.08
    assert obs["soma_joinid"].tolist() == list(range(len(obs)))
    np.testing.assert_array_equal(obs["nnz"], (large.counts.toarray() > 0).sum(axis=1))
    np.testing.assert_allclose(obs["raw_variance_nnz"][0], np.var(large.counts[0].data))


def test_copies_are_not_primary_and_equal_their_originals(large):
    obs = large.obs
    copies = obs[~obs["is_primary_data"]]
    assert len(copies) == round(0.06 * 2400) and set(copies["dataset_id"]) == {DATASETS["copies"]}
    originals = {tuple(row) for row in large.counts[: len(obs) - len(copies)].toarray()}
    assert all(tuple(row) in originals for row in large.counts[len(obs) - len(copies) :].toarray())


def test_planted_genes_change_as_planted_and_others_do_not(large):
    """Slow reference: log ratio of the arms' mean shares in β cells of the matched donors."""
    obs, x = large.obs, large.counts.toarray().astype(float)
    share = x / x.sum(axis=1, keepdims=True)
    beta = (obs["cell_type"] == "type B pancreatic cell") & obs["is_primary_data"] & (obs["nnz"] > 150)
    donor = obs["donor_id"].astype(str)
    sick = share[beta & donor.str.contains("mSTZ|Lepr")].mean(axis=0)
    healthy = share[beta & donor.str.contains("G1_|chow")].mean(axis=0)
    shown = healthy > 2e-4
    ratio, truth = np.log(sick[shown] / healthy[shown]), large.truth[shown]
    planted = truth["direction"] != "none"
    assert np.corrcoef(ratio[planted], truth["log_difference_beta"][planted])[0, 1] > 0.85
    others = ratio[~planted] - np.median(ratio[~planted])
    assert np.std(others) < 0.25
    assert planted.sum() > 40 and set(truth["direction"]) == {"up", "down", "none"}


def test_the_programme_varies_within_groups_and_overlaps(large):
    beta = (large.obs["cell_type"] == "type B pancreatic cell").to_numpy()
    sick = (large.obs["disease"] == DISEASE).to_numpy()
    healthy, ill = large.programme[beta & ~sick], large.programme[beta & sick]
    assert ill.mean() - healthy.mean() > 0.5
    assert healthy.std() > 0.5 and (healthy > ill.mean()).mean() > 0.02


def test_gene_sets(large):
    effect = dict(zip(large.truth["symbol"], large.truth["effect"]))
    kinds = [kind for _, kind, _ in large.gene_sets]
    assert kinds.count("decoy") >= 150 and kinds.count("planted") >= 4 and kinds.count("trap") >= 3
    for name, kind, genes in large.gene_sets:
        assert len(set(genes)) == len(genes) >= 5 and set(genes) <= set(effect), name
        changed = np.mean([effect[gene] != 0 for gene in genes])
        limits = {"planted": (0.7, 1.0), "trap": (0.0, 0.0), "decoy": (0.0, 0.65)}[kind]
        assert limits[0] <= changed <= limits[1], (name, changed)


@pytest.mark.parametrize(("n_up", "n_down"), [(12, 12), (45, 60)])
def test_as_many_genes_are_planted_as_asked_for(n_up, n_down):
    truth = simulate_islets(PARAMS.model_copy(update={"n_up": n_up, "n_down": n_down}), 1).truth
    assert truth["direction"].value_counts()[["up", "down"]].tolist() == [n_up, n_down]
    assert {"Ins1", "Ins2"} <= set(truth.loc[truth["direction"] == "down", "symbol"]) or n_down < 20
