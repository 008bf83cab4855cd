"""The discrepancy-VAE against plain formulas, its schedules, its batches and a planted shift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_cells import only, plant
from scipy import sparse

from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, TrainingData
from perturbed.models.cells import Batch
from perturbed.models.discrepancy_vae import DiscrepancyVAE, DiscrepancyVAEParams
from perturbed.models.discrepancy_vae_module import (
    DiscrepancyVAEModule,
    Weights,
    condition_batches,
    kl_weight,
    mmd_weight,
    target_temperature,
)
from perturbed.models.nn.mmd import gaussian_mmd, multiscale_bandwidths

SMALL = {"n_latent": 4, "n_hidden": 16, "mmd_width": 20.0, "n_samples": 20}
WIDTHS = multiscale_bandwidths(5.0)


def random_module(n_genes=6, n_perturbed=5, n_latent=4, seed=0) -> DiscrepancyVAEModule:
    torch.manual_seed(seed)
    module = DiscrepancyVAEModule(n_genes, n_perturbed, n_latent, 8).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    return module


def fitted(data, seed=0, **options) -> DiscrepancyVAE:
    method = DiscrepancyVAE(DiscrepancyVAEParams(**{**SMALL, "epochs": 3, "lr": 3e-3, **options}))
    method.fit(data, FitRun(seed=seed, progress=False))
    return method


# --- the module ---------------------------------------------------------------------------------------------------


def test_loss_terms_match_the_published_formulas_cell_by_cell():
    module = random_module()
    generator = torch.manual_seed(3)
    conditions = torch.zeros(2, 5, dtype=torch.double)
    conditions[0, 1], conditions[1, 0], conditions[1, 3] = 1, 1, 1
    x = torch.randn(10, 6, dtype=torch.double, generator=generator)
    noise = torch.randn(5, 4, dtype=torch.double, generator=generator)
    which = torch.tensor([0, 1, 1, 0, 1])
    weights = Weights(0.7, 0.3, 0.01, 2.5)
    terms = module.loss(Batch(x, conditions, which), noise, weights, WIDTHS)
    leaky = torch.nn.LeakyReLU(0.2)
    inverse = torch.inverse(torch.eye(4).double() - torch.triu(module.graph, diagonal=1))
    generated, reconstruction, kl = [], 0.0, 0.0
    for i in range(5):
        control = x[5 + i]
        mean, raw = module.encoder[2](leaky(module.encoder[0](control))).chunk(2)
        variance = torch.nn.functional.softplus(raw) + 1e-6
        z = mean + variance.sqrt() * noise[i]
        moved = z.clone()
        for gene in torch.nonzero(conditions[which[i]]).ravel():
            one_hot = torch.eye(5).double()[gene]
            target = torch.softmax(module.target_out(leaky(module.target_in(one_hot))) * 2.5, dim=0)
            moved = moved + target * module.strength[gene]
        decoded, intervened = (
            leaky(module.decoder[2](leaky(module.decoder[0](latent @ inverse)))) for latent in (z, moved)
        )
        generated.append(intervened)
        reconstruction += (decoded - control).square().mean() / 5
        normal = torch.distributions.Normal
        kl += torch.distributions.kl_divergence(normal(mean, variance.sqrt()), normal(0 * mean, 1.0)).sum() / 5
    mmd = gaussian_mmd(torch.stack(generated), x[:5], WIDTHS, which)
    edges = sum(module.graph[i, j].abs() for i in range(4) for j in range(i + 1, 4))
    for found, wanted in zip(terms[1:], (mmd, reconstruction, kl, edges)):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(terms.loss, 0.7 * mmd + reconstruction + 0.3 * kl + 0.01 * edges)


def test_the_causal_layer_is_an_acyclic_graph_solved_without_inversion():
    module = random_module(n_latent=7)
    z = torch.randn(5, 7, dtype=torch.double)
    weights = module.graph.triu(1)
    torch.testing.assert_close(module.causal(z), z @ torch.inverse(torch.eye(7).double() - weights))
    u = module.causal(z)
    torch.testing.assert_close(u, u @ weights + z)  # each latent is its own noise plus what earlier ones send it
    assert torch.linalg.matrix_power(weights, 7).abs().max() == 0
    before = module.causal(z)
    with torch.no_grad():
        module.graph += torch.randn(7, 7).double().tril()  # cycles and loops cannot be written into the graph
    assert torch.equal(module.causal(z), before)


def test_temperature_spreads_a_perturbation_over_all_latents_or_picks_one():
    module = random_module()
    every = torch.arange(5)
    torch.testing.assert_close(module.targets(every, 0.0), torch.full((5, 4), 0.25).double())
    sharp = module.targets(every, 1e4)
    torch.testing.assert_close(sharp.max(1).values, torch.ones(5).double())
    assert torch.equal(sharp.argmax(1), module.targets(every, 1.0).argmax(1))
    torch.testing.assert_close(module.targets(every, 3.0).sum(1), torch.ones(5).double())


@pytest.mark.parametrize("genes", [[], [2], [0, 3], [0, 2, 4]])
def test_the_shift_of_a_combination_is_the_sum_of_its_genes(genes):
    module = random_module()
    condition = torch.zeros(1, 5, dtype=torch.double)
    condition[0, genes] = 1
    singles = module.shift(torch.eye(5).double(), 2.0)
    torch.testing.assert_close(module.shift(condition, 2.0)[0], singles[genes].sum(0))


# --- schedules and batches ----------------------------------------------------------------------------------------


def test_schedules_are_the_published_ones_at_100_epochs():
    alpha, beta, temperature = (np.zeros(100), np.zeros(100), np.ones(100))
    alpha[5:50], alpha[50:] = np.linspace(0, 10, 45), 10
    beta[10:] = np.linspace(0, 2, 90)
    temperature[5:] = np.linspace(1, 5, 95)
    for schedule, full, wanted in ((mmd_weight, 10, alpha), (kl_weight, 2, beta), (target_temperature, 5, temperature)):
        np.testing.assert_allclose([schedule(e, 100, full) for e in range(100)], wanted, atol=1e-12)


@pytest.mark.parametrize("n_epochs", [1, 2, 3, 4, 12, 57, 400])
def test_schedules_rise_and_arrive_in_runs_of_any_length(n_epochs):
    for schedule in (mmd_weight, kl_weight, target_temperature):
        values = [schedule(e, n_epochs, 7.0) for e in range(n_epochs)]
        assert values == sorted(values)
        assert values[-1] == 7.0


def test_batches_hold_one_condition_and_every_full_batch_is_used():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2, 3], [70, 32, 5, 13]))
    rows = np.flatnonzero(rng.random(120) < 0.9)
    drawn = list(condition_batches(group, rows, 16, rng))
    assert all(len(set(group[batch])) == 1 for batch in drawn)
    sizes = {g: sorted(len(batch) for batch in drawn if group[batch[0]] == g) for g in range(4)}
    for g in range(4):
        n = int((group[rows] == g).sum())
        assert sizes[g] == ([16] * (n // 16) if n >= 16 else [n])
    together = np.concatenate(drawn)
    assert len(set(together)) == len(together) and set(together) <= set(rows)
    order = [group[batch[0]] for batch in drawn]
    assert order != sorted(order)


def test_every_cell_gets_its_turn_and_batches_are_functions_of_the_generator():
    group = np.repeat([0, 1], 20)
    seen = {row for seed in range(9) for b in _batches(group, seed) for row in b}
    assert seen == set(range(40))
    one, two, other = (np.concatenate(_batches(group, seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)


def _batches(group: np.ndarray, seed: int) -> list[np.ndarray]:
    return list(condition_batches(group, np.arange(len(group)), 16, np.random.default_rng(seed)))


# --- the method ---------------------------------------------------------------------------------------------------


def planted_shifts(size: float, n_single=4, n_cells=160, n_genes=40) -> tuple[TrainingData, dict[str, np.ndarray]]:
    """Cells of the model's own class: each perturbation moves one latent of a causal graph by `size`."""
    rng = np.random.default_rng(0)
    total = np.linalg.inv(np.eye(n_single) - np.triu(rng.normal(0, 0.4, (n_single, n_single)), 1))
    mix, base = total @ rng.normal(0, 0.4, (n_single, n_genes)), rng.uniform(2, 4, n_genes)
    genes = tuple(f"G{i:02d}" for i in range(n_genes))
    shifts = {gene: size * mix[i] for i, gene in enumerate(genes[:n_single])}
    labels = np.repeat(["control", *shifts], [2 * n_cells, *[n_cells] * n_single])
    n = len(labels)
    x = base + rng.normal(size=(n, n_single)) @ mix + 0.3 * rng.normal(size=(n, n_genes))
    x += np.stack([shifts.get(label, 0 * base) for label in labels])
    matrix = sparse.csr_matrix(np.maximum(x, 0).astype(np.float32))
    none = np.zeros(n, dtype=bool)
    return TrainingData(matrix, labels, np.full(n, "all"), none, genes, base, np.zeros((n_genes, 2))), shifts


