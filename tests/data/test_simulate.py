"""The simulators: what they plant is what comes out of the cells."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from perturbed.data.simulate import build_generator, simulate
from perturbed.data.simulators.epistasis import KINDS, Epistasis
from perturbed.data.simulators.params import ScmParams
from perturbed.data.simulators.scm import Mechanisms, Scm
from perturbed.data.simulators.world import draw_counts, draw_overdispersion, expected_counts, stream
from perturbed.names import genes_of
from simulated_world import GENERATORS, SMALL, simulated, source, well_sampled

# --- the causal model ---------------------------------------------------------------------------------------------


def test_solve_matches_explicit_inverse() -> None:
    rng = np.random.default_rng(0)
    d, d_iota, n = 9, 4, 20
    found = Mechanisms(
        np.tril(rng.normal(size=(d, d)), -1), rng.normal(size=(d, d_iota)), rng.normal(size=d), rng.normal(size=d)
    )
    z_iota, noise = rng.normal(size=(n, d_iota)), rng.normal(size=(n, d))
    inverse = np.linalg.inv(np.eye(d) - found.lambda_nn)
    for cell in range(n):
        right = found.lambda_ni @ z_iota[cell] + found.mu + np.sqrt(np.exp(found.log_beta)) * noise[cell]
        np.testing.assert_allclose(found.solve(z_iota, noise)[cell], inverse @ right, atol=1e-10)


def test_graph_is_strictly_lower_triangular_in_every_condition() -> None:
    _, truth = simulated("scm")
    assert (np.triu(truth.obsm["lambda_nn"]) == 0).all()
    assert (truth.obsm["lambda_nn"] != 0).any()


def test_planted_means_match_the_analytic_mean() -> None:
    raw, truth = well_sampled("scm")
    d = truth.obsm["mu"].shape[1]
    mean_iota = truth.uns["planted"]["mean_z_iota"]
    for row, name in enumerate(truth.obs_names):
        a = np.eye(d) - truth.obsm["lambda_nn"][row]
        expected = np.linalg.inv(a) @ (truth.obsm["mu"][row] + truth.obsm["lambda_ni"][row] @ mean_iota)
        np.testing.assert_allclose(truth.obsm["z_nu_expected"][row], expected, atol=1e-10)
        z_nu = raw.obsm["z_nu"][(raw.obs["perturbation"] == name).to_numpy()]
        error = z_nu.std(axis=0) / np.sqrt(len(z_nu))
        assert (np.abs(z_nu.mean(axis=0) - expected) < 4.5 * error).all(), name
        assert (np.abs(truth.obsm["z_nu"][row] - expected) < 4.5 * error).all(), name


def test_planted_variance_matches_the_analytic_variance() -> None:
    raw, truth = well_sampled("scm")
    row = truth.obs_names.get_loc(next(name for name in truth.obs_names if "+" in name))
    cells = (raw.obs["perturbation"] == truth.obs_names[row]).to_numpy()
    inverse = np.linalg.inv(np.eye(truth.obsm["mu"].shape[1]) - truth.obsm["lambda_nn"][row])
    mixed = inverse @ truth.obsm["lambda_ni"][row]
    noise = inverse @ np.diag(np.exp(truth.obsm["log_beta"][row])) @ inverse.T
    expected = np.diag(mixed @ np.cov(raw.obsm["z_iota"][cells].T) @ mixed.T + noise)
    np.testing.assert_allclose(raw.obsm["z_nu"][cells].var(axis=0), expected, rtol=0.12)


def test_doubles_follow_the_same_causal_model() -> None:
    _, truth = simulated("scm")
    doubles = [name for name in truth.obs_names if "+" in name]
    assert len(doubles) == SMALL["n_doubles"]
    for key in ("lambda_nn", "lambda_ni", "mu", "log_beta"):
        planted = dict(zip(truth.obs_names, truth.obsm[key]))
        for name in doubles:
            changes = sum(planted[gene] - planted["control"] for gene in genes_of(name))
            np.testing.assert_allclose(planted[name], planted["control"] + changes, atol=1e-12)


def test_doubles_are_not_additive_in_the_latents() -> None:
    _, truth = simulated("scm")
    mean = dict(zip(truth.obs_names, truth.obsm["z_nu_expected"]))
    gaps = [
        np.abs(mean[name] - sum(mean[gene] - mean["control"] for gene in genes_of(name)) - mean["control"]).max()
        for name in truth.obs_names
        if "+" in name
    ]
    assert max(gaps) > 0.1


def test_default_screen_fulfils_the_identifiability_conditions() -> None:
    generator = Scm(ScmParams(), seed=0)
    d_nu = generator.world.params.d_nu
    singles = [generator.mechanisms((i,)) for i in range(generator.world.params.n_perturbed_genes)]
    natural = [np.concatenate([m.mu * np.exp(-m.log_beta), -0.5 * np.exp(-m.log_beta)]) for m in singles]
    control = generator.control
    base = np.concatenate([control.mu * np.exp(-control.log_beta), -0.5 * np.exp(-control.log_beta)])
    assert np.linalg.matrix_rank(np.stack(natural) - base) == 2 * d_nu  # environment sufficiency
    orphaned = [any((m.lambda_nn[k] == 0).all() and (m.lambda_ni[k] == 0).all() for m in singles) for k in range(d_nu)]
    assert all(orphaned[1:])  # intervention sufficiency; the shared root has no responsive parents at all
    assert (control.lambda_nn[0] == 0).all()


def test_shared_program_moves_in_every_single() -> None:
    _, truth = simulated("scm")
    singles = truth.obs["n_perturbed"].to_numpy() == 1
    assert (truth.obsm["mu"][singles, 0] > 0).all()
    _, without = simulate(source("scm", shared_effect=0.0), "x")
    assert (without.obsm["mu"][:, 0] == 0).all()


# --- genes, mixing, counts ----------------------------------------------------------------------------------------


def test_mixing_matches_a_slow_reference() -> None:
    world = build_generator(source("scm", nonlinearity=0.7), "x").world
    cells = world.draw_background(stream(0, 99), 4)
    z_nu = np.random.default_rng(1).normal(size=(4, SMALL["d_nu"]))
    found = world.mix(cells.z_iota, z_nu, cells.batch)
    for cell in range(4):
        z = np.concatenate([cells.z_iota[cell], z_nu[cell]])
        for gene in range(0, SMALL["n_genes"], 7):
            value = world.bias[gene] + world.batch_shift[cells.batch[cell], gene]
            loadings = np.concatenate([world.loadings_iota[gene], world.loadings_nu[gene]])
            value += sum(a * b for a, b in zip(loadings, z))
            for unit in range(SMALL["hidden"]):
                inner = sum(a * b for a, b in zip(world.mlp_in[unit], z)) + world.mlp_bias[unit]
                scale = 0.7 / np.sqrt(SMALL["hidden"] * 0.15)
                value += scale * world.mlp_out[gene, unit] * (np.log1p(np.exp(inner)) - np.log(2))
            assert found[cell, gene] == pytest.approx(value, abs=1e-9)


def test_counts_have_negative_binomial_mean_and_variance() -> None:
    rng = np.random.default_rng(0)
    rate, theta, n = np.array([0.3, 2.0, 15.0]), np.array([1.5, 4.0, 10.0]), 200_000
    factor = draw_overdispersion(theta, n, rng)
    counts = draw_counts(np.tile(rate, (n, 1)), factor, np.zeros((1, 1)), rng)
    variance = rate + rate**2 / theta
    assert (np.abs(counts.mean(axis=0) - rate) < 4.5 * np.sqrt(variance / n)).all()
    np.testing.assert_allclose(counts.var(axis=0), variance, rtol=0.03)
    for g in range(3):  # the whole distribution, not only two moments
        zero = stats.nbinom(theta[g], theta[g] / (theta[g] + rate[g])).pmf(0)
        assert (counts[:, g] == 0).mean() == pytest.approx(zero, abs=0.005)


def test_dropout_zeroes_the_planted_share_of_counts() -> None:
    rng = np.random.default_rng(0)
    shape = (50_000, 2)
    rate = np.full(shape, 50.0)
    counts = draw_counts(rate, np.ones(shape), np.broadcast_to([0.0, 0.3], shape), rng)
    np.testing.assert_allclose((counts == 0).mean(axis=0), [0.0, 0.3], atol=0.01)


def test_expected_counts_sum_to_the_depth() -> None:
    rng = np.random.default_rng(0)
    depth = rng.uniform(100, 5000, 30)
    rate = expected_counts(rng.normal(300.0, 3.0, (30, 40)), depth)  # large log-rates must not overflow
    np.testing.assert_allclose(rate.sum(axis=1), depth, rtol=1e-12)


def test_library_sizes_are_log_normal_and_go_with_the_depth_program() -> None:
    raw, _ = well_sampled("scm")
    log_depth = np.log(raw.obs["depth"].to_numpy())
    assert np.median(log_depth) == pytest.approx(np.log(1000.0), abs=0.02)
    assert log_depth.std() == pytest.approx(0.35, abs=0.01)
    assert abs(stats.skew(log_depth)) < 0.08
    assert np.corrcoef(log_depth, raw.obsm["z_iota"][:, -1])[0, 1] == pytest.approx(0.7, abs=0.02)
    totals = np.asarray(raw.X.sum(axis=1)).ravel()
    assert (totals / raw.obs["depth"].to_numpy()).mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("generator", GENERATORS)
def test_background_is_the_same_in_every_perturbation(generator: str) -> None:
    raw, truth = well_sampled(generator)
    for name in truth.obs_names:
        cells = (raw.obs["perturbation"] == name).to_numpy()
        z = raw.obsm["z_iota"][cells]
        error = z.std(axis=0) / np.sqrt(len(z))
        assert (np.abs(z.mean(axis=0) - truth.uns["planted"]["mean_z_iota"]) < 4.5 * error).all(), name
    np.testing.assert_allclose(raw.obsm["z_iota"][:, -3], np.cos(raw.obs["phase"]), atol=1e-6)
    np.testing.assert_allclose(raw.obsm["z_iota"][:, -2], np.sin(raw.obs["phase"]), atol=1e-6)


def test_perturbed_gene_rises_by_the_planted_effect() -> None:
    for effect in (1.0, -0.8, 0.0):
        _, truth = simulate(source("scm", target_effect=effect), "x")
        _, without = simulate(source("scm", target_effect=0.0), "x")
        moved = truth.layers["log_rate"] - without.layers["log_rate"]
        for row, name in enumerate(truth.obs_names):
            expected = np.where(truth.var_names.isin(genes_of(name)), effect, 0.0)
            np.testing.assert_allclose(moved[row], expected, atol=1e-5)


def test_gene_sets_are_the_loadings_support() -> None:
    raw, truth = simulated("scm")
    sets = json.loads(truth.uns["gene_sets"])
    names = json.loads(truth.uns["program_names"])["z_nu"]
    assert list(sets) == sorted(names)
    for k, name in enumerate(names):
        assert sets[name] == list(truth.var_names[truth.varm["loadings_nu"][:, k] != 0])
        assert len(sets[name]) == SMALL["gene_set_size"]
    for gene, program in raw.var["program"].items():
        assert (program == "none") == (not any(gene in members for members in sets.values()))
        assert program == "none" or gene in sets[program]


def test_batches_shift_the_log_rate() -> None:
    world = build_generator(source("scm", n_batches=3, batch_sd=0.5), "x").world
    latents = np.zeros((3, world.params.d_iota)), np.zeros((3, world.params.d_nu))
    rates = world.mix(*latents, np.arange(3))
    np.testing.assert_allclose(rates[1] - rates[0], world.batch_shift[1] - world.batch_shift[0], atol=1e-12)
    assert world.batch_shift.std() == pytest.approx(0.5, rel=0.2)
    raw, _ = simulated("scm")
    assert set(raw.obs["batch"]) == {"batch1", "batch2"}
    single, truth = simulate(source("scm", n_batches=0), "x")
    assert set(single.obs["batch"]) == {"batch1"}
    assert (truth.varm["batch_shift"] == 0).all()


# --- outside the model class --------------------------------------------------------------------------------------


def deviations(truth: Any, values: np.ndarray) -> dict[str, np.ndarray]:
    """What a double's mean has beyond the sum of its singles."""
    rows = dict(zip(truth.obs_names, np.asarray(values, dtype=float)))
    return {
        name: rows[name] - rows["control"] - sum(rows[gene] - rows["control"] for gene in genes_of(name))
        for name in rows
        if "+" in name
    }


