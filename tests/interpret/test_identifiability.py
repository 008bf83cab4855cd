"""Scores of recovered latents, the world they come from, the rotation that finds them, and a small fit end to end."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch

from perturbed.config import parse
from perturbed.errors import ConfigError
from perturbed.figures.identifiability import draw
from perturbed.interpret.identifiability import Inputs, fit_network, run_setting, score_latents, start_directions
from perturbed.interpret.identifiability_spec import (
    EstimatorOptions,
    IdentifiabilitySetting,
    IdentifiabilityStudy,
    LatentWorldOptions,
    expand,
)
from perturbed.interpret.latent_network import EnvironmentSCM, LatentPosterior, LatentVAE, kl_response
from perturbed.interpret.latent_simulation import TEST, TRAIN, LatentWorld
from perturbed.interpret.matching import block_r2, mean_correlation, structural_hamming_distance
from perturbed.interpret.mechanism_rotation import estimate_edges, rotate_to_sparse_mechanisms, rotate_to_targets

RNG = np.random.default_rng(0)
SMALL = LatentWorldOptions(n_genes=60, mixing_width=48, n_train=2400, n_test=600)
QUICK = EstimatorOptions(n_hidden=48, n_components=48, steps=200, restarts=1, lr=4e-3)


# --- scores -------------------------------------------------------------------------------------------------------


def slow_mcc(true: np.ndarray, estimate: np.ndarray) -> float:
    best = 0.0
    for order in permutations(range(estimate.shape[1]), true.shape[1]):
        pairs = [abs(np.corrcoef(true[:, i], estimate[:, j])[0, 1]) for i, j in enumerate(order)]
        best = max(best, float(np.mean(pairs)))
    return best


def test_mcc_is_the_best_of_all_assignments() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        true = rng.normal(size=(50, 3))
        estimate = true @ rng.normal(size=(3, 5)) + rng.normal(size=(50, 5))
        assert mean_correlation(true, estimate)[0] == pytest.approx(slow_mcc(true, estimate), abs=1e-12)


def test_mcc_ignores_order_sign_scale_and_origin() -> None:
    true = RNG.normal(size=(200, 4))
    order = np.array([2, 0, 3, 1])
    value, matched = mean_correlation(true, -3.0 * true[:, order] + 7.0)
    assert value == pytest.approx(1.0)
    np.testing.assert_array_equal(order[matched], np.arange(4))


def test_mcc_within_averages_environments_before_it_matches() -> None:
    environment = np.repeat([0, 1, 2], [30, 50, 20])
    true, estimate = RNG.normal(size=(100, 3)), RNG.normal(size=(100, 3))
    table = np.zeros((3, 3))
    for e in range(3):
        rows = environment == e
        table += np.abs(np.corrcoef(true[rows].T, estimate[rows].T)[:3, 3:]) / 3
    slow = max(np.mean([table[i, j] for i, j in enumerate(order)]) for order in permutations(range(3)))
    assert mean_correlation(true, estimate, environment)[0] == pytest.approx(slow)


def test_a_constant_latent_correlates_with_nothing() -> None:
    true = RNG.normal(size=(60, 2))
    assert mean_correlation(true, np.full((60, 2), 1 / 3))[0] == 0


def test_the_environments_mean_fools_the_pooled_mcc_only() -> None:
    world = LatentWorld(LatentWorldOptions(n_genes=40, mixing_width=24), 3)
    cells = world.draw(TEST, 2400)
    means = np.vstack([cells.z_nu[cells.environment == e].mean(0) for e in range(12)])
    floor = means[cells.environment]
    assert mean_correlation(cells.z_nu, floor)[0] > 0.4
    assert mean_correlation(cells.z_nu, floor, cells.environment)[0] == 0
    blurred = floor + 1e-3 * RNG.normal(size=floor.shape)  # no longer constant, still nothing but the mean
    assert mean_correlation(cells.z_nu, blurred)[0] > 0.4
    assert mean_correlation(cells.z_nu, blurred, cells.environment)[0] < 0.12


def test_block_r2_is_a_regression_scored_on_the_other_half() -> None:
    estimate = RNG.normal(size=(80, 3))
    true = estimate @ RNG.normal(size=(3, 2)) + RNG.normal(size=(80, 2)) + 5
    scores = []
    for a, b in ((slice(40), slice(40, None)), (slice(40, None), slice(40))):
        for latent in range(2):
            x = np.column_stack([np.ones(40), estimate[a]])
            weights = np.linalg.inv(x.T @ x) @ x.T @ true[a, latent]
            guess = weights[0] + estimate[b] @ weights[1:]
            scores.append(1 - np.mean((true[b, latent] - guess) ** 2) / np.var(true[b, latent]))
    assert block_r2(true, estimate) == pytest.approx(np.mean(scores))
    assert block_r2(true, true @ np.array([[2.0, 1.0], [0.0, 3.0]]) - 4) == pytest.approx(1.0)
    assert block_r2(true, RNG.normal(size=(80, 2))) < 0.1


def test_structural_hamming_distance_counts_a_reversal_once() -> None:
    chain = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert structural_hamming_distance(chain, chain) == 0
    assert structural_hamming_distance(chain, np.zeros((3, 3))) == 2
    assert structural_hamming_distance(chain, np.array([[0, 1, 0], [0, 0, 0], [0, 1, 0]])) == 1
    assert structural_hamming_distance(chain, np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]])) == 1
    assert structural_hamming_distance(chain, chain.T) == 2


# --- world --------------------------------------------------------------------------------------------------------


def test_the_world_meets_the_assumptions_it_claims() -> None:
    world = LatentWorld(LatentWorldOptions(), 0)
    natural = np.hstack([world.mu_nu / world.beta_nu, -0.5 / world.beta_nu])
    assert np.linalg.matrix_rank(natural[1:] - natural[0]) == 8  # (ii), 2 d_nu
    for latent in range(4):  # (iv)
        orphaned = [
            e for e in range(12) if not world.lambda_nn[e, latent].any() and not world.lambda_ni[e, latent].any()
        ]
        assert orphaned == [latent, latent + 4, latent + 8]
    assert not np.triu(world.lambda_nn).any()
    weights = np.abs(world.lambda_ni[world.lambda_ni != 0])
    assert weights.min() >= 0.5 and weights.max() <= 1
    assert world.beta_nu.min() >= 0.5 and world.beta_nu.max() <= 2 and np.abs(world.mu_nu).max() <= 2


def test_cells_follow_the_structural_equations() -> None:
    world = LatentWorld(SMALL, 1)
    cells = world.draw(TRAIN, 36_000)
    np.testing.assert_array_equal(cells.z_iota, cells.z_iota_control)  # (iii)
    np.testing.assert_array_equal(cells.x, world.mix(cells.z_iota, cells.z_nu))
    for e in (0, 5):
        z_nu, z_iota = cells.z_nu[cells.environment == e], cells.z_iota[cells.environment == e]
        noise = z_nu - z_nu @ world.lambda_nn[e].T - z_iota @ world.lambda_ni[e].T
        np.testing.assert_allclose(noise.mean(0), world.mu_nu[e], atol=0.12)
        np.testing.assert_allclose(np.cov(noise.T), np.diag(world.beta_nu[e]), atol=0.15)
        assert np.abs(np.corrcoef(noise.T, z_iota.T)[:4, 4:]).max() < 0.08


def test_the_mixing_can_be_inverted() -> None:
    world = LatentWorld(SMALL, 2)
    cells = world.draw(TEST, 60)
    step = 1e-6
    for i in range(0, 60, 7):
        z = np.hstack([cells.z_iota[i], cells.z_nu[i]])
        rows = z + step * np.eye(11)
        jacobian = (world.mix(rows[:, :7], rows[:, 7:]) - world.mix(z[None, :7], z[None, 7:])) / step
        assert np.linalg.svd(jacobian, compute_uv=False)[-1] > 0.02


def test_options_break_one_assumption_each() -> None:
    kept = LatentWorld(SMALL.model_copy(update={"parents_removed": False}), 0)
    assert (kept.lambda_ni != 0).all()
    unrelated = LatentWorld(SMALL.model_copy(update={"shared_noise": False}), 0).draw(TRAIN, 600)
    assert np.abs(np.corrcoef(unrelated.z_iota.T, unrelated.z_iota_control.T)[:7, 7:]).max() < 0.2
    clean, noisy = (LatentWorld(SMALL.model_copy(update={"noise": s}), 0).draw(TRAIN, 600).x for s in (0.0, 0.3))
    assert (noisy - clean).std() == pytest.approx(0.3, rel=0.02)


def test_cells_are_a_function_of_the_seed() -> None:
    first, again, other = (LatentWorld(SMALL, seed).draw(TRAIN, 50).x for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, LatentWorld(SMALL, 4).draw(TEST, 50).x)


# --- rotation -----------------------------------------------------------------------------------------------------


def mixed_latents(options: LatentWorldOptions, seed: int) -> tuple[LatentWorld, np.ndarray, np.ndarray, np.ndarray]:
    """True latents behind a random `M z_ν + B z_ι` and a random linear map of z_ι."""
    world = LatentWorld(options, seed)
    cells = world.draw(TRAIN, options.n_train)
    rng = np.random.default_rng(seed)
    z_nu = cells.z_nu @ rng.normal(size=(4, 4)) + cells.z_iota @ rng.normal(size=(7, 4)) + 3
    return world, cells.z_nu, z_nu, cells.z_iota @ rng.normal(size=(7, 7))


@pytest.mark.parametrize("seed", range(4))
def test_sparse_mechanisms_undo_any_linear_mixing(seed: int) -> None:
    options = LatentWorldOptions(n_genes=40, mixing_width=24)
    world, true, z_nu, z_iota = mixed_latents(options, seed)
    environment = np.arange(options.n_train) % 12
    assert mean_correlation(true, z_nu)[0] < 0.9
    for rotation in (
        rotate_to_sparse_mechanisms(z_nu, z_iota, environment),
        rotate_to_targets(z_nu, z_iota, environment, world.orphan),
    ):
        found = rotation.apply(z_nu, z_iota)
        value, matched = mean_correlation(true, found, environment)
        assert value > 0.98
        for latent, at in enumerate(matched):
            assert set(rotation.orphaned[at]) == {latent, latent + 4, latent + 8}
        edges = estimate_edges(found, z_iota, environment, orphaned=rotation.orphaned)
        graph = edges.weight[np.ix_(matched, matched)] > 0.25
        assert structural_hamming_distance(world.graph, graph) <= 1


def test_without_parentless_environments_nothing_singles_the_latents_out() -> None:
    options = LatentWorldOptions(n_genes=40, mixing_width=24, parents_removed=False)
    scores = []
    for seed in range(4):
        _, true, z_nu, z_iota = mixed_latents(options, seed)
        environment = np.arange(options.n_train) % 12
        rotation = rotate_to_sparse_mechanisms(z_nu, z_iota, environment)
        scores.append(mean_correlation(true, rotation.apply(z_nu, z_iota), environment)[0])
    assert np.mean(scores) < 0.8


def test_with_fewer_distinct_directions_than_latents_the_rotation_is_still_invertible() -> None:
    environment = np.repeat(np.arange(3), 200)
    z_nu, z_iota = RNG.normal(size=(600, 4)), RNG.normal(size=(600, 5))  # nothing depends on anything
    rotation = rotate_to_sparse_mechanisms(z_nu, z_iota, environment)
    assert np.linalg.matrix_rank(rotation.of_nu, tol=1e-3) == 4


def test_another_model_of_the_same_cells_meets_every_assumption() -> None:
    """One parentless environment per latent does not identify it: `z_1 + c z_2 + b z_ι` is parentless there, too."""
    world = LatentWorld(LatentWorldOptions(n_genes=40, mixing_width=24, n_environments=4), 0)
    total = np.linalg.solve(np.eye(4) - world.lambda_nn, world.lambda_ni)  # slopes of z_ν on z_ι, (4, 4, 7)
    c = 0.8
    b = -c * total[0, 1]  # environment 0 removes the parents of latent 0
    slope = total[:, 0] + c * total[:, 1] + b
    np.testing.assert_allclose(slope[0], 0, atol=1e-12)
    assert np.abs(slope[1:]).max() > 0.1
    cells = world.draw(TEST, 40_000)
    other = cells.z_nu[:, 0] + c * cells.z_nu[:, 1] + cells.z_iota @ b
    assert abs(np.corrcoef(cells.z_nu[:, 0], other)[0, 1]) < 0.9
    rows = cells.environment == 0
    assert np.abs(np.corrcoef(other[rows], cells.z_iota[rows].T)[0, 1:]).max() < 0.05


# --- network ------------------------------------------------------------------------------------------------------


def test_kl_of_the_response_against_monte_carlo() -> None:
    torch.manual_seed(0)
    scm = EnvironmentSCM(2, 3, 2)
    for parameter in scm.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    with torch.no_grad():
        mechanisms = scm(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        row = torch.tensor([1])
        q = LatentPosterior(torch.randn(1, 2), torch.rand(1, 2) + 0.1, torch.randn(1, 3), torch.rand(1, 3) + 0.1)
        n = 400_000
        z_iota = q.iota_mean + q.iota_variance.sqrt() * torch.randn(n, 2)
        z_nu = q.nu_mean + q.nu_variance.sqrt() * torch.randn(n, 3)
        inverse = torch.linalg.inv(torch.eye(3) - mechanisms.edges[1])
        mean = (z_iota @ mechanisms.inputs[1].T + mechanisms.shift[1]) @ inverse.T
        covariance = inverse @ torch.diag(mechanisms.log_variance[1].exp()) @ inverse.T
        prior = torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(z_nu - mean)
        posterior = torch.distributions.Normal(q.nu_mean, q.nu_variance.sqrt()).log_prob(z_nu).sum(1)
        difference = posterior - prior
        error = 5 * float(difference.std()) / np.sqrt(n)
        assert float(kl_response(q, mechanisms, row)) == pytest.approx(float(difference.mean()), abs=error)


def test_alignment_counts_perturbed_cells_only_and_only_with_its_weight() -> None:
    torch.manual_seed(1)
    network = LatentVAE(6, 3, 2, 2, QUICK)
    x, environment = torch.randn(8, 6), torch.tensor([0, 1, 2, 1, 0, 0, 0, 0])
    draws = torch.randn(8, 4)
    options = {"n_cells": 4, "kl_weight": 1.0}
    with torch.no_grad():
        off, on = (network.loss(x, environment, draws, alpha=a, **options) for a in (0.0, 2.0))
        mean = network.encode(x, environment).iota_mean
    slow = np.mean([float((mean[i] - mean[i + 4]).square().sum()) for i in (1, 2, 3)])
    assert float(on.alignment) == pytest.approx(slow, rel=1e-5)
    assert float(on.loss - off.loss) == pytest.approx(2 * slow, rel=1e-4)


def test_the_condition_reaches_the_response_only() -> None:
    network = LatentVAE(6, 3, 2, 2, QUICK.model_copy(update={"posterior_sees_condition": True}))
    assert network.condition_head is not None
    torch.nn.init.normal_(network.condition_head.weight)
    x = torch.randn(5, 6)
    one, two = (network.encode(x, torch.full((5,), e)) for e in (1, 2))
    torch.testing.assert_close(one.iota_mean, two.iota_mean)
    assert not torch.allclose(one.nu_mean, two.nu_mean)


def test_fits_begin_at_a_linear_model_of_the_training_cells() -> None:
    cells = LatentWorld(SMALL, 0).draw(TRAIN, 600)
    inputs, rows = Inputs(cells, 48), np.arange(600)
    sizes = (12, 4, 7)
    encoder, decoder = start_directions(cells, inputs, rows, sizes, paired=True)
    assert encoder.shape == (11, 48) and decoder.shape == (48, 11)
    scores = inputs(cells.x).astype(float)
    z = scores @ encoder.T
    assert block_r2(cells.z_iota, z[:, :7]) > block_r2(cells.z_iota, z[:, 7:]) + 0.3
    network = LatentVAE(48, *sizes, QUICK)
    network.start_at(encoder, decoder)
    mean = network.encode(torch.from_numpy(scores).float(), torch.zeros(600, dtype=torch.long)).iota_mean
    np.testing.assert_allclose(mean.detach().numpy(), z[:, :7], atol=1e-4)


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    setting = IdentifiabilitySetting(
        name="base", factor="base", level="base", world=SMALL, estimator=QUICK, plain_vae=True
    )
    return run_setting(setting, 0)


def value(table: pd.DataFrame, arm: str, estimator: str, metric: str) -> float:
    rows = (table["arm"] == arm) & (table["estimator"] == estimator) & (table["metric"] == metric)
    assert rows.sum() == 1
    return float(table.loc[rows, "value"].iloc[0])


def test_a_small_fit_beats_the_floors_within_environments(table: pd.DataFrame) -> None:
    found = value(table, "aligned", "perturbedvae_rotated", "mcc_within")
    for floor in ("environment_mean", "pca", "plain_vae", "untrained"):
        assert found > value(table, "none", floor, "mcc_within") + 0.15
    assert found > value(table, "aligned", "perturbedvae", "mcc_within") + 0.05
    assert value(table, "none", "environment_mean", "mcc_within") == 0
    assert value(table, "none", "environment_mean", "mcc_pooled") > 0.3
    background = value(table, "aligned", "perturbedvae", "r2_iota")
    assert background > 0.9 and background > value(table, "unaligned", "perturbedvae", "r2_iota") + 0.05


def test_a_table_is_complete_and_drawn(table: pd.DataFrame) -> None:
    keys = ["setting", "factor", "level", "n_environments", "n_cells", "noise", "seed", "arm", "estimator", "metric"]
    assert list(table.columns) == [*keys, "value"]
    assert not table.duplicated(keys).any() and np.isfinite(table["value"]).all()
    few = table.assign(setting="environments_4", factor="environments", level="4", n_environments=4)
    figure = draw(pd.concat([table, few], ignore_index=True))
    assert len(figure.subfigs[0].axes) == 5 and len(figure.subfigs[1].axes) == 8


def test_a_fit_is_a_function_of_the_seed() -> None:
    world = LatentWorld(SMALL.model_copy(update={"n_train": 200}), 0)
    cells = world.draw(TRAIN, 200)
    options = QUICK.model_copy(update={"steps": 6})
    fits = [fit_network(cells, (12, 4, 7), options, arm="aligned", seed=seed) for seed in (1, 1, 2)]
    states = [np.concatenate([p.detach().numpy().ravel() for p in fit.network.parameters()]) for fit in fits]
    np.testing.assert_array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2])


def test_the_best_restart_has_the_lowest_validation_loss() -> None:
    cells = LatentWorld(SMALL, 0).draw(TRAIN, 200)
    options = QUICK.model_copy(update={"steps": 6})
    fits = [
        fit_network(cells, (12, 4, 7), options.model_copy(update={"restarts": n}), arm="aligned", seed=0)
        for n in (1, 2, 4)
    ]
    losses = [fit.val_loss for fit in fits]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    scores = score_latents(cells, fits[-1].encode(cells.x, cells.environment))
    assert [metric for metric, _ in scores] == ["mcc_pooled", "mcc_within", "r2_nu", "r2_iota"]


def test_settings_vary_one_factor_at_a_time() -> None:
    settings = expand(IdentifiabilityStudy())
    base = settings["base"]
    assert base.plain_vae and base.world.n_train == 3000 and base.world.n_environments == 12
    for name, setting in settings.items():
        assert name == setting.name and "/" not in name
        changes = [
            key
            for part in ("world", "estimator")
            for key, value in getattr(setting, part).model_dump().items()
            if value != getattr(base, part).model_dump()[key]
        ]
        assert len(changes) == (name != "base")
    for world, message in (
        ({"mixing_width": 8}, "mixing_width 8 cannot be inverted; take 11 .all latents. to 500 .all genes."),
        ({"n_genes": 20}, "mixing_width 64 cannot be inverted; take 11 .all latents. to 20 .all genes."),
        ({"n_genes": 9}, "n_genes 9 cannot show 11 latents; take at least 11"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            parse(IdentifiabilityStudy, {"world": world}, "options")
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="occurs twice"):
        expand(IdentifiabilityStudy(cells=(750, 750)))
