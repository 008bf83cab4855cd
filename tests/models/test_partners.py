from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted_cells import plant
from scipy import sparse

from perturbed.errors import MethodError
from perturbed.models.cells import PairedCells, batch_by_blocks
from perturbed.models.partners import (
    G2M_GENES,
    N_NEAREST,
    S_GENES,
    background_coordinates,
    cycle_scores,
    nearest_controls,
)


def test_nearest_controls_are_those_of_a_full_sort():
    rng = np.random.default_rng(0)
    coordinates = rng.normal(size=(60, 4))
    pool, rows = np.arange(0, 60, 2), np.array([1, 3, 4, 50])
    found = nearest_controls(coordinates, rows, pool)
    for row, near in zip(rows, found):
        order = sorted((j for j in pool if j != row), key=lambda j: np.linalg.norm(coordinates[j] - coordinates[row]))
        assert list(near) == order[:N_NEAREST]


@pytest.mark.parametrize("n_pool", [1, 2, 5])
def test_small_pools_give_what_they_have(n_pool):
    coordinates = np.random.default_rng(0).normal(size=(9, 2))
    pool = np.arange(n_pool)
    found = nearest_controls(coordinates, np.arange(9), pool)
    assert found.shape == (9, max(1, n_pool - 1))
    if n_pool > 1:
        assert all(row not in near for row, near in zip(range(9), found))


def test_what_a_condition_moves_does_not_choose_partners():
    data = plant(n_single=4).data
    moved = data.X.toarray()
    moved[data.perturbation == "G02"] += 5
    before = background_coordinates(data, "matched_pca")
    after = background_coordinates(replace(data, X=sparse.csr_matrix(moved)), "matched_pca")
    rows = data.perturbation == "G02"
    # where all genes are expressed anyway the shift leaves the pattern of zeros alone, hence compare components only
    np.testing.assert_allclose(after[rows, 1:], before[rows, 1:], atol=1e-4)


@pytest.mark.parametrize("on", ["matched_pca", "matched_cycle"])
def test_matched_partners_are_closer_than_random_ones_and_follow_the_seed(on):
    data = plant(contexts=("a", "b"), n_single=4, n_cells=40, n_control=60, val_fraction=0.2, counts=True).data
    names = [*S_GENES.split()[:6], *G2M_GENES.split()[:6], *data.genes[12:]]
    data = replace(data, genes=tuple(names), loadings=np.linalg.qr(np.random.default_rng(0).normal(size=(50, 5)))[0])
    perturbed = data.seen_genes
    rows = np.tile(np.flatnonzero(data.perturbation != "control"), 5)
    coordinates = background_coordinates(data, on)
    distance = {}
    for partners in (on, "random"):
        cells = PairedCells(data, perturbed, ("a", "b"), partners=partners)
        found = cells.draw_partners(rows, np.random.default_rng(1))
        np.testing.assert_array_equal(found, cells.draw_partners(rows, np.random.default_rng(1)))
        assert (data.perturbation[found] == "control").all()
        assert not data.is_val[found].any()
        np.testing.assert_array_equal(data.context[found], data.context[rows])
        distance[partners] = np.linalg.norm(coordinates[found] - coordinates[rows], axis=1).mean()
    assert distance[on] < 0.75 * distance["random"]
    assert len(np.unique(found[:: len(rows) // 5])) > 1


def test_cycle_scores_are_means_over_the_phase_and_need_its_genes():
    genes = [*(gene.lower() for gene in S_GENES.split()[:7]), *G2M_GENES.split()[:5], "A", "B"]
    x = np.random.default_rng(0).random((4, len(genes)))
    found = cycle_scores(sparse.csr_matrix(x), genes)
    np.testing.assert_allclose(found[:, 0], x[:, :7].mean(1) - x.mean(1))
    np.testing.assert_allclose(found[:, 1], x[:, 7:12].mean(1) - x.mean(1))
    with pytest.raises(MethodError, match="matched_cycle needs 5 G2/M"):
        cycle_scores(sparse.csr_matrix(x[:, :11]), genes[:11])


def test_blocks_hold_one_label_and_every_row_once():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 100)
    rows = np.sort(rng.permutation(100)[:77])
    batches = list(batch_by_blocks(labels, 5, rows, 20, np.random.default_rng(1)))
    assert [len(batch) for batch in batches] == [20, 20, 20, 17]
    order = np.concatenate(batches)
    assert sorted(order) == list(rows)
    runs = 1 + np.count_nonzero(np.diff(labels[order]))
    assert runs <= sum(-(-int((labels[rows] == label).sum()) // 5) for label in range(4))
    again = np.concatenate(list(batch_by_blocks(labels, 5, rows, 20, np.random.default_rng(1))))
    np.testing.assert_array_equal(order, again)
    assert not np.array_equal(order, np.concatenate(list(batch_by_blocks(labels, 5, rows, 20, rng))))


def test_matched_cycle_partners_are_in_the_same_phase():
    data = plant(n_single=3, n_cells=40, n_control=80).data
    phase = np.random.default_rng(2).integers(0, 3, len(data.perturbation))
    x = data.X.toarray()
    for i in range(2):  # the third phase expresses neither
        x[:, 10 + 8 * i : 18 + 8 * i] += 4 * (phase == i)[:, None]
    x[data.perturbation == "G01", 10:18] += 3  # what moves a whole condition is no phase
    names = [*data.genes[:10], *S_GENES.split()[:8], *G2M_GENES.split()[:8], *data.genes[26:]]
    data = replace(data, X=sparse.csr_matrix(x), genes=tuple(names))
    rows = np.flatnonzero(data.perturbation != "control")
    cells = PairedCells(data, data.seen_genes, ("all",), partners="matched_cycle")
    for draw in range(3):
        partners = cells.draw_partners(rows, np.random.default_rng(draw))
        assert (phase[partners] == phase[rows]).mean() > 0.9  # of random ones a third


def test_partners_are_control_cells_of_the_same_context_drawn_over_all_of_them():
    data = plant(contexts=("a", "b"), n_single=3, n_cells=20, n_control=6, val_fraction=0.2).data
    cells = PairedCells(data, data.seen_genes, ("a", "b"))
    rows = np.tile(np.arange(len(data.perturbation)), 20)
    partners = cells.draw_partners(rows, np.random.default_rng(0))
    assert (data.perturbation[partners] == "control").all()
    np.testing.assert_array_equal(data.context[partners], data.context[rows])
    assert not data.is_val[partners].any()
    assert set(partners) == set(np.flatnonzero((data.perturbation == "control") & ~data.is_val))


def test_a_batch_holds_the_cells_their_partners_and_their_conditions():
    data = plant(n_single=3, combos=("G00+G02",), n_cells=4, n_control=5, counts=True).data
    cells = PairedCells(data, data.seen_genes, ("all",), counts=True)
    rows = np.array([0, 7, 19, 20, 10])
    partners = cells.draw_partners(rows, np.random.default_rng(4))
    batch = cells.batch(rows, np.random.default_rng(4))
    np.testing.assert_array_equal(batch.x.numpy(), data.X[np.concatenate([rows, partners])].toarray())
    for u, row in zip(batch.conditions[batch.condition].numpy(), rows):
        named = {gene for gene, hot in zip(data.seen_genes, u) if hot}
        assert "+".join(sorted(named)) == data.perturbation[row].replace("control", "")
    assert len(batch.conditions) == len(set(data.perturbation[rows]))
    np.testing.assert_allclose(cells.normalising_factor(rows), 1e3 / data.library[rows], rtol=1e-5)