def test_without_interaction_doubles_are_additive_in_the_log_rate() -> None:
    _, truth = simulate(source("epistasis", interaction=0.0), "x")
    for gap in deviations(truth, truth.layers["log_rate"]).values():
        np.testing.assert_allclose(gap, 0.0, atol=1e-5)


def test_each_interaction_has_its_planted_size() -> None:
    found = build_generator(source("epistasis", n_doubles=15), "small")
    assert isinstance(found, Epistasis)
    _, truth = simulate(source("epistasis", n_doubles=15), "small")
    shares = []
    gaps = deviations(truth, truth.layers["log_rate"])
    assert sorted(set(truth.obs["interaction"])) == sorted({"", *KINDS})
    keys = {found.world.name(key): key for key in found.world.conditions.values()}
    c = found.p.ceiling
    for name, gap in gaps.items():
        kind = truth.obs.loc[name, "interaction"]
        assert kind == found.kinds[keys[name]]
        first, second = found.dose[list(keys[name])]
        one, two = (np.sign(d) * c * (1 - np.exp(-np.abs(d) / c)) for d in (first, second))
        if kind == "multiplicative":
            np.testing.assert_allclose(gap, found.p.synergy * one * two, atol=1e-5)
        elif kind == "saturating":
            np.testing.assert_allclose(one + two + gap, found.saturate(first + second), atol=1e-5)
            assert np.abs(one + two + gap).max() <= c + 1e-5
        else:
            planted = found.p.switch_effect * found.world.loadings_nu[:, found.switched[keys[name]]]
            planted = planted - found.p.masking * two
            share = gap @ planted / (planted @ planted)
            shares.append(share)
            np.testing.assert_allclose(gap, share * planted, atol=1e-5)
        assert kind == "threshold" or np.linalg.norm(gap) > 0.05, kind
    assert len(shares) == 5
    assert min(shares) >= 0 and max(shares) <= 1
    assert any(0.1 < share < 0.9 for share in shares), "some cells of a condition switch, others do not"