def fitted_shifts(data, **options) -> DiscrepancyVAE:
    quick = {"n_latent": 8, "n_hidden": 32, "epochs": 150, "lr": 2e-3, "mmd_width": 60.0, "n_samples": 0}
    return fitted(data, **{**quick, **options})


def test_planted_shifts_are_recovered_and_unseen_doubles_follow():
    data, shifts = planted_shifts(3.0)
    method = fitted_shifts(data)
    control = method.predict_one("control", "all")["mean"]
    doubles = {name: sum(shifts[gene] for gene in name.split("+")) for name in ("G00+G01", "G01+G03")}
    found = {name: method.predict_one(name, "all")["mean"] - control for name in (*shifts, *doubles)}
    for name, change in found.items():
        likeness = {other: np.corrcoef(change, shift)[0, 1] for other, shift in {**shifts, **doubles}.items()}
        if name in shifts:
            assert max(shifts, key=likeness.__getitem__) == name
        assert likeness[name] > (0.8 if name in shifts else 0.6)
        assert 0.4 < np.linalg.norm(change) / np.linalg.norm({**shifts, **doubles}[name]) < 1.3
    with torch.no_grad():
        targets = method.module.targets(torch.arange(4), method.params.temperature)
    assert len(set(targets.argmax(1).tolist())) == 4  # each gene found a latent of its own