def test_interaction_breaks_additivity_beyond_noise_and_beyond_normalisation() -> None:
    params = {"n_truth_cells": 3000, "d_nu": 6}
    _, strong = simulate(source("epistasis", **params), "x")
    _, none = simulate(source("epistasis", interaction=0.0, **params), "x")
    gap, null = deviations(strong, strong.X), deviations(none, none.X)
    beyond = []
    for name, values in gap.items():
        rows = (name, *genes_of(name), "control")
        error = np.sqrt(sum(strong[row].layers["variance"].ravel() for row in rows) / 3000)
        beyond.append(np.abs(values) > 5 * error)
    assert np.mean(beyond) > 0.1
    size = np.mean([np.linalg.norm(values) for values in gap.values()])
    assert size > 1.5 * np.mean([np.linalg.norm(values) for values in null.values()])


def test_dropout_depends_on_the_condition() -> None:
    params = {"n_control": 300, "n_cells_per_perturbation": 300, "dropout_rate": 5.0}
    raw, truth = simulate(source("epistasis", dropout=0.3, **params), "x")
    without, _ = simulate(source("epistasis", dropout=0.0, **params), "x")
    assert (raw.X > without.X).nnz == 0  # the same counts, some of them lost
    planted = truth.obsm["dropout"].ravel()
    lost = []
    for name in truth.obs_names:
        rows = (raw.obs["perturbation"] == name).to_numpy()
        lost.append(1 - raw.X[rows].nnz / without.X[rows].nnz)
    assert stats.spearmanr(planted, lost).statistic > 0.9
    assert planted[0] == pytest.approx(0.15)
    assert np.ptp(planted) > 0.2
    for name, value in zip(truth.obs_names, planted):
        if "+" in name:
            kept = np.prod([1 - truth[gene].obsm["dropout"].item() for gene in genes_of(name)])
            assert 1 - value == pytest.approx(kept / (1 - planted[0]))