def test_labels_that_mean_nothing_shift_little():
    """Null: no perturbation does anything; what is left is far below a planted shift of one standard deviation."""
    data, _ = planted_shifts(0.0)
    _, real = planted_shifts(1.0)
    method = fitted_shifts(data, epochs=100)
    control = method.predict_one("control", "all")["mean"]
    moved = [np.linalg.norm(method.predict_one(gene, "all")["mean"] - control) for gene in real]
    assert np.mean(moved) < 0.5 * np.mean([np.linalg.norm(shift) for shift in real.values()])


def test_training_pairs_are_perturbed_cells_with_controls_of_their_context():
    data = plant(contexts=("a", "b"), n_cells=40).data  # context b lies 0.5 higher in every gene
    method = fitted(data, n_latent=6, n_hidden=32, epochs=40, lr=1e-2, kl_weight=0.01, n_samples=0)
    higher = method.predict_one("G01", "b")["mean"] - method.predict_one("G01", "a")["mean"]
    assert higher.mean() > 0.2
    with pytest.raises(MethodError, match="'c'"):
        method.predict_one("G01", "c")


def test_validation_cells_do_not_train_and_stop_early():
    data = plant(val_fraction=0.3).data
    rows: list[dict] = []
    method = DiscrepancyVAE(DiscrepancyVAEParams(**{**SMALL, "epochs": 3}))
    method.fit(data, FitRun(progress=False, history=rows.append))
    assert {"loss", "mmd", "reconstruction", "kl", "edges", "val_loss", "val_mmd"} <= set(rows[0])
    changed = data.X.copy()
    is_val = np.flatnonzero(data.is_val & (data.perturbation != "control"))
    for row in is_val:
        changed.data[changed.indptr[row] : changed.indptr[row + 1]] += 1
    other = fitted(replace(data, X=changed), epochs=3, lr=1e-3)
    for key, value in method.state().items():
        assert torch.equal(value, other.state()[key])


def test_triples_samples_and_the_modes_of_the_mean():
    method = fitted(plant(n_cells=60).data, n_samples=3000, epochs=8)
    found = method.predict_one("G00+G03+G05", "all", seed=1)
    assert found["cells"].shape == (3000, 50)
    np.testing.assert_allclose(found["cells"].var(axis=0), found["variance"], rtol=1e-4)
    error = np.abs(found["cells"].mean(axis=0) - found["mean"]) / np.sqrt(found["variance"] / 700)
    assert error.max() < 5
    means = [method.predict_one("G00+G03+G05", "all", seed=s)["mean"] for s in (1, 1, 2)]
    np.testing.assert_array_equal(means[0], means[1])
    assert not np.array_equal(means[0], means[2])
    method.params = method.params.model_copy(update={"predict": "mean"})
    latent = [method.predict_one("G00+G03+G05", "all", seed=s)["mean"] for s in (1, 2)]
    np.testing.assert_array_equal(latent[0], latent[1])


def test_predictions_take_the_temperature_that_training_ended_with():
    data = plant(n_cells=20).data
    method = fitted(data, temperature=4.0, n_samples=0)
    same = fitted(data, temperature=4.0, predict_temperature=4.0, n_samples=0)
    flat = fitted(data, temperature=4.0, predict_temperature=1e-3, n_samples=0)
    predictions = [m.predict_one("G01", "all")["mean"] for m in (method, same, flat)]
    np.testing.assert_array_equal(predictions[0], predictions[1])
    assert not np.array_equal(predictions[0], predictions[2])


def test_the_representation_is_of_the_cell_alone():
    data = plant().data
    method = fitted(data)
    z = method.represent(data.X)
    assert z.shape == (len(data.perturbation), 4)
    order = np.random.default_rng(0).permutation(len(z))
    np.testing.assert_allclose(method.represent(data.X[order]), z[order], atol=1e-5)
    assert fitted(data, n_latent=None).represent(data.X).shape[1] == len(data.seen_genes)


def test_bfloat16_trains_what_float32_trains():
    data, _ = planted_shifts(3.0)
    exact, quick = (fitted_shifts(data, epochs=4, precision=precision) for precision in ("float32", "bfloat16"))
    one, two = (method.predict_one("G01+G03", "all")["mean"] for method in (exact, quick))
    assert not np.array_equal(one, two)
    np.testing.assert_allclose(one, two, rtol=0.05)


def test_unseen_genes_are_refused_and_unperturbed_data_too():
    data = plant().data
    with pytest.raises(UnseenPerturbationError, match="G20"):
        fitted(data).predict_one("G00+G20", "all")
    with pytest.raises(MethodError, match="all cells are control"):
        fitted(only(data, data.perturbation == "control"))
